# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile, for real targets, by the compilers that are at hand: NVRTC, nvcc, g++ for the bindings."""

import itertools
import re
import shutil
import subprocess
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

from torch_utils import custom_ops, nvrtc
from torch_utils.ops import bias_act, spatial_modulation, upfirdn2d

TARGETS = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WARNINGS = ["-std=c++17", "-Werror", "all-warnings", "-Xptxas", "--warning-as-error,-v"]


def record(recorder, dtypes, activations, layouts=(torch.contiguous_format, torch.channels_last)):
    """What the operations ask for, without tensors: [(file, kernel, macros)]."""
    options = {"device": "meta"}
    for dtype, layout in itertools.product(dtypes, layouts):
        x = torch.empty(2, 16, 32, 32, dtype=dtype, **options).contiguous(memory_format=layout)
        odd = torch.empty(2, 3, 33, 31, dtype=dtype, **options).contiguous(memory_format=layout)
        b = torch.empty(16, dtype=dtype, **options)
        for act, grad in itertools.product(activations, range(3)):
            bias_act.run_kernel(recorder, grad, x, b, x, x, x, 1, act, 0.2, 1.0, 1.0)
        for image, (f, factor, flip) in itertools.product(
            (x, odd), itertools.product((4, 12), (1, 2), (0, 1))
        ):
            sizes = [(f, f)] if f == 4 else [(1, f), (f, 1)]
            for size in sizes:
                taps = torch.empty(size, **options)
                for up, down, pad in ((factor, 1, f // 2), (1, factor, f // 2 - 1)):
                    upfirdn2d.run_kernel(
                        recorder, image, taps, up, up, down, down, pad, pad, pad, pad, flip, 1.0
                    )
        upfirdn2d.run_kernel(recorder, x, torch.empty(12, 12, **options), 1, 1, 1, 1, 9, 9, 9, 9, False, 1.0)
        for image in (x, odd):
            grids = [torch.empty(*image.shape[:2], n, n, **options) for n in (4, 16)]
            for count in (1, 2):
                spatial_modulation.run_modulate(recorder, image, *grids[:count])
            spatial_modulation.run_project(recorder, image, image, 4, 4)
    return sorted({launch[:3] for launch in recorder.launches})


@pytest.fixture
def some(recorder):
    """A few variants of each kernel."""
    variants = record(recorder, [torch.float16], ["lrelu", "swish"])
    return [one for _, group in itertools.groupby(variants, lambda v: v[1]) for one in list(group)[::6]]


@pytest.fixture
def every(recorder):
    return record(recorder, TYPES, list(bias_act.activation_funcs))


# --------------------------------------------------------------------------------------------------
# nvcc


def compile_together(file, variants, targets, folder):
    """All variants of one file in one run of nvcc, with warnings as errors. Returns what ptxas says of each."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    lines = ['#include "scalar.cuh"']
    for number, (_, name, defines) in enumerate(variants):
        macros = [*(define.split("=", 1) for define in defines), (name, f"{name}_{number}")]
        lines += [f"#define {key} {value}" for key, value in macros]
        lines += [f"namespace v{number} {{", f'#include "{file}"', "}"]
        lines += [f"#undef {key}" for key, _ in macros]
    source = folder / "together.cu"
    source.write_text("\n".join(lines))
    log = ""
    for target in targets:
        command = [nvcc, "-cubin", f"-arch={target}", *WARNINGS, f"-I{custom_ops.KERNELS}", str(source)]
        result = subprocess.run(
            [*command, "-o", str(folder / "out.cubin")], capture_output=True, text=True, cwd=folder
        )
        assert result.returncode == 0, result.stderr
        log += result.stderr
    compiled = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    assert len(set(compiled)) == len(variants) * len(targets)
    assert max(int(n) for n in re.findall(r"(\d+) bytes spill", log)) <= 32  # next to none
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", log)) <= 128


def by_file(variants):
    for file in sorted({variant[0] for variant in variants}):
        yield file, [variant for variant in variants if variant[0] == file]


def test_nvcc_takes_some(some, tmp_path):
    assert {name for _, name, _ in some} == {
        *("bias_act", "upfirdn2d_tile", "upfirdn2d_any", "modulate", "project"),
    }
    for file, variants in by_file(some):
        compile_together(file, variants, ["sm_80"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nvcc_takes_all(every, tmp_path, target):
    assert len(every) > 300
    for file, variants in by_file(every):
        compile_together(file, variants, [target], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["bias_act", "upfirdn2d"])
def test_plugins_compile(op, tmp_path):
    """The launchers by nvcc, the bindings by g++ (which builds no CUDA: their syntax and types only)."""
    nvcc, gxx = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or gxx is None:
        pytest.skip("needs nvcc and g++")
    source = str(custom_ops.KERNELS / f"{op}_plugin")
    gencodes = [f"-gencode=arch=compute_{t[3:]},code={t}" for t in TARGETS]
    output = ["-o", str(tmp_path / "out.o")]
    subprocess.run([nvcc, "-c", *gencodes, "-Werror", "all-warnings", source + ".cu", *output], check=True)
    folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    includes = [part for folder in folders for part in ("-isystem", folder)]
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        "-Wno-attributes",
        f"-DTORCH_EXTENSION_NAME={op}",
    ]
    subprocess.run([gxx, *flags, *includes, source + ".cpp"], check=True)


# --------------------------------------------------------------------------------------------------
# NVRTC


@pytest.fixture
def compiler():
    try:
        return nvrtc.Compiler()
    except OSError as error:
        pytest.skip(f"needs NVRTC (pip install nvidia-cuda-nvrtc): {error}")


def compile_one(compiler, variant, target):
    file, name, defines = variant
    options = tuple(f"-D{define}" for define in defines)
    image = compiler.compile(file, custom_ops.sources(file), options, target)
    if target.startswith("sm_"):
        assert image.startswith(b"\x7fELF") and name.encode() in image
    else:
        assert f".visible .entry {name}(".encode() in image


def test_nvrtc_takes_some(compiler, some):
    for variant in some[::2]:
        compile_one(compiler, variant, compiler.target((8, 0)))
        compile_one(compiler, variant, compiler.target((99, 0)))  # a device of the future gets PTX


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=str)
def test_nvrtc_takes_all(compiler, every, capability):
    for variant in every:
        compile_one(compiler, variant, compiler.target(capability))


def test_nvrtc_names_the_first_error(compiler):
    sources = {"broken.cu": "typedef int fine;\nquadruple x;\nalso y;"}
    with pytest.raises(RuntimeError, match=r'^broken.cu\(2\): error: identifier "quadruple" is undefined$'):
        compiler.compile("broken.cu", sources, (), compiler.target((8, 0)))
    with pytest.raises(RuntimeError, match="error.*unrecognized option|unknown-option"):
        compiler.compile("fine.cu", {"fine.cu": ""}, ("--unknown-option",), compiler.target((8, 0)))
