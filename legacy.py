# SPDX-License-Identifier: Apache-2.0
"""Opens networks of every kind that the family's users have, and converts between the kinds.

In a script: `with dnnlib.util.open_url(path) as f: G = legacy.load_network_pkl(f)["G_ema"]`.
"""

import os

import click

from dnnlib.cli import user_errors

EPILOG = """\b
Examples:
  python legacy.py --source=stylegan2-ffhq-config-f.pkl --dest=ffhq.pkl              # from TensorFlow
  python legacy.py --source=550000.pt --dest=church.pkl                              # from rosinality's
  python legacy.py --source=network-snapshot-000200.pkl --dest=faces.safetensors --only=G_ema
  python legacy.py --source=network-snapshot-000200.pkl --dest=faces.onnx
"""
KINDS = [".pkl", ".safetensors", ".onnx"]


def load_network_pkl(f, force_fp16=False, trust=False):
    """The networks of a file: dict with G, D, G_ema, training_set_kwargs, augment_pipe.

    f: an open binary file, a path or a URL; see training.snapshot.load_network_pkl, which this calls.
    """
    from training import snapshot

    return snapshot.load_network_pkl(f, trust=trust, force_fp16=force_fp16)


@click.command(epilog=EPILOG)
@click.option(
    "--source",
    metavar="PATH",
    required=True,
    help="Pickle of any generation, rosinality's .pt, .safetensors; file or URL",
)
@click.option(
    "--dest", metavar="PATH", required=True, help="File to write: .pkl (the family's), .safetensors or .onnx"
)
@click.option(
    "--force-fp16",
    type=bool,
    metavar="BOOL",
    default=False,
    show_default=True,
    help="The four highest resolutions compute in float16",
)
@click.option(
    "--only", type=click.Choice(["G_ema"]), help="Leave out G and D (.safetensors; .onnx holds G_ema anyhow)"
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there")
@click.option(
    "--trust-pickle", is_flag=True, help="Run the code that the source holds; only for files that you trust"
)
def main(source, dest, force_fp16, only, overwrite, trust_pickle):
    """Convert networks: read any kind of file and write another kind."""
    kind = os.path.splitext(dest)[1].lower()
    with user_errors():
        _check_dest(dest, kind, only, overwrite)
        click.echo(f'Loading "{source}"...')
        data = _load(source, trust_pickle, force_fp16, only, kind)
        click.echo(f'Saving "{dest}"...')
        _save(dest, kind, data, only)
        click.echo("Done.")


def _check_dest(dest, kind, only, overwrite):
    """ValueError for a file that cannot or must not be written."""
    if kind not in KINDS:
        raise ValueError(f"--dest={dest}: the name must end in {', '.join(KINDS)}")
    if only and kind == ".pkl":
        raise ValueError(
            f"--only={only} goes with .safetensors; a pickle of the family always holds G, D and G_ema"
        )
    if kind == ".safetensors" and os.path.exists(f"{dest}.json") and not overwrite:
        raise ValueError(f"--dest={dest}: {dest}.json is there already; --overwrite replaces it")
    if os.path.exists(dest) and not overwrite:
        raise ValueError(f"--dest={dest} is there already; --overwrite replaces it")
    folder = os.path.dirname(os.path.abspath(dest))
    if not os.path.isdir(folder):
        raise ValueError(f"--dest={dest}: there is no folder {folder}")


def _load(source, trust, force_fp16, only, kind):
    from training import snapshot

    wanted = ["G_ema"] if only or kind == ".onnx" else None
    return snapshot.load_network_pkl(source, trust=trust, force_fp16=force_fp16, only=wanted)


def _save(dest, kind, data, only):
    from training import snapshot

    if kind == ".pkl":
        snapshot.check_snapshot(data, "--source")
        names = ["G", "D", "G_ema", "augment_pipe", "training_set_kwargs"]
        snapshot.save_network_pkl(dest, **{name: data[name] for name in names})
    elif kind == ".safetensors":
        from training.formats import tensors

        tensors.save(dest, data, only=[only] if only else None)
    else:
        from training.formats import onnx_export

        difference = onnx_export.save_onnx(dest, data["G_ema"])
        if difference is None:
            click.echo("Its pictures were not compared with PyTorch's: pip install onnxruntime")
        else:
            click.echo(f"Its pictures differ from PyTorch's by at most {difference:.1e} standard deviations.")


if __name__ == "__main__":
    main()
