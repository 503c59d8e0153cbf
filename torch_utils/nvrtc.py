# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources at run time with NVRTC, the compiler library that PyTorch's CUDA builds bring along.

No compiler, header or toolkit need be installed. Results are kept on disk, in one file per variant that appears
complete or not at all: there is no lock that an interrupted process could leave behind.
"""

import ctypes
import ctypes.util
import hashlib
import os
import re
import sys
from pathlib import Path

import torch

import dnnlib
from dnnlib.util import open_atomic

_NAME = re.compile(r"libnvrtc(?:-[0-9a-f]+)?\.so(?:\.(\d+)[\d.]*)?|nvrtc64_(\d+)\d(?:_\d+)?\.dll")


def find_libraries(cuda_version: str | None = None, folders: list | None = None) -> list:
    """Paths of NVRTC libraries, best first: those of `cuda_version` (default: PyTorch's) before others.

    folders: where to look; default: beside PyTorch, in NVIDIA's wheels, in the environment, in a toolkit that
    CUDA_HOME or CUDA_PATH names. What the system's own search finds comes last.
    """
    major = (cuda_version or torch.version.cuda or "").split(".")[0]
    found = []
    for folder in _folders() if folders is None else folders:
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        matches = [(match, Path(folder) / match[0]) for name in names if (match := _NAME.fullmatch(name))]
        found += [(major not in (match[1], match[2]), path) for match, path in matches]
    paths = [str(path) for _, path in sorted(found, key=lambda item: item[0])]
    system = ctypes.util.find_library("nvrtc") if folders is None else None
    return [*paths, system] if system else paths


def _folders():
    packages = Path(torch.__file__).parents[1]
    nvidia = [path for part in ("lib", "bin") for path in sorted(packages.glob(f"nvidia/*/{part}"))]
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    inside = [Path(root) / part for root in toolkits for part in ("lib64", "lib", "bin")]
    own = [Path(sys.prefix) / "lib", Path(sys.prefix) / "Library" / "bin"]
    return [packages / "torch" / "lib", *nvidia, *own, *inside]


class Compiler:
    """An NVRTC library. Raises OSError where there is none that loads.

    version: (major, minor). architectures: numbers of the compute capabilities that it compiles for, e.g. 90.
    """

    def __init__(self, paths: list | None = None):
        self._library = _load(find_libraries() if paths is None else paths)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        self.architectures = list(numbers)

    def target(self, capability: tuple) -> str:
        """The architecture to compile for: 'sm_90' for a device of capability (9, 0) that this NVRTC knows; for
        a newer one the newest that it knows, in a form that the driver translates ('compute_90').
        RuntimeError for a device that it no longer knows."""
        number = capability[0] * 10 + capability[1]
        if number in self.architectures:
            return f"sm_{number}"
        older = [n for n in self.architectures if n < number]
        if not older:
            raise RuntimeError(
                f"NVRTC {self.version[0]}.{self.version[1]} does not compile for compute capability "
                f"{capability[0]}.{capability[1]}, only from {self.architectures[0] / 10} on"
            )
        return f"compute_{max(older)}"

    def compile(self, name: str, sources: dict, options: tuple, target: str) -> bytes:
        """Machine code (PTX for a 'compute_' target) of the file `name` in `sources` (file name -> text), whose
        other entries it may include. options: as on the command line. RuntimeError with the first error."""
        headers = [key for key in sources if key != name]
        texts = _strings([sources[key] for key in headers])
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), sources[name].encode(), name.encode(), len(headers), texts,
            _strings(headers),
        )  # fmt: skip
        try:
            options = [f"--gpu-architecture={target}", "--std=c++17", *options]
            if self._library.nvrtcCompileProgram(program, len(options), _strings(options)):
                log = self._output(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
                lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no message"]
                raise RuntimeError(next((line for line in lines if "error" in line), lines[0]))
            return self._output(program, "nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _output(self, program, getter):
        size = ctypes.c_size_t()
        self._call(getter + "Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(getter, program, buffer)
        return buffer.raw

    def _call(self, function, *args):
        status = getattr(self._library, function)(*args)
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")


def _load(paths):
    reason = "no NVRTC library was found beside PyTorch, in NVIDIA's packages or in CUDA_HOME"
    for path in paths:
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            reason = str(error)
    raise OSError(reason)


def _strings(texts):
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def build(compiler: Compiler, name: str, sources: dict, options: tuple, target: str) -> bytes:
    """Compiler.compile, or what an earlier call kept: in dnnlib's cache, below kernels/. A cache that cannot be
    written, and a file in it that is damaged, cost time and nothing else."""
    parts = [compiler.version, target, options, name, sorted(sources.items())]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    path = Path(dnnlib.make_cache_dir_path("kernels")) / f"{Path(name).stem}-{target}-{digest}.bin"
    image = _read(path)
    if image is None:
        image = compiler.compile(name, sources, options, target)
        _write(path, image)
    return image


def _read(path):
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, image = content[:32], content[32:]
    return image if hashlib.sha256(image).digest() == checksum else None


def _write(path, image):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            file.write(hashlib.sha256(image).digest() + image)
    except OSError:
        pass
