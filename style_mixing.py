# SPDX-License-Identifier: Apache-2.0
"""Mix the styles of seeds: the family's command for what generate.py does with --rows and --cols."""

import click

import generate

OPTIONS = [*generate.mixing_options(required=True), *generate.COMMON]
HELP = """Mix styles: each row's picture with some layers of each column's.

\b
  python style_mixing.py --network=demo/lorelei32.pkl --outdir=mix --rows=0-3 --cols=4-9 --styles=0-3

Writes ROW-COLUMN.png for every pair, SEED-SEED.png for every seed, and grid.png. Files that are there already are
replaced with --overwrite only.
"""


@click.command(help=HELP, params=OPTIONS)
def main(**options):
    """What the command line calls."""
    generate.launch(options)


if __name__ == "__main__":
    main()
