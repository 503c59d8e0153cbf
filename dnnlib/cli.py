# SPDX-License-Identifier: Apache-2.0
"""What the command lines share: kinds of options, and one line for each mistake. Imports no torch."""

import contextlib
import math
import os
import re
import sys

import click

from dnnlib.plugins import PluginError


class CommaList(click.ParamType):
    """A comma-separated list of words; 'none' is empty."""

    name = "list"

    def convert(self, value, param, ctx):
        """The words, without the spaces around them."""
        if isinstance(value, list):
            return value
        if value.strip().lower() in ("", "none"):
            return []
        return [part.strip() for part in value.split(",")]


class NumRange(click.ParamType):
    """Whole numbers >= 0: '0-7', '1,4' or both, '0-3,8'."""

    name = "num_range"

    def convert(self, value, param, ctx):
        """The numbers in the order given, each once."""
        if isinstance(value, list):
            return value
        numbers = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last < min(2**32, first + 10**6):
                self.fail(
                    f"cannot read {part!r}: use numbers below 2**32 such as '0-7' or '1,4'.", param, ctx
                )
            numbers += range(first, last + 1)
        return list(dict.fromkeys(numbers))


class OutDir(click.ParamType):
    """A folder to write to, which need not be there yet."""

    name = "dir"

    def convert(self, value, param, ctx):
        """The path as given; an empty one and that of a file are mistakes."""
        if not value:
            self.fail("the name of the folder is empty.", param, ctx)
        if os.path.isfile(value):
            self.fail(f"{value} is a file, not a folder.", param, ctx)
        return value


class _OnlyFinite:
    """Before a type of float: infinite and nan are mistakes."""

    def convert(self, value, param, ctx):
        """The number as a float."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Finite(_OnlyFinite, click.types.FloatParamType):
    """A number, neither infinite nor nan."""


class FiniteRange(_OnlyFinite, click.FloatRange):
    """click.FloatRange, which alone takes nan and, without a maximum, inf for numbers in it."""


# Options of several programs: click.option("--device", **DEVICE).
DEVICE = dict(
    type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where to compute: auto takes CUDA where there is one",
)  # fmt: skip
TRUST_PICKLE = dict(is_flag=True, help="Run the code that --network holds; only for files that you trust")


@contextlib.contextmanager
def user_errors():
    """Turns what a user can cause (ValueError, OSError, a broken plug-in) into one line on stderr and exit status 1."""
    try:
        yield
    except (ValueError, OSError, PluginError) as err:
        raise click.ClickException(str(err)) from err


@contextlib.contextmanager
def progress(items, length, label, show_item=None):
    """Context that gives `items` to iterate over, with a bar, time left and show_item(item) on a terminal's stderr.

    Silent where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield items
        return
    with click.progressbar(
        items, length, label, file=sys.stderr, show_pos=True, item_show_func=show_item
    ) as bar:
        yield bar
