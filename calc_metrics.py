# SPDX-License-Identifier: Apache-2.0
"""Evaluate a network snapshot with any of the registered metrics."""

import os
import warnings

import click

import dnnlib
from dnnlib.cli import DEVICE, TRUST_PICKLE, CommaList
from dnnlib.plugins import PluginError, load_plugins, own_class
from metrics import metric_main
from training.configs import demo_file, resolve_resume

DATASET_CLASS = "training.dataset.ImageFolderDataset"
EPILOG = """\b
Examples:
  python calc_metrics.py --network=runs/00000-faces/network-snapshot-000200.pkl --metrics=fid50k_full,ppl
  python calc_metrics.py --network=demo/lorelei32.pkl --data=demo --metrics=fid5k,kid5k \\
      --detector=efficientnet-lite0 --gpus=0
"""


def print_metrics(ctx, _param, value):
    """--list: the metrics, one a line, with what they are."""
    if not value or ctx.resilient_parsing:
        return
    plug_in()
    for name in metric_main.list_valid_metrics():
        click.echo(f"{name:<14s} {metric_main.describe(name)}")
    ctx.exit()


def plug_in():
    """Loads the plug-ins; their metrics join the registry."""
    try:
        load_plugins()
    except PluginError as err:
        raise click.ClickException(str(err)) from err


@click.command(epilog=EPILOG)
@click.option(
    "--network",
    "network_pkl",
    metavar="PATH",
    required=True,
    help="Snapshot to evaluate: file, URL or shorthand (ffhq256 ...)",
)
@click.option("--trust-pickle", **TRUST_PICKLE)
@click.option(
    "--metrics",
    type=CommaList(),
    default="fid50k_full",
    show_default=True,
    help="Comma-separated, or 'none'",
)
@click.option(
    "--data", metavar="PATH", help="Folder or zip of real images, or 'demo'  [default: the snapshot's]"
)
@click.option("--mirror", type=bool, metavar="BOOL", help="Mirror the real images  [default: as trained]")
@click.option("--gpus", type=int, metavar="INT", help="Processes; 0 = CPU  [default: 1]")
@click.option("--device", **DEVICE)
@click.option(
    "--detector",
    metavar="PATH|NAME",
    help="Feature detector: folder with NVIDIA's files, a TorchScript file, or efficientnet-lite0, which"
    " works offline; results of other detectors than NVIDIA's carry its name  [default: NVIDIA's, by URL]",
)
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time  [default: 64, 16 on CPU]")
@click.option(
    "--workers", type=click.IntRange(min=0), help="Processes that read images  [default: 3, 0 on CPU]"
)
@click.option(
    "--ops",
    type=click.Choice(["auto", "reference", "cuda"]),
    default="auto",
    show_default=True,
    help="Operations on a GPU: own kernels where they are proved, PyTorch's, or own kernels or an error",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all random draws")
@click.option(
    "--verbose", type=bool, default=True, show_default=True, metavar="BOOL", help="Say what is done"
)
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=print_metrics, help="Show all metrics"
)
def calc_metrics(**options):
    """Evaluate a snapshot: each result is printed as a line of JSON and, where the snapshot lies in its run
    directory, appended to metric-NAME.jsonl there.

    Every line also says what the numbers depend on: detector and sha256, counts, hash of the data, seed.
    """
    from torch_utils import distributed

    plug_in()
    try:
        with distributed.joined() as leads:
            if leads:
                args = make_config(dnnlib.EasyDict(options))
                show(args)
                launch(args)
            else:
                distributed.follow()
    except (distributed.PeerError, OSError, ValueError) as err:
        raise click.ClickException(str(err)) from err


# ----------------------------------------------------------------------------------------


def make_config(o):
    """What is to be run, from the command line's options; click.ClickException for what cannot be."""
    for name in o.metrics:
        if not metric_main.is_valid_metric(name):
            valid = metric_main.list_valid_metrics()
            raise click.ClickException(
                "\n  ".join(["--metrics can only contain the following values:", *valid])
            )
    o.network_pkl = resolve_resume(o.network_pkl)
    if not (os.path.isfile(o.network_pkl) or dnnlib.util.is_url(o.network_pkl, allow_file_urls=True)):
        raise click.ClickException(f"--network must point to a file or URL, not {o.network_pkl}")
    args = dnnlib.EasyDict(
        {
            key: o[key]
            for key in ("network_pkl", "metrics", "detector", "batch", "workers", "ops", "seed", "verbose")
        }
    )
    from torch_utils.distributed import choose_processes

    try:
        args.num_gpus, args.device_type = choose_processes(o.gpus, o.device)
    except ValueError as err:
        raise click.ClickException(str(err)) from err
    args.run_dir = run_dir_of(o.network_pkl)
    data = load_snapshot(o.network_pkl, o.trust_pickle, o.verbose)
    args.G = data["G_ema"]
    args.dataset_kwargs = dataset_options(o, data.get("training_set_kwargs"), args.G)
    return args


def run_dir_of(network_pkl):
    """The snapshot's folder, if that is a run directory: result lines go there."""
    folder = os.path.dirname(os.path.abspath(network_pkl))
    is_run = os.path.isfile(network_pkl) and os.path.isfile(os.path.join(folder, "training_options.json"))
    return folder if is_run else None


def load_snapshot(network_pkl, trust, verbose):
    """The snapshot's dict, of networks only G_ema; click.ClickException, in one line, if it cannot be read."""
    from training.snapshot import load_network_pkl

    if verbose:
        click.echo(f"Loading network from {network_pkl}...")
    try:
        path = dnnlib.util.open_url(network_pkl, return_filename=True, verbose=verbose)
        return load_network_pkl(path, trust=trust, only=["G_ema"])
    except (OSError, ValueError) as err:
        raise click.ClickException(f"--network: {err}") from err


def dataset_options(o, from_snapshot, G):
    """Options of the data set: those of --data, else the snapshot's; at the network's resolution."""
    if o.data is not None:
        path = demo_file("lorelei32.zip") if o.data == "demo" else o.data
        if not os.path.exists(path):
            raise click.ClickException(f"--data: {path} is not there")
        kwargs = dnnlib.EasyDict(class_name=DATASET_CLASS, path=path)
    elif from_snapshot is not None:
        kwargs = dnnlib.EasyDict(from_snapshot)
        check_dataset_class(kwargs.get("class_name"), o.trust_pickle)
    else:
        raise click.ClickException("Could not look up dataset options; please specify --data")
    kwargs.resolution = G.img_resolution
    kwargs.use_labels = G.c_dim != 0
    if o.mirror is not None:
        kwargs.xflip = o.mirror
    return kwargs


def check_dataset_class(name, trust):
    """click.ClickException for a class that the snapshot names and that is not a data set of ours: it would be run."""
    from training.dataset import Dataset

    if name is not None and not trust and not own_class(name, Dataset):
        raise click.ClickException(
            f"--network: its data set is a {str(name)[:80]!r}, which is not one of this program; give --data, or"
            " --trust-pickle if you trust the file"
        )


def show(args):
    """Says what will be measured, on what."""
    if args.verbose:
        device = f"{args.num_gpus} GPU(s)" if args.device_type == "cuda" else "CPU"
        click.echo(
            f"Metrics: {','.join(args.metrics) or 'none'}; detector: {args.detector or 'NVIDIA'}; {device}"
        )
        click.echo(f"Dataset options: {dict(args.dataset_kwargs)}")


def launch(args):
    """Runs the metrics in one process or several; click.ClickException for mistakes that show only now."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    from torch_utils import distributed

    problem = metric_main.why_unavailable(args.metrics, args.detector, args.verbose)
    if problem:
        raise click.ClickException(problem)
    try:
        distributed.launch(work, args.num_gpus, (args,), device_type=args.device_type)
    except (OSError, ValueError) as err:
        raise click.ClickException(str(err)) from err
    except ProcessRaisedException as err:  # its text is a traceback, which ends with the reason
        raise click.ClickException(str(err).strip().rsplit("\n", 1)[-1]) from err
    except ProcessExitedException as err:
        raise click.ClickException(f"{err}; the others have been stopped") from err


def show_warning(message, *_where):
    """A warning as users want it: one line, without a piece of our source."""
    click.echo(f"Warning: {message}", err=True)


def work(rank, args):
    """What each process does: all metrics, one after the other, features shared between them."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        measure(rank, args)


def measure(rank, args):
    """Computes and reports the metrics."""
    import torch

    from metrics.metric_utils import ProgressMonitor
    from torch_utils import custom_ops, distributed

    load_plugins()
    cuda = args.device_type == "cuda"
    try:
        custom_ops.select(args.ops)
    except RuntimeError as err:
        raise OSError(f"--ops={args.ops}: {err}") from err
    if cuda:
        if rank == 0 and args.verbose:
            click.echo(custom_ops.status())
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    device = distributed.local_device(args.device_type, rank)
    G = args.G.eval().requires_grad_(False).to(device)
    shared = {} if len(args.metrics) > 1 else None
    for name in args.metrics:
        if rank == 0 and args.verbose:
            click.echo(f"Calculating {name}...")
        result = metric_main.calc_metric(
            metric=name,
            G=G,
            dataset_kwargs=args.dataset_kwargs,
            num_gpus=args.num_gpus,
            rank=rank,
            device=device,
            progress=ProgressMonitor(verbose=args.verbose),
            detector=args.detector,
            run_dir=args.run_dir,
            batch_size=args.batch,
            seed=args.seed,
            num_workers=args.workers,
            shared=shared,
        )
        if rank == 0:
            metric_main.report_metric(result, run_dir=args.run_dir, snapshot_pkl=args.network_pkl)


if __name__ == "__main__":
    calc_metrics()
