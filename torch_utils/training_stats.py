# SPDX-License-Identifier: Apache-2.0
"""Counts, means and deviations of scalars reported from anywhere, over devices and processes.

Every name has three float64 numbers: count, sum, sum of squares. report() adds to a counter on the value's
own device, without waiting for it; a Collector's update() brings all counters together and sees what came
since its last update.
"""

import math
import re
from typing import Any

import torch
import torch.distributed

import dnnlib

_counters: dict = {}  # name -> {device: float64 [3], not yet in _totals}
_totals: dict = {}  # name -> float64 [3] on the CPU, of all processes
_broken: dict = {}  # name -> (how often it got moments that are not finite, the latest of them)
_rank = 0
_sync_device: torch.device | None = None
_has_synced = False


def init_multiprocessing(rank: int, sync_device: Any) -> None:
    """Says which process this is and on what device counters are added up; None: there is only one process.

    Call at most once, before anything is collected.
    """
    global _rank, _sync_device
    assert not _has_synced, "init_multiprocessing() must come before the first Collector"
    _rank = rank
    _sync_device = None if sync_device is None else torch.device(sync_device)


def report(name: str, value: Any) -> Any:
    """Adds the elements of a number, list, array or tensor to the statistic `name`; returns the value
    unchanged.

    An empty value only makes the name known. With several processes, all must report the same names in the
    same order.
    """
    counters = _counters.setdefault(name, {})
    elements = torch.as_tensor(value).detach().flatten().to(torch.float32)
    if elements.numel() > 0:
        moments = torch.stack([torch.ones_like(elements).sum(), elements.sum(), elements.square().sum()])
        moments = moments.to(torch.float64)  # [count, sum, sum of squares]
        known = counters.get(elements.device)
        counters[elements.device] = moments if known is None else known + moments
    return value


def report0(name: str, value: Any) -> Any:
    """report() of what the first process has; the others only make the name known. Returns the value
    unchanged."""
    report(name, value if _rank == 0 else [])
    return value


def state_dict() -> dict:
    """Everything collected so far: name -> [count, sum, sum of squares], in order of first report.

    Brings the counters of all processes together first, so all processes must call it; all get the same
    answer.
    """
    _synchronize(list(_counters))
    return {name: _totals[name].tolist() for name in _counters}


def load_state_dict(state: dict) -> None:
    """Continues from a state_dict(); what was reported before is forgotten. All processes must call it."""
    totals = {name: torch.tensor(moments, dtype=torch.float64) for name, moments in state.items()}
    for name, total in totals.items():
        if total.shape != (3,):
            raise ValueError(f"Statistic {name!r} needs three numbers, not {state[name]!r}")
    _totals.clear()
    _totals.update(totals)
    _broken.clear()
    _counters.clear()
    _counters.update({name: {} for name in totals})


def _synchronize(names: list) -> dict:
    """Moves the counters of the names into the totals, adding up all processes; returns name -> total."""
    global _has_synced
    _has_synced = True
    if not names:
        return {}
    device = _sync_device or torch.device("cpu")
    deltas = torch.zeros([len(names), 3], dtype=torch.float64, device=device)
    for delta, name in zip(deltas, names, strict=True):
        for counter in _counters[name].values():
            delta += counter.to(device)
        _counters[name].clear()
    if _sync_device is not None:
        torch.distributed.all_reduce(deltas)
    for name, delta in zip(names, deltas.cpu(), strict=True):
        if not delta.isfinite().all():  # kept apart: a total that is nan once would stay so for ever
            _broken[name] = (_broken.get(name, (0,))[0] + 1, delta.clone())
            delta = torch.zeros_like(delta)
        _totals[name] = _totals[name] + delta if name in _totals else delta.clone()
    return {name: _totals[name] for name in names}


class Collector:
    """Statistics of the reports between two calls of update(), of all names that `regex` fully matches.

    `keep_previous`: a name without a new report keeps its old statistics, else it has none. Reports made
    before the Collector are not seen by it. With several processes, all must construct and update it at the
    same points.
    """

    def __init__(self, regex: str = ".*", keep_previous: bool = True):
        self._regex = re.compile(regex)
        self._keep_previous = keep_previous
        self._seen: dict = {}  # name -> float64 [3]: total at the last update
        self._broken: dict = {}  # name -> how many broken moments were seen
        self._moments: dict = {}  # name -> float64 [3]: of the last interval
        self.update()
        self._moments.clear()

    def names(self) -> list:
        """The names reported so far that belong to this collector, in order of first report."""
        return [name for name in _counters if self._regex.fullmatch(name)]

    def update(self) -> None:
        """Closes the interval: what was reported since the last call becomes the statistics."""
        if not self._keep_previous:
            self._moments.clear()
        for name, total in _synchronize(self.names()).items():
            delta = total - self._seen[name] if name in self._seen else total
            self._seen[name] = total
            times, moments = _broken.get(name, (0, None))
            if times > self._broken.get(name, 0):
                delta = delta + moments
            self._broken[name] = times
            if float(delta[0]) != 0:
                self._moments[name] = delta

    def state_dict(self) -> dict:
        """Plain lists and dicts from which load_state_dict() continues; goes with the module's
        state_dict()."""
        tables = dict(seen=self._seen, moments=self._moments)
        return {key: {name: row.tolist() for name, row in table.items()} for key, table in tables.items()}

    def load_state_dict(self, state: dict) -> None:
        """Continues from a state_dict(), after the module's load_state_dict(), e.g. in another process."""
        tables = (
            {name: torch.tensor(row, dtype=torch.float64) for name, row in state[key].items()}
            for key in ("seen", "moments")
        )
        self._seen, self._moments = tables
        self._broken = {name: times for name, (times, _moments) in _broken.items()}

    def _row(self, name: str) -> list:
        assert self._regex.fullmatch(name), f"{name} is not matched by {self._regex.pattern}"
        return self._moments[name].tolist() if name in self._moments else [0.0, 0.0, 0.0]

    def num(self, name: str) -> int:
        """Number of values reported under the name."""
        return int(self._row(name)[0])

    def mean(self, name: str) -> float:
        """Mean of the values, NaN if there are none."""
        count, total, _ = self._row(name)
        return total / count if count else math.nan

    def std(self, name: str) -> float:
        """Population standard deviation: 0 for one value, NaN for none or when a value is not finite."""
        count, total, squares = self._row(name)
        if not count or not math.isfinite(total):
            return math.nan
        return math.sqrt(max(squares / count - (total / count) ** 2, 0)) if count > 1 else 0.0

    def __getitem__(self, name: str) -> float:
        return self.mean(name)

    def as_dict(self) -> dnnlib.EasyDict:
        """EasyDict name -> EasyDict(num, mean, std)."""
        return dnnlib.EasyDict(
            {
                name: dnnlib.EasyDict(num=self.num(name), mean=self.mean(name), std=self.std(name))
                for name in self.names()
            }
        )
