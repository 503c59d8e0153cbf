# SPDX-License-Identifier: Apache-2.0
"""How far a long computation is, and how long it will take."""

import sys
import time

import dnnlib


class ProgressMonitor:
    """Says how far a stage is: a line that is rewritten, on a terminal, else a line every `flush_interval`
    items.

    progress_fn(position, pfn_total) is called with positions from pfn_lo to pfn_hi, for a bar around several
    stages.
    """

    def __init__(
        self, tag=None, num_items=None, flush_interval=1000, verbose=False, progress_fn=None,
        pfn_lo=0, pfn_hi=1000, pfn_total=1000,
    ):  # fmt: skip
        self.tag, self.num_items, self.flush_interval, self.verbose = tag, num_items, flush_interval, verbose
        self.progress_fn, self.pfn_lo, self.pfn_hi, self.pfn_total = progress_fn, pfn_lo, pfn_hi, pfn_total
        self.start_time = self.shown_time = time.monotonic()
        self.shown_items = 0
        self._call_back(0)

    def update(self, cur_items):
        """Tells that `cur_items` of the stage's items are done."""
        now = time.monotonic()
        done = self.num_items is not None and cur_items >= self.num_items
        terminal = getattr(sys.stdout, "isatty", lambda: False)()
        due = (
            now - self.shown_time >= 0.5 if terminal else cur_items - self.shown_items >= self.flush_interval
        )
        if not (due or (done and self.shown_items < cur_items)):
            return
        self.shown_time, self.shown_items = now, cur_items
        if self.verbose and self.tag is not None:
            seconds = now - self.start_time
            if terminal:
                print(f"\r{self._bar(cur_items, seconds):<79s}", end="\n" if done else "", flush=True)
            else:
                print(self._line(cur_items, seconds), flush=True)
        self._call_back(cur_items)

    def _line(self, items, seconds):
        total = f"/{self.num_items}" if self.num_items is not None else ""
        line = f"{self.tag:<19s} items {f'{items}{total}':<15s} time {dnnlib.util.format_time(seconds):<12s}"
        line += f" ms/item {seconds / max(items, 1) * 1e3:<8.2f}"
        if self.num_items is not None and items < self.num_items:
            line += f" eta {dnnlib.util.format_time(seconds / max(items, 1) * (self.num_items - items))}"
        return line

    def _bar(self, items, seconds):
        """At most 79 characters, with the time that is left."""
        rate = f"{seconds / max(items, 1) * 1e3:.1f} ms/item"
        if self.num_items is None:
            return f"{self.tag:<19s} {items} items, {rate}"[:79]
        left = seconds / max(items, 1) * max(self.num_items - items, 0)
        time_left = (
            f"eta {dnnlib.util.format_time(left)}" if left else f"in {dnnlib.util.format_time(seconds)}"
        )
        share = 100 * items // max(self.num_items, 1)
        return f"{self.tag:<19s} {share:3d}% {items}/{self.num_items}, {rate}, {time_left}"[:79]

    def _call_back(self, items):
        if self.progress_fn is not None:
            share = min(items / self.num_items, 1) if self.num_items else 0
            self.progress_fn(self.pfn_lo + (self.pfn_hi - self.pfn_lo) * share, self.pfn_total)

    def sub(self, tag=None, num_items=None, flush_interval=1000, rel_lo=0, rel_hi=1):
        """A monitor for one stage, which covers the part rel_lo..rel_hi of this one's range."""
        span = self.pfn_hi - self.pfn_lo
        lo, hi = self.pfn_lo + span * rel_lo, self.pfn_lo + span * rel_hi
        return ProgressMonitor(
            tag, num_items, flush_interval, self.verbose, self.progress_fn, lo, hi, self.pfn_total
        )
