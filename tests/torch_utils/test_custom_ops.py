# SPDX-License-Identifier: Apache-2.0
"""torch_utils.custom_ops: which implementation is chosen; building, caching and failing once."""

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import dnnlib
from torch_utils import custom_ops

SOURCE = """
#include <pybind11/pybind11.h>
#include "factor.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("scaled", [](double x) { return FACTOR * x; }); }
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setattr(custom_ops, "_loaded", {})
    monkeypatch.setattr(custom_ops, "_failed", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "build"))


@pytest.fixture
def attempts(monkeypatch):
    """Replaces the build; each attempt returns or raises the next item of this list."""
    outcomes = []

    def build(*_):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(custom_ops, "_build", build)
    return outcomes


def test_builds_a_plugin(tmp_path, capsys):
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    (tmp_path / "plugin.cpp").write_text(SOURCE)
    (tmp_path / "factor.h").write_text("#define FACTOR 2.5\n")
    files = {"sources": ["plugin.cpp"], "headers": ["factor.h"], "source_dir": str(tmp_path)}
    plugin = custom_ops.get_plugin("scale_plugin", **files, extra_cflags=["-O0"])
    assert plugin.scaled(4) == 10
    assert custom_ops.get_plugin("scale_plugin", **files, extra_cflags=["-O0"]) is plugin
    assert capsys.readouterr().out == 'Setting up PyTorch plugin "scale_plugin"... Done.\n'
    (folder,) = (tmp_path / "build" / "scale_plugin").iterdir()
    (kept,) = folder.iterdir()
    assert kept.name.startswith("scale_plugin") and kept.suffix == ".so"


def test_a_later_process_finds_the_plugin_and_waits_for_nobody(tmp_path, monkeypatch):
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    (tmp_path / "plugin.cpp").write_text(SOURCE)
    (tmp_path / "factor.h").write_text("#define FACTOR 3\n")
    files = {"sources": ["plugin.cpp"], "headers": ["factor.h"], "source_dir": str(tmp_path)}
    fingerprint = custom_ops._fingerprint([tmp_path / "plugin.cpp", tmp_path / "factor.h"], {})
    interrupted = tmp_path / "build" / "scale_plugin" / fingerprint
    (interrupted / "build-killed").mkdir(parents=True)
    (interrupted / "lock").touch()  # what PyTorch's own loader would wait for, for ever
    assert custom_ops.get_plugin("scale_plugin", **files).scaled(2) == 6
    custom_ops._loaded.clear()
    monkeypatch.setattr(cpp_extension, "load", lambda **_: pytest.fail("built again"))
    assert custom_ops.get_plugin("scale_plugin", **files).scaled(3) == 9


def test_a_failed_build_is_not_repeated(attempts, capsys):
    message = (
        "Error building extension 'bad': [1/2] c++ ...\n  bad.cpp:3:1: error: 'x' was not declared\nmore"
    )
    attempts.append(RuntimeError(message))
    expected = 'PyTorch plugin "bad" is not available: bad.cpp:3:1: error: .x. was not declared$'
    for _ in range(2):
        with pytest.raises(RuntimeError, match=expected):
            custom_ops.get_plugin("bad", ["bad.cpp"])
    assert capsys.readouterr().out == 'Setting up PyTorch plugin "bad"... Failed!\n'


def test_missing_source_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="No such file.*nowhere.cpp"):
        custom_ops.get_plugin("missing", ["nowhere.cpp"], source_dir=tmp_path)


def test_an_error_without_text_has_a_reason(attempts):
    attempts.append(KeyError())
    with pytest.raises(RuntimeError, match="not available: KeyError"):
        custom_ops.get_plugin("odd", [])


def test_verbosity(attempts, monkeypatch, capsys):
    assert custom_ops.verbosity == "brief"
    attempts.extend(["module a", "module b"])
    monkeypatch.setattr(custom_ops, "verbosity", "none")
    assert custom_ops.get_plugin("a", []) == "module a"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(custom_ops, "verbosity", "full")
    custom_ops.get_plugin("b", [])
    assert capsys.readouterr().out == 'Setting up PyTorch plugin "b"...\nDone.\n'
    monkeypatch.setattr(custom_ops, "verbosity", "loud")
    with pytest.raises(AssertionError, match="loud"):
        custom_ops.get_plugin("c", [])


def test_fingerprint_follows_content_and_options(tmp_path):
    path = tmp_path / "a.cpp"
    path.write_text("1")
    first = custom_ops._fingerprint([path], {"extra_cflags": ["-O2"]})
    assert custom_ops._fingerprint([path], {"extra_cflags": ["-O2"]}) == first
    assert custom_ops._fingerprint([path], {"extra_cflags": ["-O3"]}) != first
    path.write_text("2")
    assert custom_ops._fingerprint([path], {"extra_cflags": ["-O2"]}) != first


# --------------------------------------------------------------------------------------------------
# Selection


def backend(title, error=None):
    """A class of backends whose construction works, or fails as told; `made` counts the tries."""

    class Backend:
        made = 0

        def __init__(self):
            type(self).made += 1
            if error is not None:
                raise error

    Backend.title, Backend.description = title, f"by {title}"
    return Backend


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a CUDA device; `use` sets the two kinds of backends."""

    def use(runtime, plugins):
        monkeypatch.setattr(custom_ops, "RuntimeKernels", runtime)
        monkeypatch.setattr(custom_ops, "Plugins", plugins)
        monkeypatch.setattr(custom_ops, "_decision", None)

    monkeypatch.setattr(custom_ops, "_mode", "auto")
    monkeypatch.setattr(custom_ops, "_decision", None)
    monkeypatch.setattr(custom_ops, "_try_out", lambda _: None)
    monkeypatch.setattr(custom_ops, "_demand_proof", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    return use


TENSOR = SimpleNamespace(is_cuda=True, dtype=torch.float16)


def test_the_first_backend_that_works_is_used(cuda, capsys):
    works, fails = backend("first"), backend("second", RuntimeError("no compiler\nmore"))
    cuda(works, fails)
    assert isinstance(custom_ops.kernels(TENSOR), works)
    assert capsys.readouterr().out == "Operations: own CUDA kernels (by first)\n"
    assert custom_ops.kernels(TENSOR) is custom_ops.kernels(TENSOR)
    assert (works.made, fails.made) == (1, 0) and capsys.readouterr().out == ""
    cuda(fails, works)
    assert isinstance(custom_ops.kernels(TENSOR), works)
    assert custom_ops.status() == "Operations: own CUDA kernels (by first; second: no compiler)"


def test_without_a_backend_the_reference_path_is_used_and_nothing_tried_again(cuda, capsys):
    first, second = backend("NVRTC", OSError("not found")), backend("plug-ins", KeyError())
    cuda(first, second)
    for _ in range(3):
        assert custom_ops.kernels(TENSOR) is None
    line = "Operations: reference path (NVRTC: not found; plug-ins: KeyError)"
    assert capsys.readouterr().out == line + "\n" and custom_ops.status() == line
    assert (first.made, second.made) == (1, 1)


def test_a_backend_that_gives_wrong_numbers_is_not_used(cuda, monkeypatch):
    cuda(backend("first"), backend("second"))

    def try_out(made):
        if made.title == "first":
            raise RuntimeError("a first run gave wrong numbers")

    monkeypatch.setattr(custom_ops, "_try_out", try_out)
    assert custom_ops.status() == (
        "Operations: own CUDA kernels (by second; first: a first run gave wrong numbers)"
    )


def test_a_backend_without_proof_is_not_used_unless_asked_for(cuda, monkeypatch):
    cuda(backend("first"), backend("second"))

    def demand(title):
        if title == "first":
            raise RuntimeError("the check failed: off by 1")

    monkeypatch.setattr(custom_ops, "_demand_proof", demand)
    assert (
        custom_ops.status() == "Operations: own CUDA kernels (by second; first: the check failed: off by 1)"
    )
    custom_ops.select("cuda")
    assert custom_ops.status() == "Operations: own CUDA kernels (by first)"


def test_the_first_run(host_kernels, recorder):
    custom_ops._try_out(host_kernels, "cpu")
    with pytest.raises(RuntimeError, match="a first run gave wrong numbers"):
        custom_ops._try_out(recorder, "cpu")


def test_reference_as_asked(cuda):
    works = backend("first")
    cuda(works, works)
    custom_ops.select("reference")
    assert custom_ops.kernels(TENSOR) is None and works.made == 0
    assert custom_ops.status() == "Operations: reference path (as asked)"
    custom_ops.select("auto")
    assert isinstance(custom_ops.kernels(TENSOR), works)


def test_cuda_as_asked(cuda, monkeypatch):
    works, fails = backend("first"), backend("second", RuntimeError("no compiler"))
    cuda(works, works)
    custom_ops.select("cuda")
    assert works.made == 1 and custom_ops.status() == "Operations: own CUDA kernels (by first)"
    cuda(fails, fails)
    message = (
        r"^the CUDA kernels cannot be used \(second: no compiler; second: no compiler\); ops 'auto' goes on"
    )
    with pytest.raises(RuntimeError, match=message):
        custom_ops.select("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"cannot be used \(no CUDA device\)"):
        custom_ops.select("cuda")


def test_machines_without_cuda(cuda, monkeypatch):
    cuda(backend("first"), backend("second"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert custom_ops.status() == "Operations: reference path (PyTorch for ROCm)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    custom_ops.select("auto")
    assert custom_ops.status() == "Operations: reference path (no CUDA device)"


def test_unknown_mode():
    with pytest.raises(ValueError, match="^ops is 'fast'; accepted: auto, reference, cuda$"):
        custom_ops.select("fast")


def test_other_ranks_are_silent(cuda, monkeypatch, capsys):
    cuda(backend("first"), backend("second"))
    monkeypatch.setattr(custom_ops, "verbosity", "none")
    assert custom_ops.kernels(TENSOR)
    assert capsys.readouterr().out == ""


def test_tensors_that_are_left_to_the_reference_path(cuda, monkeypatch):
    works = backend("first")
    cuda(works, works)
    assert custom_ops.kernels(torch.zeros(1)) is None
    assert custom_ops.kernels(SimpleNamespace(is_cuda=True, dtype=torch.int32)) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert custom_ops.kernels(TENSOR) is None
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert custom_ops.kernels(TENSOR) is None
    assert works.made == 0  # and nothing was decided for them


def test_plugins_need_a_toolkit(monkeypatch, capsys):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(RuntimeError, match=r"no CUDA toolkit \(CUDA_HOME\) to build them with"):
        custom_ops.Plugins()
    assert capsys.readouterr().out == ""  # not even tried


def test_plugins_are_the_familys(monkeypatch):
    asked = []

    def build(name, sources, headers, source_dir, kwargs):
        assert all((source_dir / file).is_file() for file in [*sources, *headers])
        asked.append(name)
        return SimpleNamespace(**{name.removesuffix("_plugin"): f"the function of {name}"})

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/somewhere")
    monkeypatch.setattr(custom_ops, "_build", build)
    plugins = custom_ops.Plugins()
    assert asked == ["bias_act_plugin", "upfirdn2d_plugin"]
    assert plugins.upfirdn2d == "the function of upfirdn2d_plugin"


def test_a_variant_is_built_once_for_each_device(monkeypatch, tmp_path):
    backend = object.__new__(custom_ops.RuntimeKernels)
    compiled, launched = [], []

    def compile(name, sources, options, target):
        assert "scalar.cuh" in sources and "__global__" in sources[name]
        compiled.append((name, options, target))
        return b"image for " + target.encode()

    backend._compiler = SimpleNamespace(
        version=(12, 9), compile=compile, target=lambda capability: f"sm_{capability[0]}{capability[1]}"
    )
    backend._driver = SimpleNamespace(
        function=lambda image, name, device: (image, name, device), launch=lambda *args: launched.append(args)
    )
    backend._functions = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 0), (9, 0)][device])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    dnnlib.util.set_cache_dir(str(tmp_path))
    try:
        for device in (0, 1, 0):
            place = torch.device("cuda", device)
            backend.launch("bias_act.cu", "bias_act", ("ACT=1", "INDEX=unsigned int"), 10, (1, 2.0), place)
    finally:
        dnnlib.util.set_cache_dir(None)
    options = ("-DACT=1", "-DINDEX=unsigned int")
    assert compiled == [("bias_act.cu", options, "sm_80"), ("bias_act.cu", options, "sm_90")]
    assert [args[0] for args in launched] == [
        (b"image for sm_80", "bias_act", 0),
        (b"image for sm_90", "bias_act", 1),
        (b"image for sm_80", "bias_act", 0),
    ]
    assert launched[1][1:] == (10, (1, 2.0), 1, 77)


def test_threads_decide_once(cuda):
    works = backend("first")
    cuda(works, works)
    found = []
    threads = [threading.Thread(target=lambda: found.append(custom_ops.kernels(TENSOR))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert works.made == 1 and len(found) == 8 and len(set(map(id, found))) == 1
