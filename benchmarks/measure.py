# SPDX-License-Identifier: Apache-2.0
"""Timing for machines that others use too, and counting of floating point operations.

Absolute times say little on a shared machine. Here all cases of a run take turns, round after round, each next
to a matrix product of the machine's own; the fastest round of a case is compared with the fastest matrix product,
and the median of the paired ratios stands beside it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop, flop_registry

from torch_utils import custom_ops

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MATRIX = 1536  # side of the matrices whose product sets the scale
COPY_FLOATS = 2**25  # a copy of 128 MiB: larger than most caches


class FlopCount(TorchDispatchMode):
    """Context that counts the floating point operations of matrix products and convolutions (2 for every
    multiply-add, as they are executed; a transposed convolution counts what it computes), backward ones too.

    Filters and everything else that touches a value a few times do not count: what is left out costs time, and
    so lowers the rate.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry and not _is_filter(packet, args):
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        elif "_convolution" in str(packet) and str(packet).startswith("mkldnn."):  # fused forms
            x, w = args[0], args[1]
            if "binary" in func._overloadname and str(packet).endswith("pointwise_"):  # (other, x, w, ...)
                x, w = args[1], args[2]
            self.total += conv_flop(x.shape, w.shape, None, None, None, None, False, out_shape=out.shape)
        return out


def _is_filter(packet, args):
    """Whether it is a convolution of every channel by itself."""
    if packet is torch.ops.aten.convolution:
        return args[8] > 1
    if packet is torch.ops.aten.convolution_backward:
        return args[9] > 1
    return False


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations (see FlopCount) of one call on PyTorch's own operations, which multiply what the
    formulas say, after one as it is, which warms up."""
    run()
    with custom_ops.reference_only(), FlopCount() as counter:
        run()
    return counter.total


@dataclass
class Case:
    """One thing to time. run: does it once. items: how many pictures (or steps) that is. flops: of one run, None
    where it makes no sense to count. weight: share of a run in a training step (1 / the phase's interval). total:
    the name of the sum that the case is part of, or ''. base: the name of the case that its time is a multiple of, or
    ''. dtype: whose matrix rate it is compared with."""

    name: str
    run: Callable[[], object] | None
    items: int = 1
    flops: int | None = None
    weight: float = 1
    total: str = ""
    dtype: torch.dtype = torch.float32
    base: str = ""
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # of the matrix rate, round by round


class Machine:
    """What the machine can do: rates of matrix products by dtype, and of a copy, at their best so far."""

    def __init__(self, clock: str = "wall"):
        self.now = CLOCKS[clock]
        self.matrices = {}
        self.matrix_rates = {}
        self.source = torch.rand(COPY_FLOATS)
        self.target = torch.empty_like(self.source)
        self.copy_rate = 0.0

    def time(self, run: Callable[[], object]) -> float:
        """Seconds that one call takes, on this machine's clock."""
        begin = self.now()
        run()
        return self.now() - begin

    def matrix_rate(self, dtype: torch.dtype = torch.float32) -> float:
        """Operations a second of one matrix product now; the best of all calls is in matrix_rates[dtype]."""
        if dtype not in self.matrices:
            self.matrices[dtype] = torch.rand(MATRIX, MATRIX).to(dtype)
            self.matrices[dtype] @ self.matrices[dtype]
        a = self.matrices[dtype]
        rate = 2 * MATRIX**3 / max(self.time(lambda: a @ a), 1e-9)
        self.matrix_rates[dtype] = max(rate, self.matrix_rates.get(dtype, 0))
        return rate

    def copy_bandwidth(self) -> float:
        """Bytes a second read and written by a large copy; the best of all calls is in copy_rate."""
        seconds = max(self.time(lambda: self.target.copy_(self.source)), 1e-9)
        self.copy_rate = max(2 * self.source.nbytes / seconds, self.copy_rate)
        return self.copy_rate


def measure(cases: Sequence[Case], machine: Machine, rounds: int) -> None:
    """Times every case `rounds` times, in turns, with a matrix product before each; fills seconds and shares."""
    for case in cases:
        if case.flops == 0:
            case.flops = count_flops(case.run)
        else:
            case.run()
    for _ in range(rounds):
        for _ in range(3):
            machine.copy_bandwidth()
        for case in cases:
            rate = max(machine.matrix_rate(case.dtype) for _ in range(2))
            case.seconds.append(max(machine.time(case.run), 1e-9))
            rate = max(rate, machine.matrix_rate(case.dtype))
            if case.flops is not None:
                case.shares.append(case.flops / case.seconds[-1] / rate)


def totals(cases: Sequence[Case]) -> list[Case]:
    """A further case for every `total`: the weighted sum of its parts, round by round."""
    sums = []
    for name in dict.fromkeys(case.total for case in cases if case.total):
        parts = [case for case in cases if case.total == name]
        flops = sum(part.flops * part.weight for part in parts)
        whole = Case(name, None, parts[0].items, flops, dtype=parts[0].dtype, base=parts[0].base)
        for i in range(len(parts[0].seconds)):
            whole.seconds.append(sum(part.seconds[i] * part.weight for part in parts))
            # seconds the matrix rate of each part's own round would have needed / seconds taken
            ideal = sum(part.shares[i] * part.seconds[i] * part.weight for part in parts)
            whole.shares.append(ideal / whole.seconds[i])
        whole.best = sum(min(part.seconds) * part.weight for part in parts)
        sums.append(whole)
    return sums


def ratio_table(cases: Sequence[Case]) -> list[str]:
    """Lines of a Markdown table of every case that has a base: its time over the base's, the fastest rounds and
    the median of all rounds. No lines where there is none."""
    found = {case.name: case for case in cases}
    lines = []
    for case in cases:
        base = found.get(case.base) if not case.total else None
        if base is not None:
            best = _best(case) / _best(base)
            median = statistics.median(a / b for a, b in zip(case.seconds, base.seconds, strict=True))
            lines.append(f"| {case.name} | {case.base} | {best:.3f} | {median:.3f} |")
    return ["", "| case | over | best | median |", "|---|---|---|---|", *lines] if lines else []


def _best(case):
    return getattr(case, "best", None) or min(case.seconds)


def table(cases: Sequence[Case], machine: Machine) -> list[str]:
    """Lines of a Markdown table, one row a case."""
    lines = [
        "| case | GFLOP a picture | best, ms a picture | median | GFLOP/s | share of the matrix rate | paired median |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        best = _best(case)
        times = [f"{1e3 * seconds / case.items:.2f}" for seconds in (best, statistics.median(case.seconds))]
        if case.flops is None:
            cells = ["-", *times, "-", "-", "-"]
        else:
            rate = case.flops / best
            share = rate / machine.matrix_rates[case.dtype]
            cells = [f"{case.flops / case.items / 1e9:.2f}", *times, f"{rate / 1e9:.0f}", f"{share:.0%}"]
            cells.append(f"{statistics.median(case.shares):.0%}")
        lines.append(f"| {' | '.join([case.name, *cells])} |")
    return lines
