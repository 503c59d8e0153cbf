# SPDX-License-Identifier: Apache-2.0
"""torch_utils.peers: the place of a process, and what happens when another one fails, dies or hangs."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

import dnnlib
from torch_utils import distributed, peers

ROOT = os.path.dirname(os.path.dirname(dnnlib.__file__))
NODE = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1234")


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these of torchrun's variables."""

    def put(**values):
        for name in [*NODE, "LOCAL_WORLD_SIZE", "DNNLIB_PEER_TIMEOUT"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_places(environment):
    environment()
    assert peers.find_place() is None and distributed.started_processes() is None
    environment(RANK="3", MASTER_ADDR="x")  # stray variables of a cluster
    assert peers.find_place() is None
    environment(**NODE)
    assert peers.find_place() == peers.Place(1, 4, 1, 2, "localhost", 1234)
    environment(**NODE, LOCAL_WORLD_SIZE="3")
    assert peers.find_place().local_world_size == 3
    assert distributed.started_processes() == 4


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(LOCAL_RANK="", MASTER_PORT=""), "but LOCAL_RANK, MASTER_PORT must be set, too"),
        (dict(RANK="one"), "must be whole numbers .*'one'"),
        (dict(RANK="4"), "RANK=4, WORLD_SIZE=4, LOCAL_RANK=1: ranks count from 0"),
        (dict(LOCAL_RANK="-1"), "LOCAL_RANK=-1: ranks count from 0"),
    ],
)
def test_places_that_make_no_sense(environment, changes, message):
    environment(**{**NODE, **changes})
    with pytest.raises(peers.PeerError, match=message):
        peers.find_place()


def test_number_of_processes_is_that_of_torchrun(environment):
    environment(**NODE)
    assert distributed.choose_processes(None, "cpu") == distributed.choose_processes(4, "cpu") == (4, "cpu")
    with pytest.raises(ValueError, match="--gpus=3, but 4 processes have been started"):
        distributed.choose_processes(3, "cpu")
    with pytest.raises(ValueError, match="2 processes wanted, 4 have been started"):
        distributed.launch(print, 2)
    environment()
    assert distributed.choose_processes(None, "cpu") == (1, "cpu")
    assert distributed.choose_processes(3, "cpu") == (3, "cpu")


def test_patience(environment):
    environment()
    assert peers.patience() == peers.PEER_SECONDS
    environment(DNNLIB_PEER_TIMEOUT="2.5")
    assert peers.patience() == 2.5
    for text in ["soon", "0", "nan"]:
        environment(DNNLIB_PEER_TIMEOUT=text)
        with pytest.raises(peers.PeerError, match=f"DNNLIB_PEER_TIMEOUT={text} must be a number of seconds"):
            peers.patience()


def test_processes_that_do_not_come(environment, monkeypatch):
    monkeypatch.setattr(peers, "START_SECONDS", 1)
    environment(**{**NODE, "MASTER_PORT": str(free_port())})
    with pytest.raises(peers.PeerError, match=r"Process 1 cannot reach the others at localhost:\d+"):
        peers.Team(peers.find_place())


def test_the_watch_counts_signs_of_life():
    """A process that signs is alive, however slowly; one that stops is missed after so many rounds."""
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"alive/{rank}", "0")
    watch = peers.Watch(peers.Place(0, 3, 0, 3, "localhost", 1), store, seconds=7)
    for beat in range(3 * peers.ROUNDS):
        store.set("alive/1", str(beat))
        store.set("alive/2", str(beat // 5))
        assert watch.look() is None
    problems = []
    for beat in range(2 * peers.ROUNDS):
        store.set("alive/1", f"again {beat}")
        problems.append(watch.look())
    assert None in problems and problems[-1] == "process 2 has given no sign of life for 7 seconds"
    store.set("failed", "process 1 has failed (ValueError: no)")
    assert watch.look() == "process 1 has failed (ValueError: no)"


# --- real processes -----------------------------------------------------------------------------------------

WORKER = """\
import os, signal, sys, time
import torch
from torch_utils import distributed

def work(rank, how):
    print(f"process {rank}", distributed.broadcast_object(how), distributed.local_device("cpu"), flush=True)
    if rank == 1:
        if how == "raise":
            raise ValueError("bad luck")
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "fine":
        return rank
    for _ in range(3):
        distributed.barrier()

if __name__ == "__main__":
    how = sys.argv[1]
    if how == "nothing":  # what a dry run or a mistake in the command does
        with distributed.joined() as leads:
            distributed.follow() if not leads else sys.exit(5)
    try:
        print("result", distributed.launch(work, 2, (how if os.environ["RANK"] == "0" else None,), "cpu"))
    except distributed.PeerError as err:
        print("Lost:", err)
        sys.exit(4)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def two_nodes(command, **variables):
    """Starts the command as two nodes of one process each would be started."""
    common = dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS="1", **variables)
    common.update(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return [subprocess.Popen(command, env={**common, "RANK": str(rank)}, **pipes) for rank in range(2)]


@pytest.mark.parametrize(
    "how,codes,texts",
    [
        ("fine", (0, 0), ("process 0 fine cpu\nresult 0", "process 1 fine cpu\nresult 1")),
        ("nothing", (5, 5), ("", "")),
        ("raise", (4, 1), ("Lost: process 1 has failed (ValueError: bad luck), so process 0 ends, too", "bad luck")),
        ("kill", (4, -9), ("Lost: another process has gone", "process 1 kill")),
        ("exit", (4, 3), ("Lost: another process has gone", "process 1 exit")),
        ("stop", (1, None), ("Error: process 1 has given no sign of life for 2 seconds", None)),
    ],
)  # fmt: skip
def test_two_nodes(tmp_path, how, codes, texts):
    """All end in time, with what is known. A stopped process holds its connections: only the watch can tell."""
    (tmp_path / "worker.py").write_text(WORKER)
    nodes = two_nodes([sys.executable, str(tmp_path / "worker.py"), how], DNNLIB_PEER_TIMEOUT="2")
    try:
        for node, code, text in zip(nodes, codes, texts, strict=True):
            if code is None:
                continue
            output, _ = node.communicate(timeout=120)
            # whichever notices first, the watch or the connection, the process ends with a word about it
            assert node.returncode == code or (code == 4 and node.returncode == 1), output
            if node.returncode == code:
                assert text in output
            else:
                assert "Error: process 1 has" in output and "so process 0 ends, too" in output
    finally:
        for node in nodes:
            node.kill()
            node.communicate()


def test_signals_and_deaths_of_spawned_processes(tmp_path):
    """The waiting process passes SIGTERM on; no process is left over."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from torch_utils import distributed\n"
        "def work(rank):\n"
        "    got = []\n"
        "    signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "    distributed.barrier()\n"
        "    print('ready', os.getpid(), flush=True) if rank == 0 else None\n"
        "    while not distributed.any_rank(bool(got)):\n"
        "        pass\n"
        "    return 'saved'\n"
        "if __name__ == '__main__':\n"
        "    print(distributed.launch(work, 2, device_type='cpu'))\n"
    )
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen([sys.executable, str(script)], env=env, **pipes) as process:
        line = process.stdout.readline()
        assert line.startswith("ready"), line + process.stdout.read()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().strip() == "saved"
    assert process.returncode == 0
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{line.split()[1]}") and time.monotonic() < deadline:
        pass
    assert not os.path.exists(f"/proc/{line.split()[1]}")
