# SPDX-License-Identifier: Apache-2.0
"""The proof that the kernels must give before they are used: it passes right ones, names wrong ones, and is kept."""

import json
from pathlib import Path

import pytest
import torch

from torch_utils import kernel_check


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A cache of its own and a CUDA device of a name; `calls` lists the checks that were run."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU of the test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return tmp_path


def test_right_kernels_pass(host_kernels):
    kernel_check.check("cpu", [torch.float32])  # one type: the host's compiler builds each
    used = {name for name, _defines in host_kernels.launched}
    assert {"bias_act", "upfirdn2d_any", "upfirdn2d_tile", "modulate", "project"} <= used


def test_wrong_kernels_are_named(host_kernels, monkeypatch):
    """A kernel that leaves its output as it is."""
    monkeypatch.setattr(host_kernels, "launch", lambda *_: None)
    with pytest.raises(RuntimeError, match="bias_act linear in torch.float32: off by"):
        kernel_check.check("cpu", [torch.float32])


def test_a_verdict_is_asked_for_once(gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(kernel_check, "_run", lambda title: calls.append(title))
    assert kernel_check.verdict("NVRTC") is None and kernel_check.verdict("NVRTC") is None
    assert kernel_check.verdict("plug-ins") is None and calls == ["NVRTC", "plug-ins"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "another GPU")
    kernel_check.verdict("NVRTC")
    assert calls == ["NVRTC", "plug-ins", "NVRTC"]


def test_a_bad_verdict_says_where_it_is_kept(gpu, monkeypatch):
    monkeypatch.setattr(kernel_check, "_run", lambda title: "the check failed: off by 1")
    for _ in range(2):
        reason = kernel_check.verdict("NVRTC")
        assert reason.startswith("the check failed: off by 1, see ")
    path = Path(reason.split(", see ")[1])
    assert json.loads(path.read_text())["reason"] == "the check failed: off by 1"
    path.write_text("{")  # a damaged file is no verdict
    monkeypatch.setattr(kernel_check, "_run", lambda title: None)
    assert kernel_check.verdict("NVRTC") is None


@pytest.mark.parametrize(
    "reason", ["the check failed: CUDA error: out of memory", "the check took more than 600 s"]
)
def test_what_may_be_over_the_next_time_is_not_kept(gpu, monkeypatch, reason):
    """A GPU that is full, or a machine so busy that the check took too long."""
    monkeypatch.setattr(kernel_check, "_run", lambda title: reason)
    assert kernel_check.verdict("NVRTC") == reason
    monkeypatch.setattr(kernel_check, "_run", lambda title: None)
    assert kernel_check.verdict("NVRTC") is None


def test_a_cache_that_cannot_be_written_is_no_obstacle(gpu, monkeypatch):
    (gpu / "file").touch()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(gpu / "file"))
    monkeypatch.setattr(kernel_check, "_run", lambda title: None)
    assert kernel_check.verdict("NVRTC") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where there is no CUDA device")
def test_a_check_that_ends_badly_is_a_reason(gpu):
    reason = kernel_check._run("NVRTC")
    assert reason.startswith("the check failed: ") and "\n" not in reason


def test_a_check_that_takes_too_long(gpu, monkeypatch):
    monkeypatch.setattr(kernel_check, "SECONDS", 0.01)
    assert kernel_check._run("NVRTC") == "the check took more than 0.01 s"
