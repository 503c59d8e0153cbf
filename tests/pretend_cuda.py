# SPDX-License-Identifier: Apache-2.0
"""CPU tensors that say they are on a GPU, and are as strict as those about the company of others.

What runs where `device.type == "cuda"` runs on any machine with them: tensors on two devices in one operation, a
generator, constant or index on the wrong one, and types that do not fit are errors, as on a GPU; numbers are real
ones, float16 too. What they cannot show: CUDA's own kernels, streams and libraries.
"""

import contextlib
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
# Operations of PyTorch that take tensors of two devices.
MOVING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
FACTORIES = "arange as_tensor empty eye full ones rand randint randn tensor zeros".split()


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU: `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda, is_cpu = True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    def cpu(self):
        return _Leave.apply(self)

    def tolist(self):
        return self.inner.tolist()

    def new_tensor(self, data):
        return OnGpu(self.inner.new_tensor(data))

    def __reduce_ex__(self, protocol):  # files of GPU tensors are read onto the CPU
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name not in MOVING and any(not isinstance(each, cls) and each.ndim for each in tensors):
            raise RuntimeError(f"{func}: tensors of the CPU among those of a GPU")
        given = tree_map_only(cls, lambda each: each.inner, (args, kwargs))
        out = func(*given[0], **given[1])
        if name == "copy_" and not isinstance(args[0], cls):
            return args[0]
        out = cls(out) if isinstance(out, torch.Tensor) else tree_map_only(torch.Tensor, cls, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


class _Zeros(TorchDispatchMode):
    """Tensors that autograd itself makes, such as zeros for what has no gradient, are where its gradients are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() == -1 or not isinstance(out, torch.Tensor):
            return out
        if not any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs))):
            return OnGpu(torch.ops.aten.zeros(out.shape, dtype=out.dtype) if out._is_zerotensor() else out)
        return out


@contextlib.contextmanager
def pretended(monkeypatch):
    """Context in which `device="cuda:0"` makes and moves tensors to the pretended GPU."""
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, _factory(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", _moved)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _device: torch.set_rng_state(state))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    # modules replace their parameters, as they do with buffers
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with _Zeros():
        yield


def _factory(make):
    @functools.wraps(make)
    def made(*args, device=None, **kwargs):
        if not _says_cuda(device):
            return make(*args, **kwargs, **({} if device is None else {"device": device}))
        out = make(*args, **kwargs)
        return out if isinstance(out, OnGpu) else OnGpu(out)

    return made


def _says_cuda(device):
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


_to = torch.Tensor.to


def _moved(x, *args, **kwargs):
    """x.to(*args, **kwargs)"""
    args = [*args, *kwargs.values()]
    like = [each for each in args if isinstance(each, torch.Tensor)]
    targets = [each for each in args if isinstance(each, str | torch.device)] + [each.device for each in like]
    dtypes = [each for each in args if isinstance(each, torch.dtype)] + [each.dtype for each in like]
    layouts = [each for each in args if isinstance(each, torch.memory_format)]
    options = {name: found[0] for name, found in [("dtype", dtypes), ("memory_format", layouts)] if found}
    out = _to(x, **options) if options else x
    there = _says_cuda(targets[0] if targets else x.device)
    if there == isinstance(out, OnGpu):
        return out
    return (_Enter if there else _Leave).apply(out)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx, dy):
        return _Leave.apply(dy)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, dy):
        return _Enter.apply(dy)


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        """Does nothing."""

    def synchronize(self):
        """Does nothing."""

    def elapsed_time(self, _end):
        """Milliseconds."""
        return 1.0
