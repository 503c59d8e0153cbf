# SPDX-License-Identifier: Apache-2.0
"""train.py in several processes: spawned by itself, started as two nodes, started by torchrun."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import train
from torch_utils import distributed

ROOT = Path(train.__file__).resolve().parent
TINY = [
    *["--cfg=laptop", "--data=demo", "--subset=50", "--device=cpu", "--batch=8", "--workers=0", "--kimg=1"],
    *["--set=G_kwargs.synthesis_kwargs.channel_max=4", "--set=D_kwargs.channel_max=4"],
    *["--set=kimg_per_tick=0.02", "--set=image_snapshot_ticks=null", "--set=network_snapshot_ticks=1000"],
]


def start(*args, module=(), **variables):
    command = [sys.executable, *module, str(ROOT / "train.py"), *map(str, args)]
    env = dict(os.environ, OMP_NUM_THREADS="1", **variables)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def read_until(process, beginning):
    """Output up to the first line that begins so."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError("".join(lines))


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(folder of runs, output) of a run in two spawned processes whose parent, alone, got SIGTERM."""
    folder = tmp_path_factory.mktemp("runs")
    with start(f"--outdir={folder}", "--gpus=2", *TINY) as process:
        output = read_until(process, "tick 1")
        process.send_signal(signal.SIGTERM)
        output += process.stdout.read()
    assert process.returncode == 130, output
    return folder, output


def only_run(folder):
    (run_dir,) = folder.iterdir()
    return run_dir


def test_sigterm_to_the_parent_saves(stopped):
    folder, output = stopped
    assert re.search(r"Stopped at \S+ kimg; go on with --resume=", output)
    assert (only_run(folder) / "checkpoint.pt").exists()
    assert "Number of GPUs:    none (CPU, 2 processes)" in output


def test_another_number_of_processes_is_refused(stopped, monkeypatch):
    folder, _output = stopped
    args = [f"--outdir={folder}", "--resume=latest", "--dry-run"]

    def error(*more):
        result = CliRunner().invoke(train.build_command(), [*args, *more])
        assert result.exit_code == 2
        return result.output

    assert "the command says --gpus=1 (was 2); to start a new run" in error("--gpus=1")
    monkeypatch.setattr(distributed, "started_processes", lambda: 3)
    assert "goes on with the run's own number of processes, 2, but 3 have been started" in error()


def test_bad_environment_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(train.build_command(), [f"--outdir={tmp_path}", *TINY])
    assert result.exit_code == 1 and "Error: RANK and WORLD_SIZE are set" in result.output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_go_on_with_the_run_until_one_is_killed(stopped):
    """The second node prints and writes nothing; when it dies the first says so and ends."""
    folder, _output = stopped
    place = dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=free_port())
    args = [f"--outdir={folder}", "--resume=latest"]
    first, second = (start(*args, **place, RANK=str(rank)) for rank in range(2))
    with first, second:
        output = read_until(first, "tick ")
        second.kill()
        output += first.stdout.read()
        theirs = second.stdout.read()
    assert first.returncode == 1 and theirs == ""
    assert "Continuing at" in output and output.count("Training options:") == 1
    assert re.search(r"^Error: .* so process 0 ends, too; a training goes on .* with --resume=", output, re.M)
    only_run(folder)


def test_torchrun_goes_on_to_the_end(stopped):
    folder, _output = stopped
    options = only_run(folder) / "training_options.json"
    saved = json.loads(options.read_text())
    lines = (only_run(folder) / "stats.jsonl").read_text().splitlines()
    saved["total_kimg"] = json.loads(lines[-1])["Progress/kimg"]["mean"] + 0.03
    options.write_text(json.dumps(saved))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    with start(f"--outdir={folder}", "--resume=latest", module=torchrun) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert output.count("Exiting...") == output.count("Continuing at") == 1
    lines = (only_run(folder) / "stats.jsonl").read_text().splitlines()
    kimg = [json.loads(line)["Progress/kimg"]["mean"] for line in lines]
    assert kimg == sorted(set(kimg)) and list(only_run(folder).glob("network-snapshot-*.pkl"))
