# SPDX-License-Identifier: Apache-2.0
"""Train a GAN: parse, make_config, show, launch. The configs themselves are registered (training/configs,
plug-ins)."""

import json
import os
import sys

import click

import dnnlib
from dnnlib.cli import CommaList, OutDir
from dnnlib.plugins import PluginError, load_plugins
from training import configs, settings

UserError = configs.ConfigError  # as the family calls it

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


GROUPS = {
    "General": {
        "--outdir": dict(
            type=OutDir(), metavar="DIR", help="Where the run directories go; needed for a new run"
        ),
        "--gpus": dict(
            type=int,
            metavar="INT",
            help="Processes, one per GPU: any number; 0 trains on the CPU  [default: 1]",
        ),
        "--device": dict(
            type=click.Choice(["auto", "cpu", "cuda"]),
            help="auto takes CUDA where there is one  [default: auto]",
        ),
        "--snap": dict(
            type=int,
            metavar="TICKS",
            help="Ticks between snapshots of pictures and networks  [default: 50, laptop: 10]",
        ),
        "--metrics": dict(
            type=CommaList(),
            metavar="LIST",
            help="Comma-separated metrics run at each snapshot, or 'none'  [default: fid50k_full, laptop: none]",
        ),
        "--detector": dict(
            metavar="NAME",
            help="Detector of the metrics: a local path, or efficientnet-lite0  [default: the metric's own]",
        ),
        "--seed": dict(type=int, metavar="INT", help="Random seed  [default: 0]"),
        ("-n", "--dry-run"): dict(is_flag=True, help="Print the options and exit"),
    },
    "Data": {
        "--data": dict(
            metavar="PATH", help="Training pictures: folder or zip, or 'demo'; needed for a new run"
        ),
        "--cond": dict(
            type=bool,
            metavar="BOOL",
            help="Train a conditional model on the labels in dataset.json  [default: false]",
        ),
        "--subset": dict(
            type=int, metavar="INT", help="Train with only N pictures, chosen by --seed  [default: all]"
        ),
        "--mirror": dict(type=bool, metavar="BOOL", help="Add mirrored pictures  [default: false]"),
    },
    "Base config": {
        "--cfg": dict(metavar="NAME", help=None),  # the help lists the configs: see build_command
        "--gamma": dict(type=float, metavar="FLOAT", help="Override the R1 weight"),
        "--kimg": dict(
            type=int, metavar="INT", help="Override the length of training, in thousands of pictures"
        ),
        "--batch": dict(type=int, metavar="INT", help="Override the batch size, of all processes together"),
        "--glr": dict(type=float, metavar="FLOAT", help="Override the learning rate of G"),
        "--dlr": dict(type=float, metavar="FLOAT", help="Override the learning rate of D"),
        "--set": dict(
            multiple=True,
            metavar="A.B=JSON",
            help="Set any option of the loop, such as loss_kwargs.pl_weight=0",
        ),
    },
    "Augmentation": {
        "--aug": dict(type=click.Choice(configs.AUG_MODES), help="Augmentation mode  [default: ada]"),
        "--p": dict(type=float, metavar="FLOAT", help="Augmentation probability, for --aug=fixed"),
        "--target": dict(type=float, metavar="FLOAT", help="Target of ADA, for --aug=ada  [default: 0.6]"),
        "--augpipe": dict(
            type=click.Choice(list(configs.AUGPIPES)), help="Transforms that are used  [default: bgc]"
        ),
        "--initstrength": dict(
            metavar="FLOAT|resume",
            help="Strength that ADA begins with; resume: that of the --resume file  [default: 0]",
        ),
    },
    "Transfer": {
        "--resume": dict(
            metavar="WHAT",
            help="A run directory or 'latest': go on exactly. A snapshot (path, URL, "
            + ", ".join(configs.PUBLISHED)
            + "): a new run from its networks  [default: noresume]",
        ),
        "--allow-partial": dict(
            type=CommaList(),
            metavar="LIST",
            help="Differences that the --resume file may have: resolution, widths, mapping, labels",
        ),
        "--freezed": dict(
            type=int, metavar="INT", help="Freeze the N highest-resolution layers of D  [default: 0]"
        ),
        "--trust-pickle": dict(
            is_flag=True, default=None, help="Let the --resume file run its own code: only if you trust it"
        ),
    },
    "Performance": {
        "--batch-gpu": dict(
            type=int,
            metavar="INT",
            help="Pictures at a time on each process: fewer need less memory. Gradients of the parts of a batch add up",
        ),
        "--precision": dict(
            type=click.Choice(configs.PRECISIONS),
            help="Numbers of the layers of high resolution  [default: fp16, cpu and --cfg=laptop: fp32]",
        ),
        "--fp32": dict(type=bool, metavar="BOOL", help="The same as --precision=fp32"),
        "--nhwc": dict(
            type=bool, metavar="BOOL", help="Channels-last memory with half precision  [default: false]"
        ),
        "--ops": dict(
            type=click.Choice(configs.OPS),
            help="Operations on a GPU: own kernels where they are proved, PyTorch's, or own kernels or an error"
            "  [default: auto]",
        ),
        "--nobench": dict(
            type=bool, metavar="BOOL", help="Do not let cuDNN try its algorithms  [default: false]"
        ),
        "--allow-tf32": dict(type=bool, metavar="BOOL", help="Let PyTorch use TF32  [default: false]"),
        "--workers": dict(
            type=int, metavar="INT", help="Processes that read pictures, from 0 on  [default: 3]"
        ),
    },
    "Logging": {
        "--log": dict(
            type=CommaList(),
            metavar="LIST",
            help="Also log to tensorboard, wandb or both, which must be installed  [default: none]",
        ),
        "--best": dict(
            metavar="METRIC", help="Keep the best snapshot by this metric, too, as network-snapshot-best.pkl"
        ),
        "--keep-last": dict(
            type=int, metavar="N", help="Delete all but the N latest snapshots  [default: keep all]"
        ),
    },
}


class Command(click.Command):
    """Shows the options in groups, each plug-in's under a heading of its own."""

    def format_options(self, ctx, formatter):
        """Writes one section a group."""
        headings = {name: heading for heading, flags in GROUPS.items() for name in map(_name, flags)}
        groups = {heading: [] for heading in GROUPS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                option = configs.OPTIONS.get(param.name)
                heading = (
                    headings.get(param.name, "General") if option is None else f"Options of {option.heading}"
                )
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _name(flags):
    """The name of the parameter behind '--some-flag' or ('-s', '--some-flag')."""
    flag = flags if isinstance(flags, str) else flags[-1]
    return flag.lstrip("-").replace("-", "_")


def _options(command):
    """Adds the options to the click command; those of plug-ins must be registered by now."""
    choices = dict(type=click.Choice(configs.CONFIGS.names()), metavar="NAME")
    choices["help"] = f"Base config: {', '.join(configs.CONFIGS.names())}  [default: auto]"
    decorators = []
    for options in GROUPS.values():
        for flags, kwargs in options.items():
            kwargs = choices if flags == "--cfg" else kwargs
            default = {"default": configs.OPTION_DEFAULTS.get(_name(flags))}
            names = [flags] if isinstance(flags, str) else flags
            decorators.append(click.option(*names, **{**default, **kwargs}))
    for option in configs.OPTIONS.values():
        decorators.append(click.option(option.flag, **{"default": None, **option.kwargs}))
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def setup_training_loop_kwargs(**config):
    """(description, options of training_loop) for options named as on the command line, with underscores.

    The family's function: what is not given is None, metrics is a list, a mistake is a UserError. The options lack
    only run_dir. An unknown name is a TypeError.
    """
    load_plugins()
    known = {*map(_name, [flag for flags in GROUPS.values() for flag in flags]), *configs.OPTIONS}
    unknown = sorted(set(config) - (known - {"outdir", "dry_run"}))
    if unknown:
        raise TypeError(f"setup_training_loop_kwargs() got unknown options {', '.join(unknown)}")
    args, desc = configs.make_config(config)
    return desc, args


def find_run(outdir, resume):
    """The run directory that --resume asks to continue, or None where it names networks to start from."""
    if resume in (None, "noresume", *configs.PUBLISHED):
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
        configs.check_source(resume)
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
    from training import running

    path = os.path.join(run_dir, "training_options.json")
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
    except (OSError, ValueError, RecursionError) as err:
        raise configs.ConfigError(f"--resume: cannot read {path}: {err}") from err
    running.check_saved(saved, path, trust="trust_pickle" in given)
    command = saved.pop("command")
    changed = {k: v for k, v in given.items() if k not in NOT_RUN_OPTIONS and v != command.get(k)}
    fixed = [
        f"--{k.replace('_', '-')}={v} (was {command.get(k)})"
        for k, v in changed.items()
        if k not in running.FREE_TO_CHANGE
    ]
    if fixed:
        raise configs.ConfigError(
            f"--resume={run_dir} goes on with the run's own options, but the command says {', '.join(fixed)};"
            " to start a new run from its networks, give a snapshot"
        )
    command.update(changed)
    c = settings.easy(saved)
    running.change_running(c, changed)
    return c, command


def plan(options, given):
    """The options of the loop for a command: run directory, and whether an earlier run is continued. Writes
    nothing."""
    from torch_utils import distributed

    started = distributed.started_processes()
    if started is not None and "gpus" not in given:
        options = {**options, "gpus": started}
    command = {k: v for k, v in options.items() if k not in NOT_RUN_OPTIONS and v is not None}
    run_dir = find_run(options["outdir"], options["resume"])
    if run_dir is not None:
        c, command = continue_config(run_dir, {k: options[k] for k in given})
        c.exact_resume = True
        if started is not None and started != c.num_gpus:
            raise configs.ConfigError(
                f"--resume={run_dir} goes on with the run's own number of processes, {c.num_gpus}, but {started} have"
                " been started (WORLD_SIZE)"
            )
    else:
        if not options["outdir"]:
            raise configs.ConfigError("--outdir is required: where the run directory is to be made")
        if options["resume"] is not None:
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
    print(flush=True)  # before an error on stderr
    rows = {
        "Output directory": c.run_dir,
        "Training data": c.training_set_kwargs.path,
        "Training duration": f"{c.total_kimg} kimg",
        "Number of GPUs": c.num_gpus
        if c.device != "cpu"
        else f"none (CPU, {c.num_gpus} process{'es' * (c.num_gpus > 1)})",
        "Number of images": c.training_set_kwargs.max_size,
        "Image resolution": image_size(c.training_set_kwargs),
        "Conditional model": c.training_set_kwargs.use_labels,
        "Dataset x-flips": c.training_set_kwargs.xflip,
    }
    for title, value in rows.items():
        print(f"{title + ':':<19}{value}")
    print(flush=True)


def image_size(training_set_kwargs):
    """'32', or 'width x height' where pictures are not square."""
    try:
        data = dnnlib.util.construct_class_by_name(**training_set_kwargs)
    except OSError as err:  # of a run that goes on: they have been moved or changed
        raise click.ClickException(str(err)) from err
    height, width = data.image_shape[1:]
    data.close()
    return str(width) if height == width else f"{width} x {height} (width x height)"


def worker(rank, c):
    """One process of the run: whether training is complete (it is not when it was stopped)."""
    import torch

    from torch_utils import custom_ops, distributed, training_stats
    from training.training_loop import training_loop

    load_plugins()
    if c.num_gpus > 1:
        training_stats.init_multiprocessing(rank, distributed.local_device(c.device, rank))
    if rank != 0:
        custom_ops.verbosity = "none"
    log = os.path.join(c.run_dir, "log.txt") if rank == 0 else None
    with dnnlib.util.Logger(file_name=log, file_mode="a", should_flush=True):
        try:
            return training_loop(rank=rank, **c)
        except (OSError, ValueError) as err:
            if type(err) is ValueError:
                raise  # not one of our own messages to the user: show where it came from
            text = str(err)  # of an error in a worker process, the last line alone
            print(f"Error: {text.strip().splitlines()[-1] if text.startswith('Caught ') else text}")
            sys.exit(1)
        except (MemoryError, RuntimeError) as err:
            # PyTorch has an exception of its own for a GPU that is full, but none for the CPU
            if not isinstance(err, MemoryError | torch.OutOfMemoryError) and "CPUAllocator" not in str(err):
                raise
            print(f"Error: out of memory. {less_memory(c)}")
            sys.exit(1)


def less_memory(c):
    """What to do when the memory was too small for a run."""
    smaller = settings.smaller_batch_gpu(c)
    if smaller is None:
        return "There is one picture at a time already: use smaller networks, smaller pictures or more memory"
    return (
        f"Try --batch-gpu={smaller}: {smaller} pictures at a time on each process instead of {c.batch_gpu}, the batch"
        f" stays {c.batch_size}"
    )


def launch(c, command):
    """Makes the run directory, records the options, and runs the processes; returns what worker() does."""
    from torch.multiprocessing import ProcessExitedException

    from torch_utils import distributed

    make_run_dir(c)
    with dnnlib.util.file_lock(os.path.join(c.run_dir, ".lock")) as free:
        if not free:
            raise click.ClickException(f"another training is at work in {c.run_dir}")
        dnnlib.util.remove_drafts(c.run_dir)
        saved = dict({k: v for k, v in c.items() if k != "exact_resume"}, command=command)
        with dnnlib.util.open_atomic(os.path.join(c.run_dir, "training_options.json")) as f:
            f.write(json.dumps(saved, indent=2).encode("utf-8"))
        print("Launching processes...")
        try:
            return distributed.launch(worker, c.num_gpus, args=(c,), device_type=c.device)
        except ProcessExitedException as err:
            if err.exit_code != 1:  # else the process has said why
                print(f"Error: {err}; the others have been stopped.{how_to_go_on(c.run_dir)}")
            sys.exit(1)


def make_run_dir(c):
    """Makes the run directory of a new run, with the next number where another training has just taken this one."""
    while not c.get("exact_resume"):
        try:
            return os.makedirs(c.run_dir)
        except FileExistsError:
            taken, (outdir, name) = c.run_dir, os.path.split(c.run_dir)
            c.run_dir = configs.next_run_dir(outdir, name.partition("-")[2])
            if c.run_dir == taken:
                raise
            print(f"{taken} has just been made by another training; this one goes to {c.run_dir}")


def how_to_go_on(run_dir):
    """What to do after a run has broken off, where there is a checkpoint."""
    saved = os.path.isfile(os.path.join(run_dir, "checkpoint.pt"))
    resume = dnnlib.util.shell_word(f"--resume={run_dir}")
    return f" Go on from the last checkpoint with {resume}" if saved else ""


def _main(ctx, **options):
    """Train a GAN from a folder or zip of pictures, or go on with a run that was stopped."""
    from torch_utils import distributed

    try:
        with distributed.joined() as leads:
            complete = lead(ctx, options) if leads else distributed.follow()
    except distributed.PeerError as err:
        raise click.ClickException(str(err)) from err
    if not complete:
        sys.exit(130)


def lead(ctx, options):
    """Plans, shows and launches: in the first of several processes that torchrun started, or in the only one.

    Returns whether training is complete, True for a dry run.
    """
    options["set"] = list(options["set"])
    given = [k for k in options if ctx.get_parameter_source(k) == click.core.ParameterSource.COMMANDLINE]
    try:
        c, command = plan(options, given)
    except configs.ConfigError as err:
        raise click.UsageError(str(err)) from err
    show(c, command)
    if options["dry_run"]:
        print("Dry run; exiting.")
        return True
    try:
        configs.check_resume(c)
    except configs.ConfigError as err:
        raise click.UsageError(str(err)) from err
    try:
        return launch(c, command)
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
