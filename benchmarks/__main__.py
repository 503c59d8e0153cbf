# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmarks."""

import datetime
import os
import platform
import subprocess

import click
from click.core import ParameterSource

from benchmarks.scaling import AXES
from dnnlib.cli import CommaList, user_errors

KINDS = ["stylegan2", "ssn-no-encoder", "ssn"]
GROUPS = ["generator", "training", "augment", "dataset", "metrics", "resampling"]
EPILOG = """\b
Examples:
  python -m benchmarks --quick
  python -m benchmarks --only=generator --precision=bf16 --out=benchmarks
  python -m benchmarks scaling --only=resolution,batch
"""


def configuration(ctx):
    """Lines that say with what command, on what machine, with what software and options a table was made."""
    import torch

    options = {name: value for name, value in ctx.params.items() if value not in (None, []) and name != "out"}
    return [
        f"- command: {_command(ctx)}",
        f"- commit: {_commit()}",
        f"- processor: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"- Python {platform.python_version()}, PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        f"- options: {', '.join(f'{name}={value}' for name, value in options.items())}",
    ]


def _command(ctx):
    """What was typed, but for `--out`."""
    words = ["python -m benchmarks", *([ctx.info_name] if ctx.parent is not None else [])]
    for option in ctx.command.params:
        value = ctx.params.get(option.name)
        if ctx.get_parameter_source(option.name) != ParameterSource.COMMANDLINE or option.name == "out":
            continue
        if isinstance(value, bool):
            words.append((option.opts if value else option.secondary_opts)[0])
        else:
            words.append(f"{option.opts[0]}={','.join(value) if isinstance(value, list | tuple) else value}")
    return " ".join(words)


def _commit():
    """The commit of this code, and whether files that git follows are other than in it."""
    git = ["git", "-C", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    try:
        done = [
            subprocess.run([*git, *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done[0] + (" with changes" if done[1] else "")


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def finish(ctx, theme, lines, out):
    """Prints the report; with `out`, a folder, also writes it there as [theme]_[hardware]_[date].md."""
    text = "\n".join([f"# {theme}", "", *configuration(ctx), "", *lines, ""])
    click.echo(text)
    if out is not None:
        hardware = "-".join("".join(ch if ch.isalnum() else " " for ch in _processor().lower()).split())
        name = f"{theme}_{hardware}_{os.cpu_count()}cores_{datetime.date.today()}.md"
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            file.write(text)
        click.echo(f"Written to {os.path.join(out, name)}")


SHARED = [
    click.option("--threads", type=click.IntRange(min=1), help="Threads of PyTorch  [default: all cores]"),
    click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True,
                 help="cpu: processor time, for one thread on a machine that others use"),
    click.option("--keep-memory/--default-memory", default=True, help="As train.py does, or the C library's habit"),
    click.option("--out", type=click.Path(exists=True, file_okay=False), help="Folder to write the table to"),
]  # fmt: skip


def shared_options(command):
    """The options that both commands have."""
    for option in reversed(SHARED):
        command = option(command)
    return command


def prepare(threads, clock, keep_memory):
    """The Machine; sets the number of threads and what the C library does with freed memory."""
    import torch

    from benchmarks.measure import Machine
    from torch_utils import misc

    if keep_memory:
        misc.keep_memory()

    if threads is not None:
        torch.set_num_threads(threads)
    return Machine(clock)


def check_names(option, values, known):
    """ValueError for a value that is not among the known ones."""
    unknown = sorted(set(values or []) - set(known))
    if unknown:
        raise ValueError(f"{option}={','.join(unknown)} is not known; there are {', '.join(known)}")


@click.group(invoke_without_command=True, epilog=EPILOG, context_settings=dict(max_content_width=120))
@click.option("--only", type=CommaList(), help=f"Some of {','.join(GROUPS)}  [default: all]")
@click.option("--kinds", type=CommaList(), help=f"Some of {','.join(KINDS)}  [default: all]")
@click.option(
    "--resolution", type=click.IntRange(min=4), help="Side of the pictures  [default: each group's]"
)
@click.option("--batch", type=click.IntRange(min=1), help="Pictures at a time  [default: each group's]")
@click.option(
    "--channel-base", type=click.IntRange(min=1), help="Width of the networks  [default: each group's]"
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Times every case runs"
)
@click.option("--quick", is_flag=True, help="Two rounds: a first impression")
@shared_options
@click.pass_context
def main(
    ctx,
    only,
    kinds,
    resolution,
    batch,
    channel_base,
    precision,
    rounds,
    quick,
    threads,
    clock,
    keep_memory,
    out,
):
    """Time this code on this machine, as shares of the machine's own matrix rate.

    All cases take turns, so that what else the machine does hits them alike: the ratios of one run count, not
    the times. Operations are counted as PyTorch's own convolutions and matrix products do them, 2 for every
    multiply-add: an algorithm that needs fewer may pass 100%. Filters and everything elementwise count as nothing,
    so that their time lowers the share.
    """
    if ctx.invoked_subcommand is not None:
        return
    with user_errors():
        check_names("--only", only, GROUPS)
        check_names("--kinds", kinds, KINDS)
        machine = prepare(threads, clock, keep_memory)
        from benchmarks import cases, measure

        settings = cases.Settings(resolution, batch, channel_base, precision, tuple(kinds or KINDS))
        made = [case for name in only or GROUPS for case in cases.GROUPS[name](settings)]
        measure.measure(made, machine, 2 if quick else rounds)
        rows = [*made, *measure.totals(made)]
        rates = [
            f"{str(k).split('.')[-1]} {rate / 1e9:.0f} GFLOP/s" for k, rate in machine.matrix_rates.items()
        ]
        lines = [
            f"Matrix product of the machine: {', '.join(rates)}; copy: {machine.copy_rate / 1e9:.1f} GB/s",
            "",
        ]
        finish(ctx, "speed", [*lines, *measure.table(rows, machine), *measure.ratio_table(rows)], out)


@main.command(context_settings=dict(max_content_width=120))
@click.option("--only", type=CommaList(), help=f"Some of {','.join(AXES)}  [default: all]")
@click.option("--quick", is_flag=True, help="The three smallest sizes of each")
@shared_options
@click.pass_context
def scaling(ctx, only, quick, threads, clock, keep_memory, out):
    """How time and memory of a training step grow with resolution, batch, width and grid, with fitted exponents."""
    with user_errors():
        check_names("--only", only, AXES)
        prepare(threads, clock, keep_memory)
        import torch

        from benchmarks.scaling import report

        finish(ctx, "scaling", report(only or list(AXES), quick, torch.get_num_threads(), clock), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
