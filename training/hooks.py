# SPDX-License-Identifier: Apache-2.0
"""Tick hooks: all that a training run prints and writes. Tests of the rank live here."""

import contextlib
import json
import math
import os
import re
import shutil
import sys
import time

import numpy as np
import psutil
import torch

import dnnlib
from torch_utils import training_stats
from torch_utils.images import save_image_grid
from training import running, snapshot


class Hook:
    """What happens at the start of a run, at each of its ticks and at its end. `run` is training_loop.Run.

    Hooks of one tick tell later ones what they made: `run.pictures` (name -> path of a PNG), `run.snapshot_pkl`
    (path or None) and `run.results` (metric -> dict of its numbers).
    """

    def __init__(self, run):
        self.run = run

    def start(self):
        """Called once, when all is built and before the first iteration."""

    def step(self):
        """Called after each iteration."""

    def close(self):
        """Called when the run ends, however it does."""

    def tick(self):
        """Called at the end of each tick; run.this_tick has index, seconds, images and maintenance
        seconds."""

    def due(self, ticks):
        """Whether something that happens every `ticks` ticks (None: never) is due; the last tick always
        is."""
        return ticks is not None and (self.run.done or self.run.this_tick.index % ticks == 0)

    def path(self, name):
        """A file of the run directory."""
        return os.path.join(self.run.c.run_dir, name)


class ProgressBar(Hook):
    """How far the present tick is, on the last line of a terminal; nothing where the output is none."""

    EVERY = 0.5  # seconds between two drawings
    WIDTH = 20
    stream, shown = None, False

    def start(self):
        """Looks for a terminal: behind sys.stderr, so that log.txt gets nothing of it."""
        stream = sys.__stderr__
        usable = self.run.is_main and stream is not None and stream.isatty()
        self.stream = stream if usable else None
        self.drawn = time.monotonic()
        self.run.clear_line = self.clear

    def step(self):
        """Draws the bar, now and then."""
        if self.stream is None or time.monotonic() - self.drawn < self.EVERY:
            return
        run = self.run
        images = run.counters.nimg - run.tick_began_nimg
        rate = images / max(time.time() - run.tick_began, 1e-9)
        target = run.c.kimg_per_tick * 1000
        since = min(run.counters.nimg - run.counters.tick_start_nimg, target)
        full = round(self.WIDTH * since / target)
        left = max(run.c.total_kimg * 1000 - run.counters.nimg, 0) / rate
        text = (
            f"tick {run.counters.tick} [{'#' * full}{'.' * (self.WIDTH - full)}] {since:.0f}/{target:.0f} images"
            f"  {rate:.1f} img/s  eta {dnnlib.util.format_time(left)}"
        )
        self._write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        self.shown, self.drawn = True, time.monotonic()

    def clear(self):
        """Takes the bar away."""
        if self.shown:
            self._write("\r\x1b[K")
            self.shown = False

    def _write(self, text):
        with contextlib.suppress(OSError, ValueError):  # a terminal that went away must not end a training
            self.stream.write(text)
            self.stream.flush()

    def tick(self):
        """Makes room for what the others print."""
        self.clear()

    def close(self):
        """Leaves a clean line."""
        self.clear()


class StatusLine(Hook):
    """The family's status line, then images per second and the time left."""

    def tick(self):
        """Prints the line and reports its numbers as statistics."""
        run, tick = self.run, self.run.this_tick
        report = training_stats.report0
        total = run.total_seconds()
        per_kimg = tick.seconds / tick.images * 1e3
        left = max(run.c.total_kimg - run.kimg, 0) * per_kimg
        memory = psutil.Process(os.getpid()).memory_info().rss / 2**30
        fields = [
            f"tick {report('Progress/tick', tick.index):<5d}",
            f"kimg {report('Progress/kimg', run.kimg):<8.1f}",
            f"time {dnnlib.util.format_time(report('Timing/total_sec', total)):<12s}",
            f"sec/tick {report('Timing/sec_per_tick', tick.seconds):<7.1f}",
            f"sec/kimg {report('Timing/sec_per_kimg', per_kimg):<7.2f}",
            f"maintenance {report('Timing/maintenance_sec', tick.maintenance):<6.1f}",
            f"cpumem {report('Resources/cpu_mem_gb', memory):<6.2f}",
            f"gpumem {report('Resources/peak_gpu_mem_gb', self._gpu_memory()):<6.2f}",
            f"augment {report('Progress/augment', run.augment.strength):.3f}",
            f"  img/s {1e3 / per_kimg:<6.1f}",
            f"eta {dnnlib.util.format_time(left)}",
        ]
        report("Timing/total_hours", total / 3600)
        report("Timing/total_days", total / 86400)
        run.say(" ".join(fields))

    def _gpu_memory(self):
        if self.run.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.run.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.run.device)
        return peak


def setup_snapshot_image_grid(training_set, random_seed=0):
    """Picks the pictures of the run's grids: ((columns, rows), images uint8 [n, C, H, W], labels [n, ...]).

    As many as fit 7680 x 4320 pixels, at least 7 x 4, at most 32 x 32. Without labels: a shuffle of all
    pictures, wrapping. With labels: one label a row (sorted by the reversed raw label), its pictures
    shuffled.
    """
    rnd = np.random.RandomState(random_seed)
    gw = int(np.clip(7680 // training_set.image_shape[2], 7, 32))
    gh = int(np.clip(4320 // training_set.image_shape[1], 4, 32))
    order = list(range(len(training_set)))
    if not training_set.has_labels:
        rnd.shuffle(order)
        picks = [order[i % len(order)] for i in range(gw * gh)]
    else:
        groups = {}
        for i in order:
            raw = tuple(np.atleast_1d(training_set.get_details(i).raw_label).flat[::-1])
            groups.setdefault(raw, []).append(i)
        rows = [groups[key] for key in sorted(groups)]
        for row in rows:
            rnd.shuffle(row)
        picks = []
        for y in range(gh):
            row = rows[y % len(rows)]
            first = (y // len(rows)) * gw  # a label that comes again goes on where it stopped
            picks += [row[(first + x) % len(row)] for x in range(gw)]
    images, labels = zip(*(training_set[i] for i in picks), strict=True)
    return (gw, gh), np.stack(images), np.stack(labels)


class ImageGrids(Hook):
    """reals.png, fakes_init.png and fakes%06d.png: the same latents throughout a run."""

    CHUNK = 32

    def start(self):
        """Writes the grid of real pictures and, for a new run, what the networks give at the start."""
        run = self.run
        if not run.is_main or run.c.image_snapshot_ticks is None:
            return
        self.grid_size, images, labels = setup_snapshot_image_grid(run.training_set)
        rnd = torch.Generator().manual_seed(run.c.random_seed)
        self.z = torch.randn([labels.shape[0], run.G.z_dim], generator=rnd)
        self.c = torch.from_numpy(labels)
        if not run.c.exact_resume:
            run.say("Exporting sample images...")
            save_image_grid(images, self.path("reals.png"), drange=[0, 255], grid_size=self.grid_size)
            run.pictures["reals"] = self.path("reals.png")
            self._write("fakes_init.png")

    def tick(self):
        """Writes the grid when it is due."""
        if self.run.is_main and self.due(self.run.c.image_snapshot_ticks):
            self._write(f"fakes{self.run.counters.nimg // 1000:06d}.png")

    @torch.no_grad()
    def _write(self, name):
        device = self.run.device
        parts = zip(self.z.split(self.CHUNK), self.c.split(self.CHUNK), strict=True)
        images = [self.run.G_ema(z.to(device), c.to(device), noise_mode="const").cpu() for z, c in parts]
        save_image_grid(torch.cat(images).numpy(), self.path(name), drange=[-1, 1], grid_size=self.grid_size)
        self.run.pictures["fakes"] = self.path(name)


class Snapshots(Hook):
    """network-snapshot-%06d.pkl."""

    def tick(self):
        """Writes the networks when they are due; run.snapshot_pkl is the latest file (None before the
        first)."""
        run = self.run
        run.snapshot_pkl = None
        if not self.due(run.c.network_snapshot_ticks):
            return
        run.snapshot_pkl = self.path(f"network-snapshot-{run.counters.nimg // 1000:06d}.pkl")
        if run.is_main:
            snapshot.save_network_pkl(
                run.snapshot_pkl,
                G=run.G,
                D=run.D,
                G_ema=run.G_ema,
                augment_pipe=run.augment.pipe,
                training_set_kwargs=run.c.training_set_kwargs,
            )


class StatsLog(Hook):
    """stats.jsonl: all reported statistics, one line a tick."""

    warned = False

    def start(self):
        """Says, as the family does, that what follows is logged."""
        self.run.say("Initializing logs...")

    def tick(self):
        """Collects and appends; says once when gradients were not finite."""
        run = self.run
        for phase in run.phases:
            took = phase.timer.milliseconds()
            training_stats.report0(f"Timing/{phase.name}", [] if took is None else took)
        run.stats.update()
        if run.is_main:
            line = dict(run.stats.as_dict(), timestamp=time.time())
            with open(self.path("stats.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps(line, default=float) + "\n")
        if run.stats["Progress/nonfinite"] > 0 and not self.warned:
            self.warned = True
            run.say(
                "Warning: some gradients were nan or infinite and have been replaced; Progress/nonfinite in stats.jsonl"
                " counts them. If that goes on, lower the learning rate or train with --precision=fp32 or bf16"
            )


class Checkpoints(Hook):
    """checkpoint.pt with every snapshot; the loop itself writes one where that takes too long."""

    def tick(self):
        """Writes it when there was a snapshot."""
        if self.run.snapshot_pkl is not None:
            self.run.checkpoint_now()


class Metrics(Hook):
    """Evaluates each snapshot with the run's metrics."""

    def start(self):
        """Looks whether the metrics can be had at all: warns once and goes on without them where they
        cannot."""
        from metrics import metric_main

        run = self.run
        self.names = []
        for name in run.c.metrics:
            problem = metric_main.why_unavailable([name], **run.c.metric_kwargs)
            if problem:
                run.say(f"Warning: training without {name}: {problem}")
            else:
                self.names.append(name)

    def tick(self):
        """Runs the metrics on the snapshot of this tick, if there is one."""
        run = self.run
        if run.snapshot_pkl is None or not self.names:
            return
        from metrics import metric_main

        run.say("Evaluating metrics...")
        shared = {} if len(self.names) > 1 else None  # features that one metric computes and others use
        for name in self.names:
            try:
                result = metric_main.calc_metric(
                    metric=name,
                    G=run.G_ema,
                    dataset_kwargs=run.c.training_set_kwargs,
                    num_gpus=run.c.num_gpus,
                    rank=run.rank,
                    device=run.device,
                    run_dir=run.c.run_dir,
                    shared=shared,
                    **run.c.metric_kwargs,
                )
            except Exception as err:  # a metric that fails must not end a training
                run.say(f"Warning: {name} could not be computed: {type(err).__name__}: {err}")
                continue
            run.results[name] = result.results
            if run.is_main:
                metric_main.report_metric(result, run_dir=run.c.run_dir, snapshot_pkl=run.snapshot_pkl)


class KeepBest(Hook):
    """network-snapshot-best.pkl: a copy of the snapshot with the best value of one metric; best.json says which."""

    def start(self):
        """Goes on from the best so far of a continued run, if it was judged by the same metric."""
        run = self.run
        self.best = None
        if run.c.best is None:
            return
        self.metric, self.ending, self.better = running.parse_best(run.c.best)
        if run.c.exact_resume and os.path.isfile(self.path("best.json")):
            try:
                with open(self.path("best.json"), encoding="utf-8") as f:
                    best = json.load(f)
                metric, kimg, value = best["metric"], float(best["kimg"]), float(best["value"])
            except (KeyError, TypeError, ValueError) as err:
                raise OSError(
                    f"{self.path('best.json')} is damaged; without it the next snapshot is the best"
                ) from err
            if metric == run.c.best and kimg <= run.kimg:
                self.best = value

    def tick(self):
        """Copies this tick's snapshot if it is better than all before."""
        run = self.run
        if not run.is_main or run.c.best is None or self.metric not in run.results:
            return
        value = next(v for k, v in run.results[self.metric].items() if self.ending in k)
        if not math.isfinite(value):
            return
        if self.best is not None and (value >= self.best if self.better == "lower" else value <= self.best):
            return
        self.best = value
        name = os.path.basename(run.snapshot_pkl)
        with (
            open(run.snapshot_pkl, "rb") as source,
            dnnlib.util.open_atomic(self.path("network-snapshot-best.pkl")) as f,
        ):
            shutil.copyfileobj(source, f)
        record = dict(metric=run.c.best, value=value, kimg=run.kimg, snapshot_pkl=name)
        with dnnlib.util.open_atomic(self.path("best.json")) as f:
            f.write(json.dumps(record).encode("utf-8"))
        run.say(f"Best {run.c.best} so far: {name}")


class KeepLast(Hook):
    """Deletes old snapshots of this run beyond the number to keep. What a continuation needs is in checkpoint.pt, and
    the best one is a file of its own."""

    def tick(self):
        """Looks when a snapshot was written."""
        run = self.run
        if not run.is_main or run.c.keep_last is None or run.snapshot_pkl is None:
            return
        numbers = (re.fullmatch(r"network-snapshot-(\d+)\.pkl", name) for name in os.listdir(run.c.run_dir))
        past = sorted((int(m[1]), m[0]) for m in numbers if m and int(m[1]) <= run.counters.nimg // 1000)
        for _kimg, name in past[: -run.c.keep_last]:
            os.remove(self.path(name))


class Progress(Hook):
    """Calls the run's progress_fn(kimg, total_kimg)."""

    def start(self):
        """Reports the beginning."""
        self._report(0)

    def tick(self):
        """Reports the images seen."""
        self._report(self.run.counters.nimg // 1000)

    def _report(self, kimg):
        if self.run.progress_fn is not None:
            self.run.progress_fn(kimg, self.run.c.total_kimg)
