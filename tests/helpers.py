# SPDX-License-Identifier: Apache-2.0
"""What several test files need and no fixture is."""

import contextlib
import os
import signal
import subprocess
import sys

import torch

import dnnlib
from training.loss import Batch


def run_worker(folder, source, seconds):
    """Runs `source` with `folder` as its argument, a thread a process, in a session of its own that ends when the
    seconds are over: a hang is a failure."""
    (folder / "worker.py").write_text(source)
    root = os.path.dirname(os.path.dirname(dnnlib.__file__))
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "worker.py"), str(folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it and its children
            raise
    assert process.returncode == 0, output


@contextlib.contextmanager
def other_process_locks(path):
    """Another process holds the lock of a file."""
    source = (
        "import sys; from dnnlib.util import file_lock\n"
        "with file_lock(sys.argv[1]) as free: print(free, flush=True); sys.stdin.read()"
    )
    root = os.path.dirname(os.path.dirname(dnnlib.__file__))
    command = [sys.executable, "-c", source, str(path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        assert process.stdout.readline() == "True\n"
        yield
        process.stdin.close()


def overflow_and_recover(penalty, mean, G):
    """One penalty of path lengths that overflows leaves their running mean, mean(), as it was, and it goes on."""
    batch = Batch(real_img=None, real_c=None, gen_z=torch.randn(4, G.z_dim), gen_c=torch.zeros(4, 0))
    assert penalty(batch).isfinite().all()
    before, weight = mean(), G.synthesis.b8.torgb.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    assert not penalty(batch).isfinite().any() and torch.equal(mean(), before)
    with torch.no_grad():
        weight.copy_(whole)
    assert penalty(batch).isfinite().all() and mean().isfinite() and mean() != before


def assert_equal_states(a, b, path=""):
    """Nested containers equal bit for bit, but for times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "seconds" and not str(key).startswith(("Timing/", "Resources/")):
                assert_equal_states(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path
