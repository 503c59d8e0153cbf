# SPDX-License-Identifier: Apache-2.0
"""Re-draw chosen blocks of pictures and keep the rest: pictures, numbers, and a file one can go on from."""

import math
import os

import click

from dnnlib.cli import DEVICE, TRUST_PICKLE, Finite, FiniteRange, NumRange, OutDir, user_errors
from dnnlib.util import shell_word
from training.configs import demo_file

DEMO_NETWORK = demo_file("lorelei32.pkl")

# ----------------------------------------------------------------------------
# Parse.


FILE = click.Path(exists=True, dir_okay=False)
OPTIONS = [
    click.Option(["--network"], metavar="FILE|URL", help="Network pickle  [default: the demo]"),
    click.Option(["--seeds"], type=NumRange(), help="Pictures to begin with: 0-7 / 1,4  [default: 0]"),
    click.Option(["--blocks"], metavar="LIST",
                 help="Re-draw these: 5,6 / 4-7 / row1 / rows0-1 / col2 / cols1-2 / all; of several grids"
                      " 0:5,6,1:row0"),
    click.Option(["--mask"], type=FILE, help="Re-draw the blocks that are white in this picture"),
    click.Option(["--mask-coverage"], type=FiniteRange(0, 1, max_open=True), default=0.0,
                 show_default=True, help="Only blocks of which more than this share is white"),
    click.Option(["--label"], type=NumRange(), metavar="LIST",
                 help="--mask is a label map, grey or with a palette: re-draw where it has these values"),
    click.Option(["--numbering"], is_flag=True, help="Also write the original with its blocks numbered"),
    click.Option(["--candidates"], type=click.IntRange(1, 1000), help="How many to draw  [default: 4]"),
    click.Option(["--candidate-seed"], type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                 help="Another number, other candidates"),
    click.Option(["--best"], type=click.IntRange(1, 1000), help="Show only so many, the best first"),
    click.Option(["--by"], type=click.Choice(["realism", "diversity", "locality"]),
                 help="What is best: what the discriminator takes for real, what differs most from the original"
                 " and from those before it, the most change inside per change outside  [default: realism]"),
    click.Option(["--swap"], type=NumRange(), help="Take the blocks from the pictures of these seeds"),
    click.Option(["--from", "source"], type=click.Path(exists=True), help="Go on from this .json or folder"),
    click.Option(["--pick"], type=click.IntRange(0), help="Which candidate of --from; 0 is the original"),
    click.Option(["--projected-w"], type=FILE, help="Begin with the ws in this .npz instead of seeds"),
    click.Option(["--trunc"], type=Finite(), help="Truncation psi  [default: 1]"),
    click.Option(["--noise-mode"], type=click.Choice(["const", "random", "none"]), help="[default: const]"),
    click.Option(["--class", "class_idx"], type=int, help="Class of a conditional network"),
    click.Option(["--trust-pickle"], **TRUST_PICKLE),
    click.Option(["--outdir"], type=OutDir(), metavar="DIR", default="out", show_default=True,
                 help="Parent of the folders"),
    click.Option(["--device"], **DEVICE),
]  # fmt: skip

HELP = """Re-draw chosen blocks of pictures and leave the rest as it is.

Blocks are numbered row by row from the top left; --numbering shows them.

\b
  python resample.py --blocks=5,6                      seed 0 of the demo network
  python resample.py --blocks=row0 --seeds=0-7         the top row of eight pictures
  python resample.py --blocks=5,6 --candidates=16 --best=4 --by=diversity
  python resample.py --from=out/00000-blocks5_6 --pick=3 --blocks=9
"""


# ----------------------------------------------------------------------------
# Show.


def show_result(job, record):
    """What happened to one picture: a line a candidate."""
    if not record["candidates"]:
        return
    from ssn_ext.session import shown_candidates

    shown, by = shown_candidates(record), job.settings.get("by")
    among = f", the best {len(shown)} of {len(record['candidates'])} by {by}" if by else ""
    click.echo(f"\n{record['name']}: {job.what} re-drawn{among}")
    score = f"   {by:>9}" if by else ""
    click.echo(f"  candidate   change inside   change outside   inside / outside{score}")
    for each in shown:
        if by:
            score = f"   {_number(each['scores'][by], '.4f'):>9}"
        inside, outside = (_number(each[key], ".4f") for key in ("inside", "outside"))
        click.echo(
            f"  {each['number']:>9}   {inside:>13}   {outside:>14}   {_number(each['ratio'], '.1f'):>16}{score}"
        )


def _number(value, form):
    """A number as text, '-' where there is none (nothing is outside, or nothing changed there)."""
    return format(value, form) if math.isfinite(value) else "-"


def show_files(job, folder, records):
    """Where everything is, and how to go on."""
    name = records[0]["name"] if len(records) == 1 else f"{records[0]['name']} ... {records[-1]['name']}"
    click.echo(f"\nWrote {folder}{os.sep} ({name})")
    kinds = {
        "*-grid.png": ("all candidates with maps of their changes", "grid" in records[0]["files"]),
        "*-numbering.png": ("the original with its blocks numbered", "numbering" in records[0]["files"]),
        "*-original.png, *-1.png, ...": ("single pictures", True),
        "*.json, *.npz": ("settings, change of every block, history; latents", True),
    }
    for files, (text, written) in kinds.items():
        if written:
            click.echo(f"  {files:<30} {text}")
    if records[0]["candidates"]:
        from ssn_ext.session import shown_candidates

        first = shown_candidates(records[0])[0]["number"]
        source = shell_word(f"--from={folder}")
        click.echo(f"Go on from candidate {first}:  python resample.py {source} --pick={first} --blocks=...")


# ----------------------------------------------------------------------------
# Launch.


@click.command(help=HELP, params=OPTIONS)
def main(**options):
    """Checks the call, re-draws picture after picture, says what was written."""
    from ssn_ext import grids, results, session  # PyTorch is slow to import, and --help does not need it

    with user_errors():
        job = session.make_job(session.Options(**options), DEMO_NETWORK)
        height, width = job.mask.shape
        grid = grids.grid_name(grids.grids_of(job.G))
        click.echo(f"Network {job.network_source}: {width}x{height} pixels, {grid} blocks, on {job.device}")
        folder = results.run_folder(job.outdir, job.name, job.same)
        records = []
        with results.removed_if_empty(folder):
            for start in job.starts:
                records.append(session.resample(job, folder, start))
                show_result(job, records[-1])
    show_files(job, folder, records)


if __name__ == "__main__":
    main()
