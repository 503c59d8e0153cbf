# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operations is in use: own CUDA kernels, or PyTorch's operations (the reference path).

The kernels (ops/kernels/) come into use at the first CUDA tensor, in one of two ways, tried in this order:
compiled at run time by NVRTC (no compiler needed), or as plug-ins built with ninja and nvcc. Where neither works,
or there is no CUDA device, the reference path is complete. The decision is made once per process and said in one
line; nothing is built at import, and nothing that failed is tried again.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch.autograd import forward_ad

from torch_utils import nvrtc
from torch_utils.cuda_driver import Driver

verbosity = "brief"  # 'none', 'brief' (a line for each plug-in) or 'full' (the compiler's output too)

MODES = ("auto", "reference", "cuda")
KERNELS = Path(__file__).parent / "ops" / "kernels"
DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float",
    torch.float64: "double",
}

_lock = threading.RLock()
_mode = "auto"
_decision = None  # (backend or None, the reason in one line)

# --------------------------------------------------------------------------------------------------
# Selection


def select(mode: str) -> None:
    """'auto': kernels where they work, else the reference path; 'reference'; 'cuda': kernels or an error.

    ValueError for another mode. 'cuda' decides at once and raises RuntimeError with the reason in one line
    where the kernels cannot be used; the other modes decide at the first CUDA tensor.
    """
    global _mode, _decision
    if mode not in MODES:
        raise ValueError(f"ops is {mode!r}; accepted: {', '.join(MODES)}")
    with _lock:
        _mode, _decision = mode, None
        if mode == "cuda":
            _decide()


@contextlib.contextmanager
def reference_only():
    """Context in which everything runs on PyTorch's own operations, whatever was selected."""
    global _mode, _decision
    with _lock:
        before = _mode, _decision
        _mode, _decision = "reference", (None, "as asked")
    try:
        yield
    finally:
        with _lock:
            _mode, _decision = before


def is_reference() -> bool:
    """Whether PyTorch's own operations are asked for everywhere (`select("reference")`)."""
    return _mode == "reference"


def is_recorded() -> bool:
    """Whether torch.jit.trace or torch.export records a graph: what is chosen by the sizes of its tensors would hold
    for these sizes alone."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_watched(x: torch.Tensor) -> bool:
    """Whether somebody looks on who expects PyTorch's own operations, with all that is registered for them: a tracer
    or compiler, autocast on a CPU, torch.func, forward-mode derivatives, a tensor subclass as x."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0 or _transforms() is not None


_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


def status() -> str:
    """One line for the log: which implementation is in use, and why. Makes the decision if it is still open."""
    with _lock:
        backend, reason = _decision or _decide()
    return f"Operations: {'own CUDA kernels' if backend else 'reference path'} ({reason})"


def kernels(x: torch.Tensor):
    """The backend that runs own kernels on x (`RuntimeKernels` or `Plugins`), or None for the reference path.

    None on other devices than CUDA, for other types than `DTYPES`, and while a graph is traced or compiled.
    """
    if not x.is_cuda or x.dtype not in DTYPES or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if _decision is None:
        with _lock:
            if _decision is None:
                _decide()
                _say(status())
    return _decision[0]


def _decide():
    global _decision
    _decision = _choose()
    if _mode == "cuda" and _decision[0] is None:
        reason, _decision = _decision[1], None
        raise RuntimeError(f"the CUDA kernels cannot be used ({reason}); ops 'auto' goes on without them")
    return _decision


def _choose():
    if _mode == "reference":
        return None, "as asked"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    if torch.version.hip:
        return None, "PyTorch for ROCm"
    reasons = []
    for make in (RuntimeKernels, Plugins):
        try:
            backend = make()
            if _mode == "auto":
                _demand_proof(make.title)
            _try_out(backend)
            return backend, "; ".join([backend.description, *reasons])
        except Exception as error:
            reasons.append(f"{make.title}: {_reason(error)}")
    return None, "; ".join(reasons)


def use(title: str) -> None:
    """Uses the kernels of one way, 'NVRTC' or 'plug-ins', unproved: for the proof itself."""
    global _decision
    (make,) = (make for make in (RuntimeKernels, Plugins) if make.title == title)
    with _lock:
        _decision = (make(), "being checked")


def _demand_proof(title):
    """RuntimeError unless another process has found the kernels right on this GPU, now or earlier."""
    from torch_utils import kernel_check

    reason = kernel_check.verdict(title)
    if reason is not None:
        raise RuntimeError(reason)


def _try_out(backend, device="cuda"):
    """A first, tiny run whose result is known; an exception if it goes wrong."""
    from torch_utils.ops import bias_act

    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 9.0], device=device)
    y = bias_act.run_kernel(backend, 0, x, None, None, None, None, 0, "lrelu", 0.5, 2.0, 10.0)
    if y.tolist() != [-2.0, -1.0, 0.0, 2.0, 4.0, 10.0]:
        raise RuntimeError(f"a first run gave wrong numbers: {y.tolist()}")


class RuntimeKernels:
    """Kernels compiled by NVRTC, one variant at a time, and launched through the driver."""

    title = "NVRTC"

    def __init__(self):
        self._compiler, self._driver = nvrtc.Compiler(), Driver()
        self._functions = {}
        version = ".".join(str(n) for n in self._compiler.version)
        target = self._compiler.target(torch.cuda.get_device_capability())
        self.description = f"compiled at run time by NVRTC {version} for {target}"

    def launch(self, file: str, name: str, defines: tuple, count: int, args: tuple, device) -> None:
        """Runs `count` threads of the kernel `name` from ops/kernels/`file`, compiled with the macros `defines`
        ('NAME=value'), on the device's current stream. args: see Driver.launch."""
        key = name, defines, device.index
        function = self._functions.get(key)
        if function is None:
            with _lock:
                function = self._functions.get(key) or self._build(file, name, defines, device.index)
                self._functions[key] = function
        stream = torch.cuda.current_stream(device).cuda_stream
        self._driver.launch(function, count, args, device.index, stream)

    def _build(self, file, name, defines, device):
        target = self._compiler.target(torch.cuda.get_device_capability(device))
        options = tuple(f"-D{define}" for define in defines)
        image = nvrtc.build(self._compiler, file, sources(file), options, target)
        return self._driver.function(image, name, device)


class Plugins:
    """The family's plug-ins `bias_act_plugin` and `upfirdn2d_plugin`, built with ninja from the same sources."""

    title = "plug-ins"
    description = "plug-ins built with ninja"

    def __init__(self):
        from torch.utils import cpp_extension  # slow to import, and needed only here

        if cpp_extension.CUDA_HOME is None:
            raise RuntimeError("no CUDA toolkit (CUDA_HOME) to build them with")
        self.bias_act = _kernel_plugin("bias_act").bias_act
        self.upfirdn2d = _kernel_plugin("upfirdn2d").upfirdn2d


def _kernel_plugin(op):
    files = [f"{op}_plugin.cpp", f"{op}_plugin.cu"]
    return get_plugin(
        f"{op}_plugin", files, headers=[f"{op}.cu", "scalar.cuh", "plugin.h"], source_dir=KERNELS
    )


@functools.cache
def sources(file: str) -> dict:
    """File name -> text of a kernel and of what it includes."""
    return {name: (KERNELS / name).read_text(encoding="utf-8") for name in (file, "scalar.cuh")}


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether all start at a multiple of 16 bytes, as wide memory accesses need."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


# --------------------------------------------------------------------------------------------------
# Plug-ins

_loaded = {}  # name -> extension module
_failed = {}  # name -> one-line reason; a build that failed is not tried again


def get_plugin(module_name, sources, headers=None, source_dir=None, **build_kwargs):
    """Builds (or finds built) the extension `module_name` and returns the Python module.

    sources, headers: file names, relative to source_dir if that is given.
    build_kwargs: passed to torch.utils.cpp_extension.load, e.g. extra_cuda_cflags.
    The result lives under torch's extension directory (TORCH_EXTENSIONS_DIR) in a folder named after the
    content of the files, the options, PyTorch and the GPU, so that different versions never meet. Each process
    builds in a folder of its own and moves the result there in one step: a build that was interrupted, or runs
    beside this one, is never waited for.
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
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    kept = root / module_name / _fingerprint([*sources, *headers], build_kwargs)
    for path in kept.glob(f"{module_name}*"):
        return _import(path)
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix="build-", ignore_cleanup_errors=True) as draft:
        plugin = cpp_extension.load(
            name=module_name,
            sources=[str(path) for path in sources],
            build_directory=draft,
            verbose=verbosity == "full",
            **build_kwargs,
        )
        built = Path(plugin.__file__)
        with contextlib.suppress(OSError):  # kept for later processes; this one has it
            copy = shutil.copy(built, Path(draft) / "finished")
            os.replace(copy, kept / built.name)
    return plugin


def _import(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    return plugin


def _fingerprint(paths, build_kwargs):
    """A short name for everything that the compiled result depends on."""
    digest = hashlib.sha256(repr(sorted(build_kwargs.items())).encode())
    digest.update(f"{torch.__version__} {sys.implementation.cache_tag}".encode())
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
