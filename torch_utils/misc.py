# SPDX-License-Identifier: Apache-2.0
"""Helpers that networks and the training loop share: constants, shape checks, samplers, copying,
summaries."""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

nan_to_num = torch.nan_to_num
symbolic_assert = torch._assert

# ----------------------------------------------------------------------------------------
# Constants and checks

_constants: dict = {}


def constant(
    value: Any,
    shape: tuple | list | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Tensor of an array-like, made once per combination of arguments. Never modify the result in place.

    Defaults: the value's own shape (else broadcast to `shape`), torch's default dtype, CPU, contiguous.
    """
    array = np.asarray(value)
    shape = None if shape is None else tuple(shape)
    dtype = dtype or torch.get_default_dtype()
    device = torch.device(device or "cpu")
    memory_format = memory_format or torch.contiguous_format
    key = (array.shape, array.dtype, array.tobytes(), shape, dtype, device, memory_format)
    if key not in _constants:
        with torch.inference_mode(False):  # a cached inference tensor would break later gradients
            tensor = torch.tensor(array, dtype=dtype, device=device)
            tensor = tensor if shape is None else tensor.expand(shape)
            _constants[key] = tensor.contiguous(memory_format=memory_format)
    return _constants[key]


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Context in which torch.jit.TracerWarning is ignored. Touches one filter only, so that it may be
    nested."""
    ignore = ("ignore", None, torch.jit.TracerWarning, None, 0)
    warnings.filters.insert(0, ignore)
    try:
        yield
    finally:
        if ignore in warnings.filters:
            warnings.filters.remove(ignore)


def assert_shape(tensor: torch.Tensor, ref_shape: list | tuple) -> None:
    """Raises AssertionError unless the tensor's shape is `ref_shape`: ints, None for any size, or 0-d
    tensors."""
    if tensor.ndim != len(ref_shape):
        raise AssertionError(f"Wrong number of dimensions: got {tensor.ndim}, expected {len(ref_shape)}")
    for axis, (size, ref) in enumerate(zip(tensor.shape, ref_shape, strict=True)):
        if ref is None:
            continue
        if isinstance(size, torch.Tensor) or isinstance(ref, torch.Tensor):  # under torch.jit.trace
            with suppress_tracer_warnings():
                same = torch.equal(torch.as_tensor(size), torch.as_tensor(ref, dtype=torch.int64))
                symbolic_assert(same, f"Wrong size for dimension {axis}")
        elif size != ref:
            raise AssertionError(f"Wrong size for dimension {axis}: got {size}, expected {ref}")


def profiled_function(fn: Callable) -> Callable:
    """Decorator: the function shows up under its own name in torch.profiler."""

    def timed(*args, **kwargs):
        with torch.autograd.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    timed.__name__ = fn.__name__
    timed.__doc__ = fn.__doc__
    return timed


# ----------------------------------------------------------------------------------------
# Memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_memory() -> bool:
    """Makes the C library keep freed memory for the next use, on Linux with glibc; elsewhere it does nothing.

    By default a large tensor's memory is asked of the kernel anew each time, and cleared page by page: a tenth of
    a training's time on a CPU. MALLOC_* environment variables, where there are any, are left in charge.
    Returns whether it was done.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**30  # bytes; the argument is an int
    asked = mallopt(_M_MMAP_THRESHOLD, largest) or mallopt(_M_MMAP_THRESHOLD, 2**25)  # older ones take 32 MiB
    return bool(asked and mallopt(_M_TRIM_THRESHOLD, largest))


# ----------------------------------------------------------------------------------------
# Reading data


def loader_options(
    device: torch.device,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    **others,
) -> dict:
    """How a DataLoader reads for `device`: with no more workers than this process may use cores (more get in each
    other's way, and PyTorch warns of them), which leave Ctrl-C and SIGTERM to the process that can save."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(num_workers, usable)
    found = dict(others, num_workers=workers, pin_memory=pin_memory and device.type == "cuda")
    if workers > 0:
        found.update(prefetch_factor=prefetch_factor, worker_init_fn=_ignore_signals)
    return found


def _ignore_signals(_worker_id):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class InfiniteSampler(torch.utils.data.Sampler):
    """Endless sequence of dataset indices; each of `num_replicas` ranks takes every num_replicas-th of them.

    Starts from a permutation drawn from `seed`, walked round and round; after each visit the entry changes
    places with one of the `window_size` (a fraction of the dataset) entries before it. `start`: how many
    indices this rank has consumed already; iteration begins at that place of the very same sequence.
    """

    _CHUNK = 4096

    def __init__(
        self,
        dataset: Any,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
        start: int = 0,
    ):
        assert len(dataset) > 0
        assert num_replicas > 0 and 0 <= rank < num_replicas
        assert 0 <= window_size <= 1
        assert start >= 0
        super().__init__()
        self.dataset = dataset
        self.rank, self.num_replicas = rank, num_replicas
        self.shuffle, self.seed, self.window_size = shuffle, seed, window_size
        self.start = start

    def __iter__(self) -> Iterator[int]:
        first = self.start * self.num_replicas + self.rank
        return itertools.islice(self._all_ranks(), first, None, self.num_replicas)

    def _all_ranks(self) -> Iterator[int]:
        size = len(self.dataset)
        order = np.arange(size)
        if not self.shuffle:
            yield from itertools.cycle(order.tolist())
        rng = np.random.RandomState(self.seed)
        rng.shuffle(order)
        order = order.tolist()  # plain ints: twice as fast to index
        window = int(np.rint(size * self.window_size))
        if window < 2:
            yield from itertools.cycle(order)
        for here, back in zip(itertools.cycle(range(size)), self._steps_back(rng, window)):  # noqa: B905 (endless)
            yield order[here]
            there = (here - back) % size
            order[here], order[there] = order[there], order[here]

    def _steps_back(self, rng: np.random.RandomState, window: int) -> Iterator[int]:
        while True:  # drawn in chunks; the legacy generator gives the same numbers one by one
            yield from rng.randint(window, size=self._CHUNK).tolist()


# ----------------------------------------------------------------------------------------
# Parameters and buffers


def named_params_and_buffers(module: torch.nn.Module) -> list:
    """(name, tensor) of all parameters, then of all buffers."""
    return [*module.named_parameters(), *module.named_buffers()]


def params_and_buffers(module: torch.nn.Module) -> list:
    """All parameters, then all buffers."""
    return [tensor for _, tensor in named_params_and_buffers(module)]


def copy_params_and_buffers(
    src_module: torch.nn.Module, dst_module: torch.nn.Module, require_all: bool = False
) -> None:
    """Copies values by name into a module whose tensors do not require gradients. Superfluous names are
    ignored.

    `require_all`: AssertionError if the source lacks a name. RuntimeError if a shape differs or a gradient is
    required.
    """
    source = dict(named_params_and_buffers(src_module))
    for name, tensor in named_params_and_buffers(dst_module):
        assert name in source or not require_all, f"{name} is missing in the source network"
        if name in source:
            tensor.copy_(source[name].detach()).requires_grad_(tensor.requires_grad)


# ----------------------------------------------------------------------------------------
# Several processes


def ddp_sync(module: torch.nn.Module, sync: bool) -> contextlib.AbstractContextManager:
    """Context without gradient synchronisation if the module is DistributedDataParallel and `sync` is
    false."""
    if sync or not isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


def check_ddp_consistency(module: torch.nn.Module, ignore_regex: str | None = None) -> None:
    """AssertionError, naming the first such tensor, if a parameter or buffer differs from that of rank 0.

    Names are 'ClassName.parameter.name'; those that `ignore_regex` fully matches are left out. All ranks call
    this. Tensors are compared to the end even after a difference, so that the ranks stay in step.
    """
    different = []
    for name, tensor in named_params_and_buffers(module):
        full_name = f"{type(module).__name__}.{name}"
        if ignore_regex is not None and re.fullmatch(ignore_regex, full_name):
            continue
        mine = tensor.detach().contiguous()
        theirs = mine.clone()
        torch.distributed.broadcast(theirs, src=0)
        if mine.is_floating_point():
            mine, theirs = nan_to_num(mine), nan_to_num(theirs)
        if not torch.equal(mine, theirs):
            different.append(full_name)
    assert not different, different[0]


# ----------------------------------------------------------------------------------------
# Summary table


def print_module_summary(
    module: torch.nn.Module, inputs: tuple | list, max_nesting: int = 3, skip_redundant: bool = True
) -> Any:
    """Runs module(*inputs), prints a table of its submodules in the order in which they finish; returns the
    outputs.

    `max_nesting`: depth of calls below the module that is shown. `skip_redundant` leaves out submodules that
    bring neither new parameters and buffers nor a new output.
    """
    assert isinstance(module, torch.nn.Module) and not isinstance(module, torch.jit.ScriptModule)
    assert isinstance(inputs, (tuple, list))
    calls, outputs = _record_calls(module, inputs, max_nesting)
    names = {sub: name for name, sub in module.named_modules()}
    names[module] = "<top-level>"
    rows = [[type(module).__name__, "Parameters", "Buffers", "Output shape", "Datatype"], ["---"] * 5]
    totals = [0, 0]
    seen: set = set()
    for sub, tensors in calls:
        counts = [_count_new(group, seen) for group in (sub.parameters(), sub.buffers())]
        is_new = any(id(tensor) not in seen for tensor in tensors)
        seen.update(map(id, tensors))
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        if is_new or any(counts) or not skip_redundant:
            rows += _rows_of_call(names[sub], counts, tensors)
    rows += [["---"] * 5, ["Total", *(str(total or "-") for total in totals), "-", "-"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    print("", *lines, "", sep="\n")
    return outputs


def _record_calls(module: torch.nn.Module, inputs: tuple | list, max_nesting: int) -> tuple:
    """Runs the module; returns ([(submodule, its output tensors)] by time of completion, the outputs)."""
    calls: list = []
    depth = 0

    def enter(*_):
        nonlocal depth
        depth += 1

    def leave(sub, _inputs, result):
        nonlocal depth
        depth -= 1
        if depth <= max_nesting:
            result = result if isinstance(result, (tuple, list)) else [result]
            calls.append((sub, [tensor for tensor in result if isinstance(tensor, torch.Tensor)]))

    with contextlib.ExitStack() as hooks:
        for sub in module.modules():
            hooks.callback(sub.register_forward_pre_hook(enter).remove)
            hooks.callback(sub.register_forward_hook(leave).remove)
        return calls, module(*inputs)


def _count_new(tensors: Iterator, seen: set) -> int:
    """Number of values in the tensors not seen before, which are then seen."""
    fresh = {id(tensor): tensor for tensor in tensors if id(tensor) not in seen}
    seen.update(fresh)
    return sum(tensor.numel() for tensor in fresh.values())


def _rows_of_call(name: str, counts: list, tensors: list) -> list:
    """Table rows of one submodule: one per output, the counts in the first."""
    kinds = [[str(list(tensor.shape)), str(tensor.dtype).split(".")[-1]] for tensor in tensors] or [
        ["-", "-"]
    ]
    labels = [name] if len(kinds) == 1 else [f"{name}:{i}" for i in range(len(kinds))]
    cells = [[str(count or "-") for count in counts]] + [["-", "-"]] * (len(kinds) - 1)
    return [[label, *cell, *kind] for label, cell, kind in zip(labels, cells, kinds, strict=True)]
