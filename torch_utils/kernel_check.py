# SPDX-License-Identifier: Apache-2.0
"""A proof of the CUDA kernels on the GPU at hand, in a process of its own, once per machine and version.

A kernel that goes wrong can end every later use of the GPU in its process. So before 'auto' uses them, another process
runs each of them in the types and layouts that networks use, with two derivatives, and compares with the reference
path. The verdict is kept in the cache, beside the compiled kernels.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch

import dnnlib
from dnnlib.util import open_atomic

SECONDS = 600  # for all compilations and runs
PASSING = ["out of memory", "busy or unavailable", "the check took", "the check could not be run"]
ROOT = Path(__file__).parents[1]


def verdict(title: str) -> str | None:
    """None if the kernels of this way ('NVRTC' or 'plug-ins') are proved on the current GPU, else why not, in one line.

    Asks the cache first. Delete the file that the reason names to have it tried again; what may be over the next time
    (PASSING) is not kept.
    """
    path = Path(dnnlib.make_cache_dir_path("kernels")) / f"verdict-{_fingerprint(title)}.json"
    try:
        reason = json.loads(path.read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        reason = _run(title)
        if reason is not None and any(words in reason for words in PASSING):
            return reason
        with contextlib.suppress(OSError):  # a cache that cannot be written costs another check
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_atomic(path) as f:
                f.write(json.dumps({"reason": reason}).encode("utf-8"))
    return None if reason is None else f"{reason}, see {path}"


def _fingerprint(title):
    """Of all that a verdict depends on: the sources, PyTorch, its CUDA, and the GPU."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in sorted([*here.glob("*.py"), *here.glob("ops/*.py"), *here.glob("ops/kernels/*")]):
        digest.update(file.name.encode() + file.read_bytes())
    facts = [title, torch.__version__, torch.version.cuda, torch.cuda.get_device_name()]
    digest.update(repr([*facts, torch.cuda.get_device_capability()]).encode())
    return digest.hexdigest()[:32]


def _run(title):
    """The reason why the check fails in a process of its own; None if it passes."""
    command = [sys.executable, "-m", "torch_utils.kernel_check", title, str(torch.cuda.current_device())]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"the check took more than {SECONDS} s"
    except OSError as err:
        return f"the check could not be run ({err})"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return None if done.returncode == 0 else f"the check failed: {lines[-1] if lines else done.returncode}"


# --------------------------------------------------------------------------------------------------
# In the process of its own


def check(device: str = "cuda", dtypes: tuple = (torch.float32, torch.float16, torch.bfloat16)) -> None:
    """Compares values and two derivatives of every operation with the reference path in float64; RuntimeError names
    the first that differs."""
    from torch_utils.ops import spatial_modulation, upfirdn2d
    from torch_utils.ops.bias_act import bias_act

    four, twelve = upfirdn2d.setup_filter([1, 3, 3, 1]), upfirdn2d.setup_filter([1] * 11 + [2])
    x, b, grid = _draw(2, 8, 20, 12), _draw(8), _draw(2, 8, 4, 4)
    cases = [
        (f"bias_act {act}", [x, b], _with(bias_act, act=act, gain=0.5))
        for act in ("linear", "lrelu", "sigmoid")
    ]
    cases.append(("bias_act clamp", [x, b], _with(bias_act, act="lrelu", clamp=100.0)))
    for name, f in [("4 taps", four), ("12 taps", twelve)]:
        for up, down in [(1, 1), (2, 1), (1, 2)]:
            op = _with(upfirdn2d.upfirdn2d, f=f, up=up, down=down, padding=[5, 6, 6, 5])
            cases.append((f"upfirdn2d {name} up {up} down {down}", [x], op))
    odd = upfirdn2d.setup_filter([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [2, 3, 4, 5, 6]])
    op = _with(upfirdn2d.upfirdn2d, f=odd, up=5, down=2, padding=2)
    cases.append(("upfirdn2d up 5", [x], op))  # the general kernel; those above have one of their own
    cases.append(("modulation", [x, grid], spatial_modulation.modulate))
    for name, tensors, op in cases:
        for dtype in dtypes:
            for layout in (torch.contiguous_format, torch.channels_last):
                exact = _derivatives(op, tensors, dtype, layout, "ref", "cpu")
                found = _derivatives(op, tensors, dtype, layout, "cuda", device)
                bound = 20 * max(torch.finfo(dtype).eps, 1e-6)
                for a, e in zip(found, exact, strict=True):
                    error = (a.double().cpu() - e).abs().max() / e.abs().max().clamp(min=1)
                    if not error < bound:
                        raise RuntimeError(f"{name} in {dtype}: off by {error:.1e} (at most {bound:.1e})")


def _with(op, **kwargs):
    return lambda *tensors, impl: op(
        *tensors, impl=impl, **{k: _to(v, tensors[0]) for k, v in kwargs.items()}
    )


def _to(value, like):
    return value.to(like.device) if isinstance(value, torch.Tensor) else value


def _draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def _derivatives(op, tensors, dtype, layout, impl, device):
    """[y, its derivatives along a fixed direction, theirs with respect to that direction]; 'ref' in float64."""
    leaves = []
    for t in tensors:
        t = t.to(dtype).to(device=device, dtype=torch.float64 if impl == "ref" else dtype)
        leaves.append((t.contiguous(memory_format=layout) if t.ndim == 4 else t).requires_grad_())
    y = op(*leaves, impl=impl)
    v = torch.ones_like(y).mul_(0.5).requires_grad_()
    first = torch.autograd.grad(y, leaves, v, create_graph=True)
    (second,) = torch.autograd.grad([(d * d.detach()).sum() for d in first], [v])
    return [t.detach() for t in (y, *first, second)]


def main(title: str, device: str) -> None:
    """Checks the kernels of one way on GPU number `device`; the exit status says how it went."""
    from torch_utils import custom_ops

    torch.cuda.set_device(int(device))
    custom_ops.verbosity = "none"
    custom_ops.use(title)
    check()


if __name__ == "__main__":
    main(*sys.argv[1:])
