# SPDX-License-Identifier: Apache-2.0
"""Compiles C++ and CUDA sources at run time and loads them, once per process."""

import hashlib
import os
from pathlib import Path

import torch

verbosity = "brief"  # 'none', 'brief' (a line for each plug-in) or 'full' (the compiler's output too)

_loaded = {}  # name -> extension module
_failed = {}  # name -> one-line reason; a build that failed is not tried again


def get_plugin(module_name, sources, headers=None, source_dir=None, **build_kwargs):
    """Builds (or finds built) the extension `module_name` and returns the Python module.

    sources, headers: file names, relative to source_dir if that is given.
    build_kwargs: passed to torch.utils.cpp_extension.load, e.g. extra_cuda_cflags.
    The build lives under torch's extension directory (TORCH_EXTENSIONS_DIR) in a folder named after the
    content of the files, the options, PyTorch and the GPU, so that different versions never meet.
    Raises RuntimeError with the reason in one line; later calls raise it again without another try.
    """
    assert verbosity in ("none", "brief", "full"), f"verbosity is {verbosity!r}"
    if module_name in _loaded:
        return _loaded[module_name]
    if module_name in _failed:
        raise RuntimeError(_failed[module_name])
    _say(f'Setting up PyTorch plugin "{module_name}"...', end="\n" if verbosity == "full" else " ")
    try:
        _loaded[module_name] = _build(module_name, sources, headers or [], source_dir, build_kwargs)
    except Exception as error:
        _say("Failed!")
        _failed[module_name] = f'PyTorch plugin "{module_name}" is not available: {_reason(error)}'
        raise RuntimeError(_failed[module_name]) from error
    _say("Done.")
    return _loaded[module_name]


def _say(text, end="\n"):
    if verbosity != "none":
        print(text, end=end, flush=True)


def _build(module_name, sources, headers, source_dir, build_kwargs):
    from torch.utils import cpp_extension  # slow to import, and needed only here

    folder = Path(source_dir) if source_dir is not None else Path()
    sources = [(folder / name).resolve() for name in sources]
    headers = [(folder / name).resolve() for name in headers]
    build_dir = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    build_dir = build_dir / module_name / _fingerprint([*sources, *headers], build_kwargs)
    build_dir.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        name=module_name,
        sources=[str(path) for path in sources],
        build_directory=str(build_dir),
        verbose=verbosity == "full",
        **build_kwargs,
    )


def _fingerprint(paths, build_kwargs):
    """A short name for everything that the compiled result depends on."""
    digest = hashlib.sha256(repr(sorted(build_kwargs.items())).encode())
    digest.update(torch.__version__.encode())
    if torch.cuda.is_available():
        digest.update(torch.cuda.get_device_name().encode())
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _reason(error):
    """The line of an error that says most: the compiler's first error, else the first line there is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()]
    return (telling or lines or [type(error).__name__])[0]
