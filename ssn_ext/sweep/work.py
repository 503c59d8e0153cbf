# SPDX-License-Identifier: Apache-2.0
"""Doing what a sweep lacks: processes of train.py and calc_metrics.py, their order, and the time they take."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ssn_ext.sweep import plan
from training import configs

ROOT = Path(__file__).parents[2]  # where train.py and calc_metrics.py lie
SPEED_STEPS = 16  # of a trial: once every phase of the lazy regularisers
STATUS_SECONDS = 5


class StepError(RuntimeError):
    """A training or a measurement that failed, in one line."""


class Stopped(Exception):
    """The sweep was asked to stop."""


class Processes:
    """The scripts that run at the moment, in processes of their own; all of them can be asked to end."""

    def __init__(self):
        self.stopped = False
        self._running = set()
        self._lock = threading.RLock()  # a signal may come while this thread holds it
        self.inherited = ()  # file descriptors that the processes keep open

    def run(self, script, args, log, env):
        """Runs a script of the house to its end, what it prints appended to the file `log`. Returns its exit status;
        Stopped where nothing may begin any more."""
        command = [sys.executable, str(ROOT / script), *args]
        with open(log, "ab") as out:
            with self._lock:
                if self.stopped:
                    raise Stopped
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **env},
                    pass_fds=self.inherited,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self):
        """Sends SIGTERM to all of them, after which a training saves and ends; nothing more begins."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


@contextlib.contextmanager
def stop_on_signals(processes, say):
    """Inside, Ctrl-C and SIGTERM let the trainings save and end; once more ends them at once."""

    def handle(number, _frame):
        if not processes.stopped:
            say(
                f"{signal.Signals(number).name}: trainings finish their step and save; once more ends them at once."
            )
        processes.stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # signals are somebody else's business
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_one(outdir, processes):
    """Two sweeps must not write into one folder: ValueError where another one, or a training that it left, is at work.

    The lock is held by this process and those that it starts. Systems without flock do without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(os.path.join(outdir, ".lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"--outdir: another sweep, or a training that it began, is at work in {outdir}"
            ) from None
        processes.inherited = (f.fileno(),)
        yield


# ----------------------------------------------------------------------------------------
# Time


@dataclass
class Budget:
    """What a run lacks: thousands of pictures, lines of results; and how long that takes (None: not known)."""

    run: plan.Run
    kimg_done: float
    speed: float | None  # pictures a second
    lines: int
    lines_missing: int
    measuring: float | None  # seconds

    @property
    def training(self):
        """Seconds of training that are missing."""
        left = 0.0 if self.run.kimg is None else max(self.run.kimg - self.kimg_done, 0.0)
        return 0.0 if left == 0 else None if self.speed is None else left * 1000 / self.speed


def budgets(runs, s, speeds):
    """A Budget for each run. speeds: kind -> pictures a second, of trials; a run's own statistics go before them."""
    known = {**speeds, **{run.kind: speed for run in runs if (speed := own_speed(run)) is not None}}
    took = {
        metric: _typical(
            [line["total_time"] for run in runs for line in plan.results(run, metric, s).values()]
        )
        for metric in s.metrics
    }
    rows = []
    for run in runs:
        names = [name for names in plan.missing(run, s).values() for name in names]
        times = [took[name] for name in names]
        bare = run.snapshot is not None and run.run_dir() is None
        rows.append(
            Budget(
                run=run,
                kimg_done=run.kimg_done() or 0.0,
                speed=own_speed(run) or known.get(run.kind),
                lines=0 if bare else len(plan.metrics_of(run, s)) * len(s.metric_seeds),
                lines_missing=len(names),
                measuring=None if None in times else sum(times),
            )
        )
    return rows


def own_speed(run):
    """Pictures a second of a run's latest tick but the first, which warms up; None where there is none."""
    line = plan.last_stats(run.run_dir()) if run.snapshot is None else None
    if line is None or line["Progress/tick"]["mean"] == 0:
        return None
    return 1000 / line["Timing/sec_per_kimg"]["mean"]


def seconds_left(rows, jobs):
    """(seconds for all that is missing when `jobs` run side by side, whether all of it could be estimated).

    The first row is the base, which the others wait for; after that nothing is faster than the longest run.
    """
    base, *others = [(row.training or 0.0) + (row.measuring or 0.0) for row in rows]
    known = all(seconds is not None for row in rows for seconds in (row.training, row.measuring))
    return base + max([sum(others) / jobs, *others]), known


def _typical(values):
    return sorted(values)[len(values) // 2] if values else None


# ----------------------------------------------------------------------------------------
# Work


class Sweep:
    """Checks, trains and measures. `say` prints a line; `show_status` draws over the last line of a terminal."""

    def __init__(self, s, base, runs, processes, say, show_status=lambda text: None):
        self.s, self.base, self.runs, self.processes = s, base, runs, processes
        self.say, self.show_status = say, show_status
        self.speeds = {}
        self.devices = queue.Queue()
        for i in range(s.jobs):
            self.devices.put(s.devices[i % len(s.devices)] if s.devices else None)

    @property
    def everything(self):
        """The base and all runs."""
        return [self.base, *self.runs]

    def check(self, images_per_second=None):
        """Compares what is there with what is asked for; lets train.py read the options of each kind of run that is
        missing and, without images_per_second, do a few steps of it. ValueError, StepError for what cannot be."""
        for run in self.everything:
            plan.check_recorded(run, self.s)
        timed = {run.kind for run in self.everything if own_speed(run) is not None}
        todo = {run.kind: run for run in reversed(self.everything) if run.final() is None}
        for kind, run in reversed(todo.items()):
            self.show_status(f"Checking and timing {run.title}")
            text = self._trial(run, "--dry-run")[0]
            if images_per_second is not None:
                self.speeds[kind] = images_per_second
            elif kind not in timed:
                self.speeds[kind] = self._time(run, int(re.search(r'"batch_size": (\d+)', text)[1]))

    def _time(self, run, batch):
        """Pictures a second of a run of this kind, from a few steps after the first."""
        short = dict(
            total_kimg=batch * (SPEED_STEPS + 1) / 1000,
            kimg_per_tick=batch * SPEED_STEPS / 1000,
            image_snapshot_ticks="null",
            network_snapshot_ticks="null",
        )
        return 1000 / self._trial(run, *[f"--set={k}={v}" for k, v in short.items()])[1]

    def _trial(self, run, *args):
        """Lets train.py do something else with the options of a run, in a folder that goes away: (what it printed,
        seconds per thousand pictures in the last tick or None). Begins without the base where that is not there yet."""
        with tempfile.TemporaryDirectory() as folder:
            text = self._script("train.py", [*self._new(run, folder), *args], folder, run.title, keep=False)
            line = plan.last_stats(max((path for _number, path in configs.run_dirs(folder)), default=None))
            return text, line and line["Timing/sec_per_kimg"]["mean"]

    def do(self):
        """Trains and measures what is missing, `jobs` at a time, the base first. Returns the failures, a line each;
        Stopped where the sweep was asked to stop."""
        failures = []
        todo = [run for run in self.everything if run.final() is None or plan.missing(run, self.s)]
        with ThreadPoolExecutor(self.s.jobs) as pool:
            if self.base in todo and self.base.final() is None:
                self._wait({pool.submit(self._train, self.base): self.base}, failures)
            if self.base.final() is not None:
                self._wait({pool.submit(self._train_and_measure, run): run for run in todo}, failures)
        if self.processes.stopped:
            raise Stopped
        return failures

    def _wait(self, futures, failures):
        """Waits for all, telling how it goes."""
        open_ = set(futures)
        while open_:
            done, open_ = wait(open_, timeout=STATUS_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, StepError):
                    failures.append(str(error))
                    self.say(f"Failed: {error}")
                elif error is not None and not isinstance(error, Stopped):
                    self.processes.stop()
                    raise error
            if not self.processes.stopped:
                self.show_status(self.status())

    def status(self):
        """How far the sweep is, in a line."""
        rows = budgets(self.everything, self.s, self.speeds)
        complete = [row for row in rows if row.training == 0 and row.lines_missing == 0]
        under_way = [
            f"{row.run.title} {row.kimg_done:.1f} of {row.run.kimg} kimg"
            for row in rows
            if row.training != 0 and row.kimg_done > 0
        ]
        seconds, whole = seconds_left(rows, self.s.jobs)
        about = f"{'' if whole else 'more than '}{duration(seconds)} left"
        return "; ".join([f"{len(complete)} of {len(rows)} runs done", *under_way, about])

    def _train_and_measure(self, run):
        self._train(run)
        self._measure(run)

    def _train(self, run):
        """Lets train.py begin the run, or go on with it, until its snapshot is there."""
        if run.final() is not None:
            return
        os.makedirs(run.folder, exist_ok=True)
        path = run.run_dir()
        if path is None:
            args = [*self._new(run, run.folder), f"--kimg={run.kimg}"]
        else:
            args = [f"--resume={path}", f"--kimg={run.kimg}"]
        self.say(f"{run.title}: {'training' if path is None else 'going on'}")
        self._script("train.py", args, run.folder, run.title)
        if run.final() is None:
            raise StepError(f"{run.title}: train.py left no snapshot at {run.kimg} kimg in {run.folder}")

    def _measure(self, run):
        """Lets calc_metrics.py write the lines that are missing, for each seed the metrics of a detector together."""
        lacking = plan.missing(run, self.s)
        if lacking:
            from training.checkpoint import cut_back_logs

            cut_back_logs(run.run_dir(), kimg=1e12)  # a half-written last line would spoil the next one
        for seed, names in lacking.items():
            judged = [name for name in names if plan.needed_detector(name, self.s.detector) is not None]
            others = [name for name in names if name not in judged]
            for chosen, detector in [(judged, self.s.detector), (others, None)]:
                if not chosen:
                    continue
                self.say(f"{run.title}: measuring {', '.join(chosen)}, seed {seed}")
                args = [f"--network={run.final()}", f"--metrics={','.join(chosen)}", f"--seed={seed}"]
                args += [f"--data={self.s.data}", f"--gpus={self.s.gpus}"]
                args += [f"--detector={detector}"] if detector else []
                self._script("calc_metrics.py", args, run.folder, run.title)
        if plan.missing(run, self.s):
            raise StepError(f"{run.title}: calc_metrics.py left lines of results out")

    def _new(self, run, outdir):
        """Arguments of a new training, from the base where that is there."""
        args = [
            f"--outdir={outdir}",
            f"--data={self.s.data}",
            f"--gpus={self.s.gpus}",
            "--metrics=none",
            f"--seed={run.seed or 0}",
        ]
        base = self.base.final()
        if run.name != plan.BASE and base is not None:
            args.append(f"--resume={os.path.abspath(base)}")
        return [*args, *run.options]

    def _script(self, script, args, folder, title, keep=True):
        """Runs a script with its output appended to folder/output.txt; returns what it printed. StepError where it
        fails; it names that file if it is to be kept."""
        os.makedirs(folder, exist_ok=True)
        log = os.path.join(folder, "output.txt")
        begin = os.path.getsize(log) if os.path.isfile(log) else 0
        device = self.devices.get()
        env = {"OMP_NUM_THREADS": str(self.s.threads), **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
        try:
            status = self.processes.run(script, args, log, env)
        finally:
            self.devices.put(device)
        with open(log, "rb") as f:
            f.seek(begin)
            text = f.read().decode("utf-8", errors="replace")
        if status != 0 and self.processes.stopped:
            raise Stopped
        if status != 0:
            said = [line.strip() for line in text.splitlines() if line.strip()]
            last = said[-1].removeprefix("Error: ") if said else f"exit status {status}"
            raise StepError(f"{title}: {script}: {last}" + (f" (more in {log})" if keep else ""))
        return text


def duration(seconds):
    """A duration for people: '40 s', '12 min', '3 h 05 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
