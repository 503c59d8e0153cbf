# SPDX-License-Identifier: Apache-2.0
"""Several processes on one machine: launching, broadcasting, and one flat reduction of gradients.

Plain torch.distributed, no wrapper modules. Everything but launch() and init_process() is a no-op in a
process that stands alone, so that callers need not ask.
"""

import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from torch_utils import misc


def get_rank() -> int:
    """Index of this process, 0 when it stands alone."""
    return dist.get_rank() if _is_active() else 0


def get_world_size() -> int:
    """Number of processes, 1 when this one stands alone."""
    return dist.get_world_size() if _is_active() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return get_rank() == 0


def barrier() -> None:
    """Waits until all processes have come here."""
    if get_world_size() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def _is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


# ----------------------------------------------------------------------------------------
# Communication


@torch.no_grad()
def broadcast_module(module: torch.nn.Module, src: int = 0) -> None:
    """Overwrites all parameters and buffers, in place, with those of process `src`."""
    if get_world_size() == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        packed = tensor.detach().contiguous()  # the tensor's own memory, unless it is strided
        dist.broadcast(packed, src=src)
        if packed.data_ptr() != tensor.data_ptr():
            tensor.copy_(packed)


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """The picklable object that process `src` passed; what the others pass is ignored."""
    if get_world_size() == 1:
        return obj
    box = [obj if get_rank() == src else None]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def any_ranks(flags: list, device: torch.device | str = "cpu") -> list:
    """any_rank() of several flags at once."""
    if get_world_size() == 1:
        return [bool(flag) for flag in flags]
    box = torch.tensor([float(bool(flag)) for flag in flags], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return [bool(value) for value in box.tolist()]


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` is true in any process. All must call it; `device` is where they communicate."""
    return any_ranks([flag], device)[0]


@torch.no_grad()
def average(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of `tensor` over all processes, detached; all processes must call it."""
    tensor = tensor.detach().clone()
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


@torch.no_grad()
def all_reduce_gradients(params: Iterable) -> torch.Tensor:
    """Averages the gradients over all processes, in one reduction, then mends them: nan -> 0, +-inf -> +-1e5.

    In place. Parameters without a gradient are left out; all processes must have gradients for the same ones.
    Returns how many values had to be mended, [] on the gradients' device (nobody waits for it).
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros([])
    if get_world_size() == 1 and grads[0].device.type == "cpu" and _sum_is_finite(grads):
        return torch.zeros([])
    flat = torch.cat([grad.flatten() for grad in grads])
    if get_world_size() > 1:
        dist.all_reduce(flat)
        flat /= get_world_size()
    mended = flat.isfinite().logical_not().sum()
    torch.nan_to_num(flat, nan=0, posinf=1e5, neginf=-1e5, out=flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))
    return mended


def _sum_is_finite(grads: list) -> bool:
    """If so, every value is: one pass instead of eight. (If not, it may still be but the sum that is too large.)"""
    return math.isfinite(sum(float(grad.sum()) for grad in grads))


# ----------------------------------------------------------------------------------------
# Processes


def choose_device(gpus: int, device: str = "auto") -> tuple[int, str]:
    """(number of processes, 'cpu' or 'cuda') for --gpus and --device, the same for every command.

    --gpus=0 is one process on the CPU; --device=cpu runs as many as --gpus says there. Otherwise there is one
    process per GPU, and a single one goes to the CPU where there is no GPU. ValueError for what cannot be.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 0:
        raise ValueError("--gpus must be at least 1, or 0 for the CPU")
    if gpus == 0 and device == "cuda":
        raise ValueError("--gpus=0 is the CPU, --device=cuda is not: give one of them")
    if gpus == 0 or device == "cpu" or (device == "auto" and count == 0 and gpus == 1):
        return max(gpus, 1), "cpu"
    if gpus > count:
        raise ValueError(
            f"{gpus} CUDA device{'s' * (gpus > 1)} asked for, this machine has {count}: --device=cpu runs on the CPU"
        )
    return gpus, "cuda"


def init_process(rank: int, world_size: int, init_method: str, device_type: str) -> None:
    """Joins the group: NCCL for 'cuda' (which also selects GPU number `rank`), Gloo for 'cpu'."""
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"Processes run on 'cpu' or 'cuda', not {device_type!r}")
    use_nccl = device_type == "cuda" and dist.is_nccl_available()
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if use_nccl else "gloo", init_method=init_method, rank=rank, world_size=world_size
    )


def launch(fn: Callable, num_processes: int, args: tuple = (), device_type: str | None = None) -> None:
    """Runs fn(rank, *args) in `num_processes` processes that can communicate; returns when all are done.

    One process: called right here. Several: `fn` must be a global of a module, its arguments picklable. When
    one fails, the others are stopped and its traceback is raised. `device_type`: 'cuda' or 'cpu'; default:
    what the machine has.
    """
    if num_processes < 1:
        raise ValueError(f"The number of processes must be at least 1, not {num_processes}")
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if num_processes == 1:
        _prepare_memory(device_type)
        fn(0, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = (Path(folder) / "rendezvous").resolve().as_posix()
        init_method = f"file://{path}" if path.startswith("/") else f"file:///{path}"  # C:/... on Windows
        job = (fn, num_processes, init_method, device_type, args)
        context = torch.multiprocessing.spawn(_work, args=job, nprocs=num_processes, join=False)
        _join(context)


def _work(rank: int, fn: Callable, world_size: int, init_method: str, device_type: str, args: tuple) -> None:
    """What each spawned process runs."""
    _prepare_memory(device_type)
    init_process(rank, world_size, init_method, device_type)
    fn(rank, *args)
    dist.destroy_process_group()  # not after an error: the others may never answer


def _prepare_memory(device_type: str) -> None:
    if device_type == "cpu":
        misc.keep_memory()


def _join(context: Any) -> None:
    """Waits for all processes. A failure in one stops all of them; SIGTERM is passed on, for them to save."""

    def pass_on(number: int, _frame: Any) -> None:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = signal.signal(signal.SIGTERM, pass_on) if _in_main_thread() else None
    try:
        while not context.join():
            pass
    except KeyboardInterrupt:
        # they got the same Ctrl-C and may be saving their work; a second one kills them
        for process in context.processes:
            process.join()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
