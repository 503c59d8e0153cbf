# SPDX-License-Identifier: Apache-2.0
"""python -m ssn_ext.sweep with the true train.py and calc_metrics.py; the processes that it starts and ends."""

import importlib
import json
import os
import re
import signal
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from ssn_ext import metric
from ssn_ext.sweep import plan, work
from ssn_ext.sweep.__main__ import main
from torch_utils import training_stats
from training import training_loop
from training.snapshot import load_network_pkl

OPTIONS = """
    --batch=100 --workers=0 --set=G_kwargs.synthesis_kwargs.channel_max=8 --set=D_kwargs.channel_max=8
    --set=D_kwargs.epilogue_kwargs.mbstd_group_size=2 --aug=noaug
"""


@pytest.fixture
def in_process(monkeypatch):
    """The scripts run in this process, one at a time; the list of their names."""
    names = []

    def run(processes, script, args, log, env):
        if processes.stopped:
            raise work.Stopped
        names.append(script)
        training_stats.load_state_dict({})  # as in a process of its own
        module = importlib.import_module(script.removesuffix(".py"))
        command = module.build_command() if hasattr(module, "build_command") else module.calc_metrics
        result = CliRunner().invoke(command, args)
        with open(log, "a", encoding="utf-8") as f:
            f.write(result.output)
        return result.exit_code

    monkeypatch.setattr(work.Processes, "run", run)
    monkeypatch.setattr(metric, "NUM_LATENTS", 8)
    return names


def test_a_sweep_stopped_and_continued_equals_one_that_was_not(in_process, tmp_path, monkeypatch):
    """Trained, measured, stopped half-way and continued; the weights equal those of a run without a stop."""
    data = tmp_path / "ds"
    data.mkdir()
    rnd = np.random.RandomState(0)
    for i in range(8):
        PIL.Image.fromarray(rnd.randint(256, size=[8, 8, 3], dtype=np.uint8)).save(data / f"{i}.png")

    def sweep(outdir, *args):
        given = [f"--outdir={tmp_path / outdir}", f"--data={data}", "--gpus=0", "--kimg=1", "--base-kimg=1"]
        given += [
            "--metrics=ldbr_dist",
            "--metric-seeds=4,5",
            f"--options={OPTIONS}",
            "--images-per-second=50",
            *args,
        ]
        return CliRunner().invoke(main, given)

    result = sweep("a", "--lambda-d=3", "--dry-run")
    assert result.exit_code == 0 and in_process == ["train.py", "train.py"] and not (tmp_path / "a").exists()

    result = sweep("a", "--lambda-d=3")
    assert result.exit_code == 0, result.output
    (run_dir,) = (tmp_path / "a" / "lambda3-seed1").glob("0*")
    assert re.search(r"\| lambda3 \| 3 \| 1 \| 1 \| [0-9.]+ \| [0-9.]+ \+- [0-9.]+ \|", result.output)
    lines = [json.loads(line) for line in (run_dir / "metric-ldbr_dist.jsonl").read_text().splitlines()]
    assert [line["details"]["seed"] for line in lines] == [4, 5]
    options = json.loads((run_dir / "training_options.json").read_text())
    assert (
        options["loss_kwargs"]["lambda_d"] == 3
        and options["random_seed"] == 1
        and options["batch_size"] == 100
    )
    (base,) = (tmp_path / "a" / "base").glob("0*/network-snapshot-000001.pkl")
    assert options["resume_pkl"] == str(base)

    in_process.clear()
    assert sweep("a", "--lambda-d=3").exit_code == 0 and in_process == []

    # the same from the same base, stopped half-way
    asked = training_loop.Run.must_stop
    monkeypatch.setattr(
        training_loop.Run, "must_stop", lambda run: run.counters.nimg == 500 and "lambda3" in run.c.run_dir
    )
    result = sweep("b", "--lambda-d=3", f"--base={base}")
    assert result.exit_code == 1 and "lambda3-seed1: train.py: Stopped at 0.5 kimg" in result.output
    monkeypatch.setattr(training_loop.Run, "must_stop", asked)
    result = sweep("b", "--lambda-d=3", f"--base={base}")
    assert result.exit_code == 0 and "lambda3-seed1: going on\n" in result.output, result.output
    (again,) = (tmp_path / "b" / "lambda3-seed1").glob("0*")
    networks = [load_network_pkl(path / "network-snapshot-000001.pkl")["G_ema"] for path in (run_dir, again)]
    first, second = (dict(each.named_parameters()) for each in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


SCRIPT = """
import os, signal, sys
if sys.argv[1] == "fail":
    print("some", os.environ["OMP_NUM_THREADS"])
    sys.exit(3)
def save(number, frame):
    print("saved", flush=True)
    os._exit(130)
signal.signal(signal.SIGTERM, save)
with open(sys.argv[1], "w") as ready:
    ready.write("ready")
while True:
    signal.pause()
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_processes_are_asked_to_save(tmp_path, monkeypatch):
    """Two trainings side by side; SIGTERM to the sweep reaches both, and nothing more begins."""
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(work, "ROOT", tmp_path)
    processes, found, said = work.Processes(), {}, []
    log, env = str(tmp_path / "log"), {"OMP_NUM_THREADS": "2"}
    assert processes.run("train.py", ["fail"], log, env) == 3
    assert (tmp_path / "log").read_text() == "some 2\n"

    def train(name):
        found[name] = processes.run("train.py", [str(tmp_path / name)], str(tmp_path / f"{name}.log"), env)

    threads = [threading.Thread(target=train, args=[name]) for name in "ab"]
    for name in "ab":
        os.mkfifo(tmp_path / name)
    old = signal.getsignal(signal.SIGTERM)
    with work.stop_on_signals(processes, said.append):
        for thread in threads:
            thread.start()
        for name in "ab":
            assert (tmp_path / name).read_text() == "ready"  # waits for the process
        os.kill(os.getpid(), signal.SIGTERM)
        for thread in threads:
            thread.join()
    assert signal.getsignal(signal.SIGTERM) == old
    assert found == {"a": 130, "b": 130} and (tmp_path / "a.log").read_text() == "saved\n"
    assert said == ["SIGTERM: trainings finish their step and save; once more ends them at once."]
    with pytest.raises(work.Stopped):
        processes.run("train.py", ["fail"], log, env)


def test_jobs_run_side_by_side(tmp_path, monkeypatch):
    """With --jobs=2 both trainings are under way at once: each waits for the other."""
    base = tmp_path / "network-snapshot-000001.pkl"
    base.write_text("")
    s = plan.Settings(
        outdir=str(tmp_path), data="demo", base=str(base), base_kimg=1, cfg="laptop", kimg=1, lambdas=(1.0,),
        variants={}, options=(), train_seeds=(1,), metrics=(), metric_seeds=(0,), detector=None, gpus=0, jobs=2,
        threads=1, devices=("0", "1"),
    )  # fmt: skip
    meet, devices = threading.Barrier(2, timeout=60), []

    def run(_processes, _script, args, log, env):
        open(log, "w").close()
        meet.wait()
        devices.append(env["CUDA_VISIBLE_DEVICES"])
        return 1

    monkeypatch.setattr(work.Processes, "run", run)
    failures = work.Sweep(s, *plan.make_runs(s), work.Processes(), lambda text: None).do()
    assert len(failures) == 2 and sorted(devices) == ["0", "1"]
