# SPDX-License-Identifier: Apache-2.0
"""`host_kernels`: the CUDA kernels' own sources, built by the host's C++ compiler and run on CPU tensors."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from torch_utils import cuda_driver, custom_ops

FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function", "-Wno-unused-variable"]
# Misaligned wide accesses and indices outside local arrays end the process instead of passing unseen.
FLAGS += ["-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]


class HostKernels(custom_ops.RuntimeKernels):
    """Takes launches as the CUDA backend does, packs their arguments as it does, and runs them on the host."""

    def __init__(self, folder):
        self.folder, self.built, self.launched = folder, {}, []

    def launch(self, file, name, defines, count, args, device):
        assert device.type == "cpu" and count > 0
        self.launched.append((name, dict(define.split("=") for define in defines)))
        act = next((int(define[4:]) for define in defines if define.startswith("ACT=")), 0)
        defines = tuple("ACT=host_act" if define.startswith("ACT=") else define for define in defines)
        library = self.built.get((name, defines)) or self.build(file, name, defines)
        held, params = cuda_driver.pack(args)
        library.launch(-(-count // cuda_driver.THREADS), cuda_driver.THREADS, params, act)
        del held

    def build(self, file, name, defines):
        target = self.folder / f"{name}{len(self.built)}.so"
        options = [f"-D{define}" for define in (*defines, f"KERNEL={name}", f'KERNEL_FILE="{file}"')]
        shim = Path(__file__).with_name("host_shim.h")
        command = [
            "g++",
            *FLAGS,
            *options,
            f"-I{custom_ops.KERNELS}",
            "-x",
            "c++",
            str(shim),
            "-o",
            str(target),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        self.built[name, defines] = ctypes.CDLL(str(target))
        return self.built[name, defines]


@pytest.fixture(scope="session")
def _host_builds(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++, to run the CUDA kernels' sources on the host")
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def host_kernels(_host_builds, monkeypatch):
    """The operations take CPU tensors for CUDA ones and run the kernels on the host. `launched` lists
    (kernel, macros)."""
    monkeypatch.setattr(custom_ops, "kernels", lambda x: _host_builds)
    _host_builds.launched.clear()
    return _host_builds


class Recorder(custom_ops.RuntimeKernels):
    """Takes launches and keeps them: (file, kernel, macros, number of threads, arguments)."""

    def __init__(self):
        self.launches = []

    def launch(self, file, name, defines, count, args, device):
        self.launches.append((file, name, defines, count, args))


@pytest.fixture
def recorder():
    return Recorder()
