# SPDX-License-Identifier: Apache-2.0
"""torch_utils.nvrtc without the library: where it is looked for, what is kept, what a device gets."""

import pytest

import dnnlib
from torch_utils import nvrtc

NAMES = [
    *("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc-672ee683.so.11.2", "nvrtc64_120_0.dll", "libnvrtc.so"),
    *("libnvrtc-builtins.so.12.9", "libnvrtc.alt.so.12", "nvrtc-builtins64_129.dll", "nvrtc64_120_0.alt.dll"),
]


def test_libraries_of_pytorchs_version_come_first(tmp_path):
    for name in NAMES:
        (tmp_path / name).touch()
    folders = [str(tmp_path / "missing"), str(tmp_path)]
    found = {
        version: [path.rsplit("/", 1)[-1] for path in nvrtc.find_libraries(version, folders)]
        for version in ("11.8", "12.8", "13.0")
    }
    assert all(sorted(names) == sorted(NAMES[:5]) for names in found.values())  # not the compiler's helpers
    assert found["11.8"][0] == "libnvrtc-672ee683.so.11.2"
    assert found["12.8"][:2] == ["libnvrtc.so.12", "nvrtc64_120_0.dll"]
    assert found["13.0"][0] == "libnvrtc.so.13"


def test_folders_are_those_of_pytorch_the_environment_and_the_toolkit(tmp_path, monkeypatch):
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvrtc.so.12").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(tmp_path / "lib64" / "libnvrtc.so.12") in nvrtc.find_libraries("12.8")
    assert any(str(folder).endswith("torch/lib") for folder in nvrtc._folders())


def test_no_library(tmp_path):
    with pytest.raises(OSError, match="no NVRTC library was found beside PyTorch"):
        nvrtc.Compiler([])
    broken = tmp_path / "libnvrtc.so.12"
    broken.write_text("not a library")
    with pytest.raises(OSError, match=r"libnvrtc\.so\.12"):
        nvrtc.Compiler([str(broken)])


class FakeCompiler(nvrtc.Compiler):
    """Compiles nothing; the image tells what it was made of."""

    def __init__(self, version=(12, 9), architectures=(75, 80, 90)):
        self.version, self.architectures, self.compiled = version, list(architectures), 0

    def compile(self, name, sources, options, target):
        self.compiled += 1
        return repr((name, sources, options, target)).encode()


def test_target():
    compiler = FakeCompiler()
    assert compiler.target((8, 0)) == "sm_80"
    assert compiler.target((8, 6)) == "compute_80"
    assert compiler.target((12, 1)) == "compute_90"
    with pytest.raises(
        RuntimeError, match="NVRTC 12.9 does not compile for compute capability 6.1, only from 7.5 on"
    ):
        compiler.target((6, 1))


@pytest.fixture
def cache(tmp_path):
    dnnlib.util.set_cache_dir(str(tmp_path / "cache"))
    yield tmp_path / "cache" / "kernels"
    dnnlib.util.set_cache_dir(None)


SOURCES = {"a.cu": "one", "a.cuh": "two"}


def test_what_was_compiled_is_kept(cache):
    compiler = FakeCompiler()
    image = nvrtc.build(compiler, "a.cu", SOURCES, ("-DX=1",), "sm_80")
    assert nvrtc.build(FakeCompiler(), "a.cu", dict(SOURCES), ("-DX=1",), "sm_80") == image
    assert nvrtc.build(compiler, "a.cu", SOURCES, ("-DX=1",), "sm_80") == image
    assert compiler.compiled == 1
    (file,) = cache.iterdir()
    assert file.name.startswith("a-sm_80-")


@pytest.mark.parametrize(
    "change",
    [
        {"options": ("-DX=2",)},
        {"target": "sm_90"},
        {"sources": {**SOURCES, "a.cuh": "three"}},
        {"compiler": FakeCompiler(version=(13, 0))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_result_depends_on_is_in_its_name(cache, change):
    arguments = {
        "compiler": FakeCompiler(),
        "name": "a.cu",
        "sources": SOURCES,
        "options": (),
        "target": "sm_80",
    }
    nvrtc.build(**arguments)
    changed = {**arguments, **change}
    before = changed["compiler"].compiled
    nvrtc.build(**changed)
    assert changed["compiler"].compiled == before + 1
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_damaged_file_is_replaced(cache, damage):
    compiler = FakeCompiler()
    image = nvrtc.build(compiler, "a.cu", SOURCES, (), "sm_80")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert nvrtc.build(compiler, "a.cu", SOURCES, (), "sm_80") == image
    assert compiler.compiled == 2 and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    dnnlib.util.set_cache_dir(str(tmp_path / "file"))
    try:
        assert nvrtc.build(FakeCompiler(), "a.cu", SOURCES, (), "sm_80")
    finally:
        dnnlib.util.set_cache_dir(None)


def test_a_failed_compilation_leaves_nothing(cache):
    compiler = FakeCompiler()
    compiler.compile = lambda *_: (_ for _ in ()).throw(RuntimeError("a.cu(1): error: no"))
    with pytest.raises(RuntimeError, match="error: no"):
        nvrtc.build(compiler, "a.cu", SOURCES, (), "sm_80")
    assert not cache.exists()
