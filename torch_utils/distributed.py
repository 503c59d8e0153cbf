# SPDX-License-Identifier: Apache-2.0
"""Several processes: launching them or joining those that torchrun started, broadcasting, and one flat
reduction of gradients.

Plain torch.distributed, no wrapper modules. Everything but launch() and init_process() is a no-op in a
process that stands alone, so that callers need not ask.
"""

import atexit
import contextlib
import math
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from torch_utils import misc, peers
from torch_utils.peers import PeerError

GROUP_TIMEOUT = timedelta(minutes=30)  # the first process may work alone for a while, e.g. on pictures
GRACE = 10  # seconds that processes have to end by themselves after another one failed
LOST = 75  # exit code of a process that only ends because another one has gone

_team: peers.Team | None = None  # the processes that torchrun started, while this one belongs to them
_local_index: int | None = None  # number of this process's GPU, where init_process() has said it


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


def maximum(values: list, device: torch.device | str = "cpu") -> list[float]:
    """The greatest of each of these numbers over all processes. All must call it; `device` is where they
    communicate."""
    if get_world_size() == 1:
        return [float(value) for value in values]
    box = torch.tensor([float(value) for value in values], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.tolist()


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` is true in any process. All must call it; `device` is where they communicate."""
    return maximum([bool(flag)], device)[0] > 0


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


def choose_device(gpus: int, device: str = "auto", here: int | None = None) -> tuple[int, str]:
    """(number of processes, 'cpu' or 'cuda') for --gpus and --device, the same for every command.

    --gpus=0 is one process on the CPU; --device=cpu runs as many as --gpus says there. Otherwise there is one
    process per GPU, and a single one goes to the CPU where there is no GPU. `here`: how many of them run on this
    machine (None: all). ValueError for what cannot be.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 0:
        raise ValueError("--gpus must be at least 1, or 0 for the CPU")
    if gpus == 0 and device == "cuda":
        raise ValueError("--gpus=0 is the CPU, --device=cuda is not: give one of them")
    if gpus == 0 or device == "cpu" or (device == "auto" and count == 0 and gpus == 1):
        return max(gpus, 1), "cpu"
    here = gpus if here is None else here
    if here > count:
        raise ValueError(
            f"{here} CUDA device{'s' * (here > 1)} asked for, this machine has {count}: --device=cpu runs on the CPU"
        )
    return gpus, "cuda"


def started_processes() -> int | None:
    """How many processes torchrun (or whoever set RANK and WORLD_SIZE) has started; None where nobody did."""
    place = peers.find_place()
    return None if place is None else place.world_size


def choose_processes(gpus: int | None, device: str = "auto") -> tuple[int, str]:
    """choose_device() for a command that launches processes; None is 1, or what torchrun has started.

    ValueError where torchrun has started another number than --gpus says.
    """
    place = peers.find_place()
    if place is None:
        return choose_device(1 if gpus is None else gpus, device)
    if gpus is not None and max(gpus, 1) != place.world_size:
        raise ValueError(
            f"--gpus={gpus}, but {place.world_size} processes have been started (WORLD_SIZE): leave --gpus out"
        )
    # which of them are here each finds out for itself in init_process()
    return choose_device(place.world_size if gpus is None else gpus, device, here=1)


def local_device(device_type: str, rank: int = 0) -> torch.device:
    """The device of this process: 'cpu', or its GPU on this machine (number `rank` where nobody launched it)."""
    if device_type != "cuda":
        return torch.device(device_type)
    return torch.device("cuda", rank if _local_index is None else _local_index)


def init_process(
    rank: int,
    world_size: int,
    init_method: str | None,
    device_type: str,
    store: dist.Store | None = None,
    local_rank: int | None = None,
) -> None:
    """Joins the group, found by `init_method` or `store`: NCCL for 'cuda', Gloo for 'cpu'.

    'cuda' also selects GPU number `local_rank` (None: `rank`). ValueError where this machine has no such GPU.
    """
    global _local_index
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"Processes run on 'cpu' or 'cuda', not {device_type!r}")
    local_rank = rank if local_rank is None else local_rank
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"Process {rank} should take CUDA device {local_rank} (LOCAL_RANK), this machine has {count}"
            )
        torch.cuda.set_device(local_rank)
    _local_index = local_rank
    use_nccl = device_type == "cuda" and dist.is_nccl_available()
    where = dict(init_method=init_method) if store is None else dict(store=store)
    dist.init_process_group(
        "nccl" if use_nccl else "gloo", rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT, **where
    )


def launch(fn: Callable, num_processes: int, args: tuple = (), device_type: str | None = None) -> Any:
    """Runs fn(rank, *args) in `num_processes` processes that can communicate; returns what that of rank 0
    returned, when all are done.

    One process: called right here. Several: `fn` must be a global of a module, its arguments and result
    picklable. Where torchrun has started this process among others, each of them runs `fn` itself, with the
    arguments of rank 0, and returns its own result. `device_type`: 'cuda' or 'cpu'; default: what the machine has.

    When one process fails the others end, too: an exception in it is raised here (ProcessRaisedException), any
    other end is a ProcessExitedException. A process of torchrun that loses another one gets a PeerError.
    """
    if num_processes < 1:
        raise ValueError(f"The number of processes must be at least 1, not {num_processes}")
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    started = started_processes() or 1
    if started > 1:
        if num_processes != started:
            raise ValueError(f"{num_processes} processes wanted, {started} have been started (WORLD_SIZE)")
        with joined() as leads:
            return _work_in_team(fn, args, device_type) if leads else follow()
    if num_processes == 1:
        _prepare_memory(device_type)
        return fn(0, *args)
    with tempfile.TemporaryDirectory() as folder:
        path = (Path(folder) / "rendezvous").resolve().as_posix()
        init_method = f"file://{path}" if path.startswith("/") else f"file:///{path}"  # C:/... on Windows
        job = (fn, num_processes, init_method, device_type, args, folder)
        _join(torch.multiprocessing.spawn(_work, args=job, nprocs=num_processes, join=False))
        result = Path(folder) / "result"
        if not result.exists():  # ended in peace, but before its work was done
            raise KeyboardInterrupt
        return pickle.loads(result.read_bytes())


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Context of a command that launches: whether this process is the one that decides what to do.

    Where torchrun started several, only the first one does; the others should follow() it: they run what it
    launches, and end as it does. Anywhere else this does nothing. PeerError where processes are missing.
    """
    global _team
    place = peers.find_place()
    if _team is not None or place is None or place.world_size == 1:
        yield _team is None or _team.place.rank == 0
        return
    _team = team = peers.Team(place)
    try:
        yield place.rank == 0
        team.leave()
    except BaseException as err:
        if place.rank == 0 and not team.announced:  # the command itself is wrong, and it says so by itself
            team.leave(peers.exit_code(err))
        else:
            team.fail(err)
        raise
    finally:
        _team = None


def follow() -> Any:
    """Runs what the first process launches and returns its result; SystemExit where that launches nothing."""
    what = _team.receive()
    if isinstance(what, int):
        _team.leave()
        sys.exit(what)
    return _work_in_team(None, None, what)


def _work_in_team(fn: Callable | None, args: tuple | None, device_type: str) -> Any:
    """What each process of torchrun runs; function and arguments are those of the first one."""
    place = _team.place
    if place.rank == 0:
        _team.announce(device_type)
    try:
        _prepare_memory(device_type)
        init_process(place.rank, place.world_size, None, device_type, _team.group_store, place.local_rank)
        fn, args = broadcast_object((fn, args))
        result = fn(place.rank, *args)
    except RuntimeError as err:
        if not _is_lost(err):
            raise
        raise PeerError(peers.lost_text(place.rank, _team.why_lost(err))) from err
    dist.destroy_process_group()
    return result


def _is_lost(err: BaseException) -> bool:
    """Whether an exception only says that another process has gone."""
    signs = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exit"
    return isinstance(err, dist.DistBackendError | dist.DistNetworkError) or any(s in str(err) for s in signs)


def _work(rank, fn, world_size, init_method, device_type, args, folder):
    """What each spawned process runs."""
    _prepare_memory(device_type)
    try:
        init_process(rank, world_size, init_method, device_type)
        result = fn(rank, *args)
    except RuntimeError as err:
        if not _is_lost(err):
            raise
        print(f"Process {rank} has lost another one: {peers.first_line(err)}", file=sys.stderr)
        sys.exit(LOST)  # the process that waits for all says what happened
    if rank == 0:
        with open(os.path.join(folder, "result"), "wb") as f:
            pickle.dump(result, f)
    # Taking the group down now and then aborts (seen with gloo); the process ends without it.
    atexit.register(peers.exit_now, 0)


def _prepare_memory(device_type: str) -> None:
    if device_type == "cpu":
        misc.keep_memory()


def _join(context: Any) -> None:
    """Waits for all processes. A failure in one ends all of them; SIGINT and SIGTERM are passed on, for them to
    save."""

    interrupted = []

    def pass_on(number: int, _frame: Any) -> None:
        interrupted.append(number == signal.SIGINT)
        if (
            number == signal.SIGINT and os.name == "nt"
        ):  # there it goes to all of the console, and kill() kills
            return
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    numbers = [signal.SIGINT, signal.SIGTERM] if _in_main_thread() else []
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        ended = _wait(context.processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    codes = {rank: context.processes[rank].exitcode for rank in ended}
    failed = [rank for rank in ended if codes[rank] not in (0, LOST)] or [r for r in ended if codes[r] != 0]
    if failed and any(interrupted):
        raise KeyboardInterrupt
    if failed:
        _raise(context, failed[0])


def _wait(processes: list) -> list[int]:
    """Waits until all have ended, or GRACE seconds after the first that failed: ranks in the order of their
    ends."""
    waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
    ended, limit = [], None
    while waiting and (limit is None or time.monotonic() < limit):
        for sentinel in multiprocessing.connection.wait(list(waiting), timeout=1):
            rank = waiting.pop(sentinel)
            processes[rank].join()
            ended.append(rank)
            if processes[rank].exitcode != 0 and limit is None:
                limit = time.monotonic() + GRACE
    return ended


def _raise(context: Any, rank: int) -> None:
    """Raises what says how that process ended."""
    process, file = context.processes[rank], context.error_files[rank]
    if os.path.isfile(file):
        with open(file, "rb") as f:
            trace = pickle.load(f)
        os.unlink(file)
        raise ProcessRaisedException(
            f"\n\n-- Process {rank} terminated with the following error:\n{trace}", rank, process.pid
        )
    code, name = process.exitcode, None
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    how = f"exit code {code}" if code >= 0 else f"signal {name or -code}"
    raise ProcessExitedException(f"process {rank} terminated with {how}", rank, process.pid, code, name)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
