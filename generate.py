# SPDX-License-Identifier: Apache-2.0
"""Make pictures from seeds or projected latents, sheets of them, and videos through them; mix their styles."""

import click

from dnnlib.cli import DEVICE, TRUST_PICKLE, Finite, NumRange, OutDir, user_errors

FILE = click.Path(exists=True, dir_okay=False)
COMMON = [
    click.Option(["--network"], metavar="FILE|URL", required=True, help="Network pickle"),
    click.Option(["--outdir"], type=OutDir(), metavar="DIR", required=True, help="Where the pictures go"),
    click.Option(["--trunc"], type=Finite(), default=1, show_default=True,
                 help="Truncation psi: 1 leaves the latents alone, 0 gives the average"),
    click.Option(["--class", "class_idx"], type=int, help="Class of a conditional network"),
    click.Option(["--noise-mode"], type=click.Choice(["const", "random", "none"]), default="const",
                 show_default=True, help="random: drawn from the picture's seed"),
    click.Option(["--device"], **DEVICE),
    click.Option(["--trust-pickle"], **TRUST_PICKLE),
    click.Option(["--overwrite"], is_flag=True, help="Replace files that are there already"),
]  # fmt: skip


def mixing_options(required):
    """The options of style mixing."""
    return [
        click.Option(["--rows"], type=NumRange(), required=required, help="Style mixing: seeds of the rows"),
        click.Option(["--cols"], type=NumRange(), required=required,
                     help="Style mixing: seeds of the columns, which give their styles"),
        click.Option(["--styles"], type=NumRange(),
                     help="Style mixing: layers taken from the columns  [default: 0-6]"),
    ]  # fmt: skip


OPTIONS = [
    click.Option(["--seeds"], type=NumRange(), help="Pictures to make: 0-7 / 1,4"),
    click.Option(["--projected-w"], type=FILE, help="Make the pictures of projector.py's .npz instead"),
    click.Option(["--grid"], is_flag=False, flag_value="auto", metavar="[CxR]",
                 help="Also one grid.png of all, of C columns and R rows  [default: as square as it goes]"),
    click.Option(["--video"], metavar="FILE.mp4|FILE.gif",
                 help="Also a video through all pictures and back to the first; a bare name is put into --outdir"),
    click.Option(["--frames"], type=click.IntRange(1, 10000), help="Video: frames from one picture to the next"
                 "  [default: 60]"),
    click.Option(["--fps"], type=click.IntRange(1, 120), help="Video: frames a second  [default: 30]"),
    *mixing_options(required=False),
    *COMMON,
]  # fmt: skip
HELP = """Make pictures from seeds or projected latents.

\b
  python generate.py --network=demo/lorelei32.pkl --outdir=out --seeds=0-7         seed0000.png ...
  python generate.py --network=demo/lorelei32.pkl --outdir=out --seeds=0-31 --grid=8x4 --trunc=0.7
  python generate.py --network=demo/lorelei32.pkl --outdir=out --seeds=0-4 --video=walk.gif
  python generate.py --network=demo/lorelei32.pkl --outdir=mix --rows=0-3 --cols=4-9 --styles=0-3
  python generate.py --network=demo/lorelei32.pkl --outdir=out --projected-w=projected_w.npz

Files that are there already are replaced with --overwrite only.
"""


def launch(options):
    """Makes the pictures; click.ClickException, one clear line, for what a user can cause."""
    from training import picture_jobs  # PyTorch is slow to import, and --help does not need it

    with user_errors():
        picture_jobs.run(picture_jobs.Options(**options))


@click.command(help=HELP, params=OPTIONS)
def main(**options):
    """What the command line calls."""
    launch(options)


if __name__ == "__main__":
    main()
