# SPDX-License-Identifier: Apache-2.0
"""Labels of a new data set: from dataset.json, from a table, or from the names of folders. No torch."""

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.data_sources import Source


@dataclass
class Labels:
    """Labels by the pictures' names in the source.

    values    name -> class number, or list of numbers; None: there are no labels
    origin    where they come from, in words
    classes   class name -> number, where the classes had names
    required  whether they were asked for, so that a picture without one is a mistake
    unused    names in the table that no picture has
    """

    values: dict[str, int | list] | None
    origin: str
    classes: dict[str, int] | None = None
    required: bool = False
    unused: tuple = ()


def find_labels(source: Source, choice: str | None = None, columns: Iterable[str] = ()) -> Labels:
    """The labels that `choice` names: None for the source's own, 'folders', or the path of a table.

    columns: those of the table that hold the label; one makes classes, several make vectors. ValueError, in one
    line, for a table or labels that cannot be used.
    """
    columns = list(columns)
    if columns and choice in (None, "folders"):
        raise ValueError("--label-column is a column of the table given with --labels=FILE.csv")
    if choice == "folders":
        return _from_folders(source)
    if choice is not None:
        return _from_table(source, choice, columns)
    if source.labels is None:
        return Labels(None, "none")
    where = "dataset.json" if source.kind in ("folder", "zip") else source.kind
    values, classes = number_labels(source.labels, where)
    known = source.extra.get("classes")  # of an earlier conversion
    return Labels(values, where, classes or (known if isinstance(known, dict) else None))


def number_labels(raw: dict[str, Any], where: str) -> tuple[dict, dict | None]:
    """Labels that a network can be trained on, and the numbers of named classes or None.

    Whole numbers from 0 on are classes as they stand, other numbers become vectors of length 1, lists of numbers stay
    vectors, and text becomes classes numbered in sorted order. What is empty or nan is left out. ValueError for a
    mixture.
    """
    known = {name: value for name, value in raw.items() if not _is_empty(value)}
    values = list(known.values())
    if values and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) > 1 or not all(map(_is_vector, values)):
            raise ValueError(f"The labels of {where} must be lists of numbers of one length")
        return known, None
    numbers = {name: _number(value) for name, value in known.items()}
    if None not in numbers.values():
        if all(number >= 0 and number == int(number) for number in numbers.values()):
            return {name: int(number) for name, number in numbers.items()}, None
        return {name: [number] for name, number in numbers.items()}, None
    if not all(isinstance(value, str) for value in values):
        odd = sorted({type(value).__name__ for value in values})
        raise ValueError(
            f"The labels of {where} must be all finite numbers, all lists of them or all text; found {', '.join(odd)}"
        )
    classes = {text: i for i, text in enumerate(sorted(set(values)))}
    return {name: classes[text] for name, text in known.items()}, classes


def describe(labels: list | None, classes: dict | None = None) -> str:
    """What kind of labels a finished set has, in words."""
    if labels is None:
        return "none"
    if isinstance(labels[0], list):
        return f"vectors of length {len(labels[0])}"
    used, count = len(set(labels)), max(labels) + 1
    names = sorted(classes or {}, key=classes.get if classes else None)
    shown = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    return f"{count} classes{shown}" + (f", of which {count - used} have no picture" if used < count else "")


# ----------------------------------------------------------------------------------------


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> int | float | None:
    """The finite number that a value is or reads as; None if it is none."""
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, (str, kind)) and "_" not in str(value) else None
        except ValueError:
            continue
        if number is not None and math.isfinite(number):
            return number
    return None


def _is_vector(values: list) -> bool:
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def _from_folders(source: Source) -> Labels:
    """The class of a picture is the folder that it lies in, at the first level."""
    if source.kind not in ("folder", "zip"):
        raise ValueError(f"--labels=folders needs a folder or a zip of pictures, not {source.kind}")
    first = {name: name.split("/")[0] for name in source.names if "/" in name}
    classes = {text: i for i, text in enumerate(sorted(set(first.values())))}
    return Labels({name: classes[text] for name, text in first.items()}, "folders", classes, required=True)


def _from_table(source: Source, path: str, columns: list[str]) -> Labels:
    base = os.path.basename(path)
    header, rows = _read_table(path)
    if header[0] in source.names:
        raise ValueError(f"{base} must begin with a line that names its columns, not with '{header[0]}'")
    if not columns and len(header) != 2:
        raise ValueError(f"{base} has the columns {', '.join(header)}: choose with --label-column")
    columns = columns or header[1:]
    for column in columns:
        if column not in header[1:]:
            raise ValueError(
                f"--label-column: {base} has no column '{column}' after the first; it has {header}"
            )
    places = [header.index(column) for column in columns]
    where = f"{base}, column {' and '.join(columns)}"
    cells = {name: [row[i] for i in places] for name, row in rows.items()}
    if len(columns) == 1:
        values, classes = number_labels({name: row[0] for name, row in cells.items()}, where)
    else:
        cells = {name: row for name, row in cells.items() if not any(map(_is_empty, row))}
        values, classes = {name: [_number(cell) for cell in row] for name, row in cells.items()}, None
        for name, vector in values.items():
            if None in vector:
                raise ValueError(
                    f"Several columns make vectors of numbers; {name} has {cells[name]} in {where}"
                )
    known = set(source.names)
    unused = tuple(name for name in rows if name not in known)
    if len(unused) == len(rows):
        first = f"'{unused[0]}'" if unused else "nothing"
        raise ValueError(
            f"{base} names no picture of {source.path}: it begins with {first}, the pictures with '{source.names[0]}'"
        )
    return Labels(values, where, classes, required=True, unused=unused)


def _read_table(path: str) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the columns, and the rows by their first cell: the name of a picture."""
    base = os.path.basename(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            separator = max(",;\t", key=f.readline().count)
            f.seek(0)
            header, *lines = [row for row in csv.reader(f, delimiter=separator) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} does not read as a table in UTF-8: {error}") from error
    header = [cell.strip() for cell in header]
    if len(header) < 2:
        raise ValueError(f"{base} must have two columns or more, the first with the names of pictures")
    rows = {}
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ValueError(f"{base}, row {number}: {len(line)} cells under {len(header)} columns")
        name, row = line[0].strip().replace("\\", "/"), [cell.strip() for cell in line]
        if rows.setdefault(name, row) != row:
            raise ValueError(f"{base}, row {number}: a second, different row for '{name}'")
    return header, rows
