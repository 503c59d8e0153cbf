# SPDX-License-Identifier: Apache-2.0
"""The command: parse, plan, show, work, write."""

import os
import shlex
import shutil
import subprocess
import sys
import threading

import click

import dnnlib
from dnnlib.cli import CommaList, FiniteRange, NumRange, user_errors
from dnnlib.plugins import load_plugins
from metrics import metric_main
from ssn_ext.sweep import plan, plot, table, work
from training import configs

EPILOG = """\b
Examples:
  # On the shipped pictures, with a detector that works offline: plan and minutes first, then all of it.
  python -m ssn_ext.sweep --outdir=sweeps/demo --gpus=0 --jobs=2 --detector=efficientnet-lite0-128 --dry-run
  python -m ssn_ext.sweep --outdir=sweeps/demo --gpus=0 --jobs=2 --detector=efficientnet-lite0-128
\b
  # From a network of one's own; one method more.
  python -m ssn_ext.sweep --outdir=sweeps/faces --data=faces.zip --base=network-snapshot-005000.pkl --kimg=1000 \\
      --lambda-d=0,100 --variant="zero-padded: --lambda-d=100 --demodulation=zero-padded"
"""


class Lambdas(click.ParamType):
    """Comma-separated weights >= 0."""

    name = "list"

    def convert(self, value, param, ctx):
        """The numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in CommaList().convert(value, param, ctx))
        except ValueError:
            numbers = (-1.0,)
        if not all(0 <= number < float("inf") for number in numbers):
            self.fail(f"cannot read {value!r}: numbers from 0 on such as '0,10,100', or 'none'", param, ctx)
        return numbers


@click.command(epilog=EPILOG)
@click.option(
    "--outdir",
    required=True,
    metavar="DIR",
    help="Where the sweep lives; the same again fills in what is missing",
)
@click.option(
    "--data", default="demo", show_default=True, metavar="PATH", help="Pictures: folder or zip, or 'demo'"
)
@click.option(
    "--base", metavar="PKL", help="StyleGAN2 snapshot that all runs start from  [default: trained first]"
)
@click.option(
    "--base-kimg",
    type=click.IntRange(min=1),
    default=70,
    show_default=True,
    metavar="INT",
    help="Its length, where the sweep trains it",
)
@click.option(
    "--cfg",
    metavar="NAME",
    help="Config of the baseline  [default: that of --base's run directory, else laptop]",
)
@click.option(
    "--kimg",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="INT",
    help="Length of each run; more later goes on",
)
@click.option(
    "--lambda-d",
    "lambdas",
    type=Lambdas(),
    default="0,10,100,1000",
    show_default=True,
    metavar="LIST",
    help="One run of --cfg=ssn for each",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="'NAME: OPTIONS'",
    help="One run more, with these options of train.py; may be repeated",
)
@click.option(
    "--variants", "variants_file", metavar="JSON", help='The same from a file: {"NAME": "OPTIONS", ...}'
)
@click.option(
    "--options",
    default="",
    metavar="OPTIONS",
    help="Options of train.py for all runs",
)
@click.option(
    "--train-seeds",
    type=NumRange(),
    default="1",
    show_default=True,
    metavar="LIST",
    help="One training of each run for each",
)
@click.option(
    "--metrics",
    type=CommaList(),
    default="fid5k,kid5k,ppl2_wend_2k,ldbr_dist,ldbr_floor",
    show_default=True,
    metavar="LIST",
    help="The first fid or kid is the plot's axis",
)
@click.option(
    "--metric-seeds",
    type=NumRange(),
    default="0-2",
    show_default=True,
    metavar="LIST",
    help="Each metric is computed once for each",
)
@click.option(
    "--detector",
    metavar="PATH|NAME",
    help="As for calc_metrics.py; efficientnet-lite0-128 works offline  [default: NVIDIA's, by URL]",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="INT",
    help="GPUs for each process; 0 = CPU",
)
@click.option(
    "--devices",
    type=CommaList(),
    default="none",
    metavar="LIST",
    help="CUDA devices that --jobs take in turn, such as 0,1,2,3",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="INT",
    help="Trainings and measurements at a time",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="INT",
    help="CPU threads of each (OMP_NUM_THREADS)  [default: cores / jobs]",
)
@click.option(
    "--images-per-second",
    type=FiniteRange(min=0, min_open=True),
    metavar="FLOAT",
    help="Speed for the plan  [default: measured in a few steps]",
)
@click.option(
    "--report", is_flag=True, help="Train and measure nothing: write table and plot of what is there"
)
@click.option("-n", "--dry-run", is_flag=True, help="Show runs and minutes, and exit")
def main(**options):
    """From one StyleGAN2 snapshot: the baseline trained on and SSNs with several lambdas, for equally long, measured
    with equal seeds; writes sweep.md, sweep.csv, sweep.png and sweep.svg into --outdir.

    Ctrl-C and SIGTERM save; the same command goes on and does only what is missing. docs/sweep.md explains the table.
    """
    o = dnnlib.EasyDict(options)
    with user_errors():
        load_plugins()
        s = make_settings(o)
        base, runs = plan.make_runs(s)
        processes = work.Processes()
        sweep = work.Sweep(s, base, runs, processes, say, show_status)
        if o.report:
            for run in sweep.everything:
                plan.check_recorded(run, s)
            write(sweep)
            return
        with work.stop_on_signals(processes, say):
            try:
                sweep.check(o.images_per_second)
                show(sweep)
                if not o.dry_run:
                    os.makedirs(s.outdir, exist_ok=True)
                    raise SystemExit(launch(sweep))
            except work.Stopped:
                raise SystemExit(130) from None
            except work.StepError as err:
                raise ValueError(str(err)) from err


def make_settings(o):
    """The Settings of a command; ValueError in one line for what cannot be."""
    for name in o.metrics:
        if not metric_main.is_valid_metric(name):
            raise ValueError(
                f"--metrics: {name} is not known; there are {', '.join(metric_main.list_valid_metrics())}"
            )
        plan.needed_detector(name, o.detector)
    variants = {} if o.variants_file is None else plan.read_variants(o.variants_file)
    for text in o.variants:
        name, given = plan.parse_variant(text)
        if name in variants:
            raise ValueError(f"--variant: the name {name} stands there twice")
        variants[name] = given
    base, cfg = o.base, o.cfg
    if base is not None:
        base = dnnlib.util.open_url(configs.resolve_resume(base), return_filename=True)
        if not os.path.isfile(base):
            raise ValueError(f"--base: {o.base} is not there")
        folder = os.path.dirname(os.path.abspath(base))
        if cfg is None and os.path.isfile(os.path.join(folder, "training_options.json")):
            cfg = plan.read_options(folder)["command"].get("cfg")
    return plan.Settings(
        outdir=o.outdir,
        data=o.data,
        base=base,
        base_kimg=o.base_kimg,
        cfg=cfg or "laptop",
        kimg=o.kimg,
        lambdas=o.lambdas,
        variants=variants,
        options=plan.split_options(o.options, "--options"),
        train_seeds=tuple(o.train_seeds),
        metrics=tuple(o.metrics),
        metric_seeds=tuple(o.metric_seeds),
        detector=o.detector,
        gpus=o.gpus,
        jobs=o.jobs,
        threads=o.threads or max((os.cpu_count() or 1) // o.jobs, 1),
        devices=tuple(o.devices),
    )


def duration_or(seconds, nothing):
    """A duration in words; `nothing` for zero, '?' for None."""
    return nothing if seconds == 0 else "?" if seconds is None else work.duration(seconds)


def show(sweep):
    """Prints the plan: what each run lacks, and how long that takes."""
    s = sweep.s
    show_status("")
    rows = work.budgets(sweep.everything, s, sweep.speeds)
    lines = [["run", "options of train.py", "kimg", "images/s", "training", "results", "measuring"]]
    for row in rows:
        kimg = "" if row.run.kimg is None else f"{row.run.kimg:g}"
        if row.run.snapshot is None and row.training != 0 and row.kimg_done > 0:
            kimg = f"{row.kimg_done:.1f} of {kimg}"
        lines.append(
            [
                row.run.title,
                " ".join(text for text in row.run.options if text not in s.options),
                kimg,
                "" if row.speed is None or row.training == 0 else f"{row.speed:.3g}",
                duration_or(row.training, "there"),
                f"{row.lines - row.lines_missing} of {row.lines}",
                duration_or(row.measuring, ""),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    seconds, whole = work.seconds_left(rows, s.jobs)
    total = f"{work.duration(seconds)}{'' if whole else ', and what is marked ? (not timed yet)'}"
    click.echo(
        f"\nIn all about {total}, with {s.jobs} at a time, {s.threads} thread(s) each. Results go to {s.outdir}"
    )


def launch(sweep):
    """Does all that is missing and writes what came of it; the exit status."""
    with work.only_one(sweep.s.outdir, sweep.processes):
        try:
            failures = sweep.do()
        except work.Stopped:
            write(sweep)
            say("Stopped; the same command goes on.")
            return 130
        write(sweep)
        for failure in failures:
            say(f"Failed: {failure}")
        return 1 if failures else 0


def write(sweep):
    """Writes the table and the plot of what is there, and says where."""
    s = sweep.s
    rows, notes = table.collect(sweep.everything, s)
    rows = table.with_means(rows)
    if not rows:
        say("Nothing is trained yet: no table.")
        return
    pages = {
        "sweep.md": table.markdown(
            rows, notes, s, f"{s.kimg} kimg each, on {s.data}", provenance(s, sweep.base)
        ),
        "sweep.csv": table.comma_separated(rows, s),
    }
    for name, text in pages.items():
        table.write_text(os.path.join(s.outdir, name), text)
    click.echo(pages["sweep.md"])
    say(f"Wrote {', '.join(os.path.join(s.outdir, name) for name in pages)}")
    quality = table.quality_key(s)
    if quality is None or not plot.available():
        say(f"No plot: {plot.MISSING if quality else 'there is no fid or kid among --metrics'}")
        return
    try:
        paths = [os.path.join(s.outdir, f"sweep.{kind}") for kind in ("png", "svg")]
        plot.save(rows, quality, paths)
        say(f"Wrote {', '.join(paths)}")
    except ValueError as err:
        say(f"No plot: {err}")


def provenance(s, base):
    """What the numbers are from: name -> text."""
    import torch

    from dnnlib.download import sha256_of

    snapshot = base.final()
    given = [text for text in sys.argv[1:] if text != "--report"]
    commit = (
        subprocess.run(
            ["git", "-C", str(work.ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        if shutil.which("git")
        else ""
    )
    return {
        "command": f"`{shlex.join(['python', '-m', 'ssn_ext.sweep', *given])}`",
        "base": f"{snapshot}, sha256 {sha256_of(snapshot)[:16]}" if snapshot else "not there yet",
        "detector": s.detector or "NVIDIA's",
        "table written": f"at commit {commit or 'unknown'}, PyTorch {torch.__version__}",
    }


# ----------------------------------------------------------------------------------------
# The terminal

_lock = threading.RLock()  # a signal may come while this thread holds it


def say(text):
    """Prints a line, over the status if there is one."""
    show_status("")
    with _lock:
        click.echo(text)


def show_status(text):
    """Draws a line that the next one replaces; only on a terminal."""
    if sys.stderr.isatty():
        with _lock:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + text[:width].ljust(width) + ("" if text else "\r"))
            sys.stderr.flush()


if __name__ == "__main__":
    main(prog_name="python -m ssn_ext.sweep")
