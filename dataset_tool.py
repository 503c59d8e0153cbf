# SPDX-License-Identifier: Apache-2.0
"""Make a data set of pictures of one size, zip or folder, from the pictures that you have."""

import contextlib
import os
import re
import sys

import click

from dnnlib.cli import CommaList, user_errors

# ----------------------------------------------------------------------------
# Parse.


class Size(click.ParamType):
    """'256x192', width first -> (256, 192)."""

    name = "size"

    def convert(self, value, param, ctx):
        """(width, height), both at least 1."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", value.strip().lower())
        return (
            (int(match[1]), int(match[2]))
            if match
            else self.fail(f"{value!r} is not like 256x256", param, ctx)
        )


class Colour(click.ParamType):
    """A colour by its English name, '#rrggbb' or 'rgb(r,g,b)' -> (r, g, b), 0..255."""

    name = "colour"

    def convert(self, value, param, ctx):
        """The colour without transparency."""
        if isinstance(value, tuple):
            return value
        from PIL import ImageColor

        try:
            return ImageColor.getrgb(value)[:3]
        except ValueError:
            self.fail(f"{value!r} is no colour: use a name such as white, or #rrggbb", param, ctx)


COUNT = click.IntRange(min=1)
OPTIONS = [
    click.Option(["--source"], metavar="PATH", required=True, help="Folder, zip, lmdb, CIFAR-10 or MNIST file"),
    click.Option(["--dest"], metavar="PATH", required=True, help="A new .zip, or a new or empty folder"),
    click.Option(["--max-images"], type=COUNT, metavar="INT", help="Only the first INT pictures"),
    click.Option(["--resize-filter"], type=click.Choice(["box", "lanczos"]), default="lanczos",
                 show_default=True, help="Recorded in dataset.json: it moves FIDs by more than most ideas"),
    click.Option(["--transform"], type=click.Choice(["center-crop", "center-crop-wide"]),
                 help="Crop before resizing  [default: resize the whole picture]"),
    click.Option(["--width"], type=COUNT, metavar="INT", help="Of the result  [default: as it is]"),
    click.Option(["--height"], type=COUNT, metavar="INT", help="Of the result  [default: as it is]"),
    click.Option(["--resolution"], type=Size(), metavar="WxH", help="Both, as in stylegan3"),
    click.Option(["--channels"], type=click.Choice(["auto", "rgb", "grey"]), default="auto", show_default=True,
                 help="auto: grey if all pictures are stored as grey"),
    click.Option(["--background"], type=Colour(), default="white", show_default=True, metavar="COLOUR",
                 help="What transparent pictures are put on"),
    click.Option(["--labels"], metavar="FILE.csv|folders",
                 help="A table, or the folders at the first level  [default: those of the source]"),
    click.Option(["--label-column"], type=CommaList(), default="none", metavar="NAME",
                 help="Column of the table: classes; several, with commas: vectors of numbers"),
    click.Option(["--on-error"], type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
                 help="When pictures cannot be used: list all and write nothing, or leave them out"),
    click.Option(["--workers"], type=COUNT, metavar="INT", help="Threads  [default: one a CPU core]"),
]  # fmt: skip

HELP = """Make a data set of pictures of one size from the pictures that you have.

Sizes that a network can make are h0 x w0 doubled n times, h0 and w0 from 4 to 32: powers of two, but also 256x192
or 96x160.

\b
  python dataset_tool.py --source=photos --dest=faces.zip --transform=center-crop --resolution=256x256
  python dataset_tool.py --source=photos --dest=wide.zip --transform=center-crop --width=256 --height=192
  python dataset_tool.py --source=animals --dest=animals.zip --resolution=64x64 --labels=folders
"""


def size_of(width, height, resolution):
    """(width, height) from the two ways to give it; click.UsageError for both at once."""
    if resolution is None:
        return width, height
    if width is not None or height is not None:
        raise click.UsageError("--resolution says both --width and --height: give one or the other")
    return resolution


# ----------------------------------------------------------------------------
# Show.


def progress(names):
    """Bar and remaining time, where someone is watching."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext(names)
    return click.progressbar(names, label="Converting", show_pos=True, file=sys.stderr)


def counted(numbers):
    """'RGB 70, palette 3': the most frequent first."""
    return ", ".join(f"{what} {n}" for what, n in numbers.most_common())


def show(source, labels, report, dest):
    """Says what was found, what was done to it, and what was written."""
    from training.data_convert import some
    from training.data_labels import describe

    notes = {
        "resized": f"resized ({report.recipe.resize_filter})",
        "stretched": "stretched to other proportions (--transform=center-crop would keep them)",
        "transparent": "with transparency, put on #{:02x}{:02x}{:02x}".format(*report.recipe.background),
        "turned": "turned upright, as their EXIF data says",
        "first frame": "of several frames: the first was taken",
    }
    classes = labels.classes if report.labels else None
    size = f"{report.size[0]}x{report.size[1]}"
    rows = [
        ("Found", counted(report.kinds)),
        *(("", f"{report.notes[note]} {text}") for note, text in notes.items() if report.notes[note]),
        ("Left out", report.too_small and f"smaller than the result: {some(report.too_small)}"),
        ("Left out", source.left_out and f"not pictures, by their names: {counted(source.left_out)}"),
        ("Unused", labels.unused and f"rows of the table that no picture has: {some(labels.unused)}"),
        ("Skipped", report.skipped() and f"{len(report.skipped())}:"),
        *(("", f"  {line}") for line in report.problems()),
        ("Wrote", f"{dest}: {report.count} pictures, {size}, {report.recipe.channels}"),
        ("Labels", describe(report.labels and [label for _, label in report.labels], classes)),
        ("", report.unlabelled and f"({labels.origin} lacks {some(report.unlabelled)}; all must have one)"),
    ]
    for title, text in rows:
        if text:
            click.echo(f"{title:<10}{text}")


# ----------------------------------------------------------------------------
# Launch.


@click.command(help=HELP, params=OPTIONS)
def main(
    source, dest, width, height, resolution, labels, label_column, on_error, workers, max_images, **recipe
):
    """Checks the call, converts, says what was written."""
    from training import data_convert, data_labels, data_sources

    if not dest:
        raise click.UsageError("--dest output filename or directory must not be an empty string")
    width, height = size_of(width, height, resolution)
    with user_errors():
        recipe = data_convert.Recipe(width=width, height=height, **recipe)
        with data_sources.open_source(source, max_images) as opened:
            found = data_labels.find_labels(opened, labels, label_column)
            report = data_convert.convert(
                opened,
                dest,
                recipe,
                found,
                max_images,
                on_error == "skip",
                workers or os.cpu_count() or 1,
                progress,
            )
    show(opened, found, report, dest)


if __name__ == "__main__":
    main()
