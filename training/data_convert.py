# SPDX-License-Identifier: Apache-2.0
"""From a source of pictures to a data set in the layout of the StyleGAN2-ADA family: zip or folder. No torch."""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL

from dnnlib.util import open_atomic
from training.data_images import Picture, Recipe, Unusable, looks_grey, make_picture
from training.data_labels import Labels
from training.data_sources import LABEL_FILE, Source
from training.shapes import split_shape

# Remarks on pictures: counted, and recorded under these names.
NOTES = ("resized", "stretched", "transparent", "turned", "first frame")
VERSION = 1  # of what is recorded, and of the pixels that a recipe gives; raised when either changes


@dataclass
class Report:
    """What came of a conversion.

    recipe      as applied: channels is 'rgb' or 'grey'
    count       pictures written
    size        (width, height) of all of them
    first       name of the first picture that could be used
    kinds       what the source held, in words -> how many
    notes       each of NOTES -> how many
    too_small   names that center-crop-wide left out
    unreadable  (name, reason) of pictures that cannot be used
    other_size  (name, size) of pictures that are not of one size with the first
    no_label    names without a label, where labels were asked for
    unlabelled  names without a label where others have one, which leaves the set without labels
    labels      those written, or None
    """

    recipe: Recipe
    count: int = 0
    size: tuple[int, int] | None = None
    first: str | None = None
    kinds: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    too_small: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    other_size: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    no_label: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    labels: list | None = None

    def all_good(self) -> bool:
        """Whether nothing was wrong with any picture so far."""
        return not (self.unreadable or self.other_size or self.no_label)

    def skipped(self) -> list[str]:
        """Names of the pictures that are left out because something is wrong with them."""
        return [name for name, _ in self.unreadable] + [name for name, _ in self.other_size] + self.no_label

    def problems(self) -> list[str]:
        """What is wrong with the pictures left out: a line for each file that has to be looked at, and one for each
        mistake that concerns many."""
        lines = [f"{name}: {reason}" for name, reason in self.unreadable]
        if self.other_size:
            name, size = self.other_size[0]
            lines.append(
                f"{some([name for name, _ in self.other_size])}: Image {name} attributes must be equal across all"
                f" images of the dataset.  Got: {_x(size)} pixels, and {_x(self.size)} of {self.first};"
                " --width and --height give all one size"
            )
        if self.no_label:
            lines.append(f"{some(self.no_label)}: no label")
        return lines


def some(names: list[str] | tuple[str, ...]) -> str:
    """How many names, and the first three: '4 (a, b, c, ...)'."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def check_recipe(recipe: Recipe) -> None:
    """ValueError, in one line, for sizes that a transform lacks or that no network can make."""
    if recipe.transform is not None and (recipe.width is None or recipe.height is None):
        raise ValueError(f"must specify --width and --height when using {recipe.transform} transform")
    width, height = recipe.width, recipe.height
    if recipe.transform == "center-crop-wide":
        if height > width:
            raise ValueError(
                f"center-crop-wide makes wide pictures: --height={height} is more than --width={width}"
            )
        height = width  # of the canvas
    if width and height:
        split_shape(height, width)


def check_dest(dest: str, source: str) -> None:
    """Refuses, before any work, a destination that holds something or lies in the source folder."""
    if os.path.isdir(dest) and not is_zip(dest):
        if os.listdir(dest):
            raise ValueError("--dest folder must be empty")
        if os.path.ismount(dest):
            raise ValueError(f"--dest: {dest} is a mount point and cannot be replaced; name a folder in it")
    elif os.path.exists(dest):
        raise ValueError(f"--dest: {dest} exists already; delete it or give another name")
    inside = os.path.realpath(dest).startswith(os.path.join(os.path.realpath(source), ""))
    if inside and os.path.isdir(source) and not is_zip(dest):
        raise ValueError(f"--dest: {dest} lies in --source, whose pictures it would join")


def is_zip(dest: str) -> bool:
    """Whether a destination is to be a zip file; all others are folders."""
    return dest.lower().endswith(".zip")


def convert(
    source: Source,
    dest: str,
    recipe: Recipe,
    labels: Labels,
    max_images: int | None = None,
    skip_bad: bool = False,
    workers: int = 1,
    progress: Callable[[list], Any] = contextlib.nullcontext,
) -> Report:
    """Writes the pictures of a source, as `recipe` says, to a new zip or folder that appears when it is complete.

    recipe.channels 'auto' is grey if all pictures are stored as grey; that needs the first bytes of each.
    skip_bad: leave out pictures that cannot be used; otherwise they are a ValueError that lists all of them, and
    nothing is written. progress: wraps the list of names, as click.progressbar(names) does. Names count the pictures
    of the source, so pictures left out leave gaps.
    """
    check_recipe(recipe)
    check_dest(dest, source.path)
    names = source.names[:max_images]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's: what matters of them is counted or refused here
        if recipe.channels == "auto":
            grey = _all_grey(source, names, recipe.background)
            recipe = dataclasses.replace(recipe, channels="grey" if grey else "rgb")
        report, written = Report(recipe), {}
        with _open_dest(dest) as save, progress(names) as shown:
            for index, (name, picture) in enumerate(_make_all(source, shown, recipe, workers)):
                if not _accept(report, name, picture, labels):
                    continue
                if skip_bad or report.all_good():
                    new_name = f"{index // 1000:05d}/img{index:08d}.png"
                    save(new_name, picture.png)
                    written[new_name] = name
            if not (skip_bad or report.all_good()):
                raise ValueError(
                    f"{len(report.skipped())} of {len(names)} pictures cannot be used; nothing was written"
                    f" (--on-error=skip leaves them out):{_indented(report.problems())}"
                )
            if not written:
                small, bad = len(report.too_small), len(report.skipped())
                raise ValueError(
                    f"No picture is left: {small} are too small, {bad} cannot be used{_indented(report.problems())}"
                )
            _attach_labels(report, written, labels)
            save(LABEL_FILE, json.dumps(_contents(source, report, labels, max_images)).encode())
    return report


# ----------------------------------------------------------------------------------------
# Picture after picture


def _all_grey(source: Source, names: list[str], background: tuple[int, int, int]) -> bool:
    """Whether every picture is stored as grey; looks no further than the first that is not."""
    for name in names:
        try:
            with _opened(source, name) as data:
                if not looks_grey(data, background):
                    return False
        except Exception:  # what cannot be read is reported when it is decoded
            continue
    return True


def _opened(source: Source, name: str) -> contextlib.AbstractContextManager:
    data = source.open(name)
    return contextlib.nullcontext(data) if isinstance(data, np.ndarray) else data


def _make_all(
    source: Source, names: Iterable[str], recipe: Recipe, workers: int
) -> Iterator[tuple[str, Picture | Unusable]]:
    """(name, picture or why there is none), in order. Reads here; decodes and encodes in threads, which Pillow lets
    run side by side."""

    def attempt(name: str, data: bytes | np.ndarray) -> tuple[str, Picture | Unusable]:
        try:
            return name, make_picture(data, recipe)
        except Unusable as reason:
            return name, reason

    with ThreadPoolExecutor(workers) as pool:
        under_way = deque()
        for name in names:
            try:
                with _opened(source, name) as data:
                    content = data if isinstance(data, np.ndarray) else data.read()
                under_way.append(pool.submit(attempt, name, content))
            except Exception as error:  # zipfile raises several kinds for damaged or encrypted entries
                reason = Unusable(f"cannot be read ({' '.join(str(error).split())})")
                under_way.append(pool.submit(tuple, (name, reason)))
            if len(under_way) > 4 * workers:  # so that memory does not fill with pictures
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _accept(report: Report, name: str, picture: Picture | Unusable, labels: Labels) -> bool:
    """Takes account of one picture; whether it belongs into the set."""
    if isinstance(picture, Unusable):
        report.unreadable.append((name, str(picture)))
        return False
    if picture.png is None:
        report.too_small.append(name)
        return False
    if report.size is None:
        try:
            split_shape(picture.size[1], picture.size[0])
        except ValueError as error:
            raise ValueError(f"{name}: {error}; choose a size with --width and --height") from error
        report.size, report.first = picture.size, name
    if picture.size != report.size:
        report.other_size.append((name, picture.size))
        return False
    if labels.required and name not in labels.values:
        report.no_label.append(name)
        return False
    report.kinds[picture.kind] += 1
    report.notes.update(picture.notes)
    return True


def _indented(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# ----------------------------------------------------------------------------------------
# dataset.json


def _attach_labels(report: Report, written: dict[str, str], labels: Labels) -> None:
    """Fills report.count, labels and unlabelled. As in the family, one picture without a label leaves none to any."""
    report.count = len(written)
    if labels.values is None:
        return
    pairs = [[new, labels.values.get(old)] for new, old in written.items()]
    report.unlabelled = [old for old in written.values() if old not in labels.values]
    report.labels = None if report.unlabelled else pairs


def _contents(source: Source, report: Report, labels: Labels, max_images: int | None) -> dict:
    """What dataset.json says: the family's "labels", and how the set was made."""
    recipe = report.recipe
    made_by = {
        "tool": "dataset_tool.py",
        "version": VERSION,
        "pillow": PIL.__version__,
        "source": source.kind,
        "source_name": os.path.basename(os.path.abspath(source.path)),
        "count": report.count,
        "width": report.size[0],
        "height": report.size[1],
        "channels": recipe.channels,
        "transform": recipe.transform,
        "resize_filter": recipe.resize_filter,
        "background": list(recipe.background),
        "max_images": max_images,
        "labels": labels.origin if report.labels else None,
        "source_kinds": dict(report.kinds),
        **{note.replace(" ", "_"): report.notes[note] for note in NOTES},
        "too_small": len(report.too_small),
        "skipped": report.skipped(),
    }
    content = {"labels": report.labels, "made_by": made_by}
    if report.labels and labels.classes:
        content["classes"] = labels.classes
    if "made_by" in source.extra:  # the pictures had been converted before
        content["source_made_by"] = source.extra["made_by"]
    return content


# ----------------------------------------------------------------------------------------
# Destinations that appear complete or not at all


@contextlib.contextmanager
def _open_dest(dest: str) -> Iterator[Callable[[str, bytes], None]]:
    """A function that adds a file to the destination; on an exception nothing of it is left."""
    dest = os.path.abspath(dest)
    os.makedirs(os.path.dirname(dest), exist_ok=True)
    with _open_zip(dest) if is_zip(dest) else _open_folder(dest) as save:
        yield save


@contextlib.contextmanager
def _open_zip(dest: str) -> Iterator[Callable[[str, bytes], None]]:
    with open_atomic(dest) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def save(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name)  # dated 1980: the same pictures make the same bytes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)

        yield save


@contextlib.contextmanager
def _open_folder(dest: str) -> Iterator[Callable[[str, bytes], None]]:
    draft = os.path.join(os.path.dirname(dest), f".{uuid.uuid4().hex}.tmp")
    os.mkdir(draft)
    try:

        def save(name: str, data: bytes) -> None:
            path = os.path.join(draft, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                f.write(data)

        yield save
        if os.path.isdir(dest):
            os.rmdir(dest)  # fails where something has appeared in it since it was looked at
        os.rename(draft, dest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
