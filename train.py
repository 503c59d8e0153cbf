# SPDX-License-Identifier: Apache-2.0
"""Train a GAN: parse, make_config, show, launch. The configs themselves are registered (training/configs,
plug-ins)."""

import json
import os
import sys

import click

import dnnlib
from dnnlib.cli import CommaList
from dnnlib.plugins import PluginError, load_plugins
from training import configs

# Options that may differ when a run is continued exactly.
FREE_TO_CHANGE = {"kimg", "workers", "snap", "metrics", "detector"}
NOT_RUN_OPTIONS = {"outdir", "resume", "dry_run"}

EPILOG = """\b
Examples:
  # A StyleGAN2 from scratch on the shipped pictures, on a CPU.
  python train.py --outdir=runs --cfg=laptop --data=demo --gpus=0
\b
  # Go on with the latest run, exactly where it stopped.
  python train.py --outdir=runs --resume=latest
\b
  # A new run that starts from trained networks.
  python train.py --outdir=runs --cfg=paper256 --data=faces.zip --resume=ffhq256
"""


class Command(click.Command):
    """Shows the options of plug-ins under headings of their own."""

    def format_options(self, ctx, formatter):
        """Writes our options, then each plug-in's."""
        groups = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                option = configs.OPTIONS.get(param.name)
                groups.setdefault("Options" if option is None else f"Options of {option.heading}", []).append(
                    record
                )
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _options(command):
    """Adds the options to the click command; those of plug-ins must be registered by now."""
    opt = click.option
    own = [
        opt("--outdir", help="Where the run directories go; needed for a new run", metavar="DIR"),
        opt(
            "--gpus",
            help="Processes, one per GPU; 0 trains on the CPU",
            type=click.IntRange(min=0),
            default=1,
            show_default=True,
        ),
        opt(
            "--device",
            help="Where to train: auto takes CUDA where there is one",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
        ),
        opt(
            "--snap", help="Snapshot interval in ticks  [default: 50, laptop: 10]", type=int, metavar="TICKS"
        ),
        opt(
            "--metrics",
            help="Comma-separated metrics run at each snapshot, or 'none'  [default: fid50k_full, laptop: none]",
            type=CommaList(),
        ),
        opt(
            "--detector",
            help="Detector of the metrics: a local path, or efficientnet-lite0  [default: the metric's own]",
            metavar="NAME",
        ),
        opt("--seed", help="Random seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
        opt("-n", "--dry-run", help="Print the options and exit", is_flag=True),
        opt("--data", help="Training pictures: folder, zip, or 'demo'", metavar="PATH"),
        opt("--cond", help="Train a conditional model on the data set's labels", type=bool, metavar="BOOL"),
        opt("--subset", help="Train with only N pictures", type=int, metavar="INT"),
        opt("--mirror", help="Add mirrored pictures", type=bool, metavar="BOOL"),
        opt(
            "--cfg",
            help="Base config",
            type=click.Choice(configs.CONFIGS.names()),
            default="auto",
            show_default=True,
        ),
        opt("--gamma", help="Override the R1 weight", type=float),
        opt("--kimg", help="Override the length of training", type=int, metavar="INT"),
        opt("--batch", help="Override the batch size", type=int, metavar="INT"),
        opt("--aug", help="Augmentation mode  [default: ada]", type=click.Choice(["noaug", "ada", "fixed"])),
        opt("--p", help="Augmentation probability for --aug=fixed", type=float),
        opt("--target", help="ADA target  [default: 0.6]", type=float),
        opt(
            "--augpipe",
            help="Augmentation pipeline  [default: bgc]",
            type=click.Choice(list(configs.AUGPIPES)),
        ),
        opt(
            "--resume",
            help="A run directory or 'latest': go on exactly. A snapshot (path, URL, "
            + ", ".join(configs.PUBLISHED)
            + "): a new run from its networks",
            metavar="WHAT",
        ),
        opt(
            "--allow-partial",
            help="Differences that the --resume file may have: resolution, widths, mapping, labels",
            type=CommaList(),
        ),
        opt(
            "--workers",
            help="DataLoader worker processes",
            type=click.IntRange(min=0),
            default=3,
            show_default=True,
        ),
        opt(
            "--set",
            help="Set any option of the loop, such as loss_kwargs.pl_weight=0",
            multiple=True,
            metavar="A.B=JSON",
        ),
    ]
    plugin = [opt(option.flag, **{"default": None, **option.kwargs}) for option in configs.OPTIONS.values()]
    for decorate in reversed(own + plugin):
        command = decorate(command)
    return command


def find_run(outdir, resume):
    """The run directory that --resume asks to continue, or None where it names networks to start from."""
    if resume is None or resume in configs.PUBLISHED:
        return None
    if resume == "latest":
        if outdir is None:
            raise configs.ConfigError("--resume=latest needs --outdir: where the runs are")
        runs = [
            path
            for _n, path in configs.run_dirs(outdir)
            if os.path.isfile(os.path.join(path, "checkpoint.pt"))
        ]
        if not runs:
            raise configs.ConfigError(f"--resume=latest: no run with a checkpoint.pt in {outdir}")
        return runs[-1]
    if not os.path.isdir(resume):
        return None
    if not os.path.isfile(os.path.join(resume, "checkpoint.pt")):
        raise configs.ConfigError(
            f"--resume: {resume} has no checkpoint.pt; give one of its snapshots to start from"
        )
    return os.path.normpath(resume)


def continue_config(run_dir, given):
    """Options of an exact continuation: those of the run, with the few that may change taken from the
    command.

    given: the options that stand on the command line. An option that must not change and does is a
    ConfigError.
    """
    path = os.path.join(run_dir, "training_options.json")
    try:
        with open(path, encoding="utf-8") as f:
            saved = dnnlib.EasyDict(json.load(f))
    except (OSError, ValueError) as err:
        raise configs.ConfigError(f"--resume: cannot read {path}: {err}") from err
    command = saved.pop("command")
    changed = {k: v for k, v in given.items() if k not in NOT_RUN_OPTIONS and v != command.get(k)}
    fixed = [
        f"--{k.replace('_', '-')}={v} (was {command.get(k)})"
        for k, v in changed.items()
        if k not in FREE_TO_CHANGE
    ]
    if fixed:
        raise configs.ConfigError(
            f"--resume={run_dir} goes on with the run's own options, but the command says {', '.join(fixed)};"
            " to start a new run from its networks, give a snapshot"
        )
    command.update(changed)
    c = configs.easy(saved)
    configs.change_running(c, changed)
    return c, command


def check_metrics(names):
    """Refuses metrics that are not registered."""
    from metrics import metric_main

    if not all(metric_main.is_valid_metric(name) for name in names):
        known = "\n".join(
            ["--metrics can only contain the following values:", *metric_main.list_valid_metrics()]
        )
        raise configs.ConfigError(known)


def plan(options, given):
    """The options of the loop for a command: run directory, and whether an earlier run is continued. Writes
    nothing."""
    check_metrics(options["metrics"] or [])
    command = {k: v for k, v in options.items() if k not in NOT_RUN_OPTIONS}
    run_dir = find_run(options["outdir"], options["resume"])
    if run_dir is not None:
        c, command = continue_config(run_dir, {k: options[k] for k in given})
        c.exact_resume = True
    else:
        if options["outdir"] is None:
            raise configs.ConfigError("--outdir is required: where the run directory is to be made")
        command["resume"] = options["resume"]
        c, desc = configs.make_config(command)
        run_dir = configs.next_run_dir(options["outdir"], desc)
    c.run_dir = run_dir
    return c, command


def show(c, command):
    """Prints the options and a summary."""
    print()
    print("Training options:")
    print(json.dumps(dict(c, command=command), indent=2))
    print()
    rows = {
        "Output directory": c.run_dir,
        "Training data": c.training_set_kwargs.path,
        "Training duration": f"{c.total_kimg} kimg",
        "Number of GPUs": c.num_gpus
        if c.device != "cpu"
        else f"none (CPU, {c.num_gpus} process{'es' * (c.num_gpus > 1)})",
        "Number of images": c.training_set_kwargs.max_size,
        "Image resolution": c.training_set_kwargs.resolution,
        "Conditional model": c.training_set_kwargs.use_labels,
        "Dataset x-flips": c.training_set_kwargs.xflip,
    }
    for title, value in rows.items():
        print(f"{title + ':':<19}{value}")
    print()


def worker(rank, c):
    """One process of the run."""
    import torch

    from torch_utils import custom_ops, training_stats
    from training.training_loop import training_loop

    load_plugins()
    if c.num_gpus > 1:
        cuda = c.device != "cpu" and torch.cuda.is_available()
        training_stats.init_multiprocessing(rank, torch.device("cuda", rank) if cuda else torch.device("cpu"))
    if rank != 0:
        custom_ops.verbosity = "none"
    with dnnlib.util.Logger(file_name=os.path.join(c.run_dir, "log.txt"), file_mode="a", should_flush=True):
        try:
            complete = training_loop(rank=rank, **c)
        except (OSError, ValueError) as err:
            if type(err) is ValueError:
                raise  # not one of our own messages to the user: show where it came from
            text = str(err)  # of an error in a worker process, the last line alone
            print(f"Error: {text.strip().splitlines()[-1] if text.startswith('Caught ') else text}")
            sys.exit(1)
    if not complete and c.num_gpus == 1:  # of several processes each just ends
        sys.exit(130)


def launch(c, command):
    """Makes the run directory, records the options, and runs the processes."""
    from torch_utils import distributed

    os.makedirs(c.run_dir, exist_ok=c.get("exact_resume", False))
    saved = dict({k: v for k, v in c.items() if k != "exact_resume"}, command=command)
    with dnnlib.util.open_atomic(os.path.join(c.run_dir, "training_options.json")) as f:
        f.write(json.dumps(saved, indent=2).encode("utf-8"))
    print("Launching processes...")
    distributed.launch(worker, c.num_gpus, args=(c,), device_type=c.device)


def _main(ctx, **options):
    """Train a GAN from a folder or zip of pictures, or go on with a run that was stopped."""
    options["set"] = list(options["set"])
    given = [k for k in options if ctx.get_parameter_source(k) == click.core.ParameterSource.COMMANDLINE]
    try:
        c, command = plan(options, given)
    except configs.ConfigError as err:
        raise click.UsageError(str(err)) from err
    show(c, command)
    if options["dry_run"]:
        print("Dry run; exiting.")
        return
    try:
        launch(c, command)
    except OSError as err:
        raise click.ClickException(f"--outdir: {err}") from err


def build_command():
    """The click command, with the options of all plug-ins."""
    try:
        load_plugins()
    except PluginError as err:
        raise SystemExit(f"Error: {err}") from err
    return click.command(cls=Command, epilog=EPILOG)(_options(click.pass_context(_main)))


if __name__ == "__main__":
    build_command()()
