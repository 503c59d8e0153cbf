# SPDX-License-Identifier: Apache-2.0
"""torch_utils.custom_ops: building, caching and failing once."""

import shutil

import pytest

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
    assert list(folder.glob("scale_plugin*.so"))


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
