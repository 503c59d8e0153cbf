# SPDX-License-Identifier: Apache-2.0
"""Readers of attributes: a small network that says what a table would say of a picture, from any part of it.

    python -m ssn_ext.attributes train --data=demo --labels=demo --out=attributes.pt
    python -m ssn_ext.attributes check --network=demo/lorelei32.pkl --classifiers=demo/attributes.pt

One network, one head for each column of the table. It is trained on pictures of which all, a random rectangle or
all but a rectangle is visible, so that afterwards it reads any block alone, and the picture without that block.
docs/consistency.md says what is made of that; ssn_ext.consistency computes it.
"""

import csv
import gzip
import io
import json
import os
from collections import Counter
from dataclasses import dataclass

import click
import numpy as np
import torch
import torch.nn.functional as F

from dnnlib.cli import DEVICE, TRUST_PICKLE, CommaList, user_errors
from dnnlib.util import open_atomic
from torch_utils.images import to_float
from training.configs import demo_file
from training.data_sources import Source, open_source
from training.dataset import decode_image

FORMAT = "ssn-attributes/1"
MOST_CLASSES = 64  # columns of more different values are names, not attributes
LONGEST_SIDE = 32  # pictures are shrunk to this before they are read
WIDTHS = (24, 48, 64, 28)  # channels of the four layers, the last three of which halve the picture
HELD_OUT = 10  # one picture of so many is held out


# ----------------------------------------------------------------------------------------
# Tables and pictures


@dataclass
class Table:
    """Pictures uint8 [N, C, H, W] with labels int64 [N, A]: the number of the value in values[attribute]."""

    pictures: torch.Tensor
    labels: torch.Tensor
    values: dict[str, list[str]]

    def held_out(self) -> torch.Tensor:
        """Bool [N]: the pictures on which a network is not trained but judged; every tenth."""
        return torch.arange(len(self.labels)) % HELD_OUT == HELD_OUT - 1


def read_table(path: str) -> dict[str, dict[str, str]]:
    """{picture: {column: value}} of a .csv or .csv.gz whose first column names the pictures.

    ValueError or OSError, in one line, for any other file.
    """
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
            lines = csv.reader(io.StringIO(f.read().decode("utf-8-sig"), newline=""))
            header, *rows = [line for line in lines if line] or [[]]
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"{path} does not read as a table in UTF-8: {err}") from err
    if len(header) < 2:
        raise ValueError(f"{path} must have two columns or more, the first with the names of pictures")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(header)} columns")
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def load_table(data: str, labels: str, columns: list[str] | None = None) -> Table:
    """The pictures of a data set that a table describes, with the attributes in `columns`.

    columns: default are all that have 2 to MOST_CLASSES values, each at least twice. 'demo' stands for the shipped
    data and for the shipped table. ValueError, in one line, where the two do not fit.
    """
    data = demo_file("lorelei32.zip") if data == "demo" else data
    labels = demo_file("lorelei32.csv.gz") if labels == "demo" else labels
    rows = read_table(labels)
    with open_source(data) as source:
        names = [name for name in source.names if name in rows]
        if len(names) < 2 * HELD_OUT:
            raise ValueError(f"{labels} describes {len(names)} pictures of {data}: {2 * HELD_OUT} are needed")
        columns = _columns(labels, [rows[name] for name in names], columns)
        pictures = [_read_picture(source, name) for name in names]
    if len({each.shape for each in pictures}) > 1:
        raise ValueError(f"The pictures of {data} differ in size")
    values = {column: sorted({rows[name][column] for name in names}) for column in columns}
    numbers = [[values[column].index(rows[name][column]) for column in columns] for name in names]
    return Table(torch.from_numpy(np.stack(pictures)), torch.tensor(numbers), values)


def _read_picture(source: Source, name: str) -> np.ndarray:
    """uint8 [C, H, W]; ValueError that names the picture."""
    with source.open(name) as f:
        data = f.read()
    try:
        return decode_image(data).transpose(2, 0, 1)
    except ValueError as err:
        raise ValueError(f"'{name}' in {source.path} cannot be used: {err}") from err


def _columns(path: str, rows: list[dict[str, str]], wanted: list[str] | None) -> list[str]:
    """The columns to learn, checked."""
    counts = {column: Counter(row[column] for row in rows) for column in rows[0]}
    usable = [k for k, n in counts.items() if 2 <= len(n) <= MOST_CLASSES and min(n.values()) > 1]
    for column in wanted or []:
        if column not in usable:
            why = f"{len(counts[column])} different values" if column in counts else "no such column"
            raise ValueError(f"--columns={column}: {why} in {path}; there are {', '.join(usable)}")
    if not usable:
        raise ValueError(f"{path} has no column of 2 to {MOST_CLASSES} values that occur more than once")
    return wanted or usable


# ----------------------------------------------------------------------------------------
# The network


class Reader(torch.nn.Module):
    """What values the attributes of a picture have, as far as the visible part of it tells.

    values: {attribute: list of its values}; shape: [H, W] of the pictures that it was trained on.
    """

    def __init__(self, values: dict[str, list[str]], shape: list[int]):
        super().__init__()
        self.values, self.shape = values, list(shape)
        shrink = max(1.0, max(shape) / LONGEST_SIDE)
        self.seen_shape = [max(round(side / shrink), 1) for side in shape]
        fan_in, layers = 4, []
        for number, width in enumerate(WIDTHS):
            layers.append(torch.nn.Conv2d(fan_in, width, 3, stride=1 + (number > 0), padding=1, bias=False))
            layers += [torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
            fan_in = width
        self.trunk = torch.nn.Sequential(*layers, torch.nn.Flatten())
        features = self.trunk.eval()(torch.zeros(1, 4, *self.seen_shape)).shape[1]
        self.heads = torch.nn.Linear(features, sum(map(len, values.values())))

    def forward(self, pictures: torch.Tensor, visible: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [N, number of values] of each attribute.

        pictures float [N, 1 or 3, H, W], seen clamped to [-1, 1]; visible bool [H, W] or [N, H, W]. What is not
        visible has no influence.
        """
        visible = visible.to(pictures.device).expand(len(pictures), -1, -1)[:, None].to(pictures.dtype)
        pictures = pictures.clamp(-1, 1).expand(-1, 3, -1, -1) * visible
        seen = F.adaptive_avg_pool2d(torch.cat([pictures, visible], dim=1), self.seen_shape)
        logits = self.heads(self.trunk(seen)).split([len(each) for each in self.values.values()], dim=1)
        return dict(zip(self.values, logits, strict=True))

    @torch.no_grad()
    def read(
        self, pictures: torch.Tensor, visible: torch.Tensor, batch: int = 256
    ) -> dict[str, torch.Tensor]:
        """Probabilities [N, number of values] of each attribute, on the CPU; arguments as those of forward."""
        parts = []
        masks = visible.expand(len(pictures), -1, -1)
        for some, mask in zip(pictures.split(batch), masks.split(batch), strict=True):
            parts.append({name: F.softmax(each, dim=1).cpu() for name, each in self(some, mask).items()})
        return {name: torch.cat([part[name] for part in parts]) for name in self.values}


def random_visible(count: int, shape: list[int], rnd: torch.Generator) -> torch.Tensor:
    """Bool [count, H, W]: everything, a random rectangle, or all but a rectangle, a third each.

    A rectangle's sides are 1/8 to 1/2 of the picture's: the blocks of grids from 2x2 to 8x8.
    """
    inside = torch.ones([count, *shape], dtype=torch.bool)
    for axis, side in enumerate(shape, 1):
        place = torch.arange(side).reshape([1, side, 1] if axis == 1 else [1, 1, side])
        length = side * (0.125 + 0.375 * torch.rand([count, 1, 1], generator=rnd))
        begin = (side - length) * torch.rand([count, 1, 1], generator=rnd)
        inside &= (place + 0.5 >= begin) & (place + 0.5 < begin + length)
    kind = torch.randint(3, [count, 1, 1], generator=rnd)
    return (kind == 0) | (inside ^ (kind == 2))


def train_reader(table: Table, steps: int, seed: int = 0, batch: int = 64, report=lambda *_: None) -> Reader:
    """A Reader trained on all pictures that are not held out; deterministic for one seed and machine.

    report(step, loss) is called every 100 steps.
    """
    rnd = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(table.values, list(table.pictures.shape[2:])).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=4e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    chosen = torch.nonzero(~table.held_out()).flatten()
    total = 0.0
    for step in range(1, steps + 1):
        picks = chosen[torch.randint(len(chosen), [batch], generator=rnd)]
        visible = random_visible(batch, reader.shape, rnd)
        logits = reader(to_float(table.pictures[picks]), visible)
        targets = table.labels[picks].T
        loss = torch.stack(
            [F.cross_entropy(each, target) for each, target in zip(logits.values(), targets, strict=True)]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % 100 == 0:
            report(step, total / 100)
            total = 0.0
    return reader.eval().requires_grad_(False)


def accuracies(reader: Reader, table: Table, visible: torch.Tensor) -> dict[str, float]:
    """Share of the held-out pictures whose attribute is read rightly from the visible part, bool [H, W]."""
    chosen = table.held_out()
    probabilities = reader.read(to_float(table.pictures[chosen]), visible)
    targets = table.labels[chosen].T
    return {
        name: float((each.argmax(dim=1) == target).double().mean())
        for (name, each), target in zip(probabilities.items(), targets, strict=True)
    }


def majorities(table: Table) -> dict[str, float]:
    """Share of each attribute's most frequent value: what one knows without a picture."""
    return {
        name: float(torch.bincount(column).max() / len(column))
        for name, column in zip(table.values, table.labels.T, strict=True)
    }


# ----------------------------------------------------------------------------------------
# Files


def save_reader(path: str, reader: Reader, details: dict) -> None:
    """Writes the weights as float16 tensors, and all else as JSON: a file that torch.load(weights_only=True) reads."""
    config = json.dumps({"values": reader.values, "shape": reader.shape, "details": details})
    weights = {k: v.half() if v.is_floating_point() else v for k, v in reader.state_dict().items()}
    with open_atomic(path) as f:
        torch.save({"format": FORMAT, "config": config, "weights": weights}, f)


def load_reader(path: str) -> tuple[Reader, dict]:
    """(the Reader, details) of a file that save_reader wrote; nothing in it is run. ValueError for any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}")
        config = json.loads(content["config"])
        reader = Reader(config["values"], config["shape"])
        reader.load_state_dict(content["weights"])
    except FileNotFoundError:
        raise
    except Exception as err:  # a wrong file can raise anything
        text = " ".join(f"{type(err).__name__}: {err}".split())[:200]
        raise ValueError(f"{path} is no file of `attributes train` ({text})") from err
    return reader.eval().requires_grad_(False), config["details"]


# ----------------------------------------------------------------------------------------
# Command line


@click.group()
def main() -> None:
    """Does the rest stay the same person? Read the attributes of pictures before and after a resampling."""


@main.command()
@click.option("--data", required=True, metavar="[ZIP|DIR|demo]", help="Pictures")
@click.option(
    "--labels",
    required=True,
    metavar="[FILE.csv|.csv.gz|demo]",
    help="Table: names of pictures in the first column, an attribute in each further one",
)
@click.option(
    "--columns",
    type=CommaList(),
    metavar="LIST",
    help=f"Attributes to learn  [default: all that have 2 to {MOST_CLASSES} values]",
)
@click.option("--out", required=True, metavar="FILE.pt", help="File to write")
@click.option(
    "--steps", type=click.IntRange(min=10), default=1500, show_default=True, help="Of 64 pictures each"
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of all draws")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there")
def train(data, labels, columns, out, steps, seed, overwrite):  # fmt: skip
    """Train a reader of the attributes in a table; one picture of ten is held out, and judges it."""
    with user_errors():
        if os.path.exists(out) and not overwrite:
            raise ValueError(f"{out} would be replaced: choose another --out, or allow it with --overwrite")
        table = load_table(data, labels, columns)
        count = int((~table.held_out()).sum())
        click.echo(f"{count} pictures to learn from, {len(table.labels) - count} held out")
        reader = train_reader(
            table, steps, seed, report=lambda step, loss: click.echo(f"  step {step}: {loss:.4f}", err=True)
        )
        everything = torch.ones(reader.shape, dtype=torch.bool)
        found, majority = accuracies(reader, table, everything), majorities(table)
        details = dict(data=data, labels=labels, steps=steps, seed=seed, held_out=HELD_OUT)
        save_reader(out, reader, dict(details, accuracy=found, majority=majority))
        click.echo(f"\n{'attribute':<16} values   most frequent   right on held-out pictures")
        for name, accuracy in found.items():
            click.echo(
                f"{name:<16} {len(table.values[name]):>6}   {majority[name]:>13.3f}   {accuracy:>8.3f}"
            )
        click.echo(f"\nWrote {out}, {os.path.getsize(out)} bytes")


@main.command()
@click.option("--network", required=True, metavar="FILE|URL", help="Network pickle with blocks")
@click.option("--classifiers", required=True, metavar="FILE.pt", help="What `attributes train` wrote")
@click.option("--data", metavar="[ZIP|DIR|demo]", help="Real pictures  [default: those of the training]")
@click.option(
    "--labels", metavar="[FILE.csv|.csv.gz|demo]", help="Their table  [default: that of the training]"
)
@click.option("--count", type=click.IntRange(min=2), default=256, show_default=True, help="Latents")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the latents"
)
@click.option("--json", "json_file", metavar="FILE", help="Also write all numbers there")
@click.option("--device", **DEVICE)
@click.option("--trust-pickle", **TRUST_PICKLE)
def check(network, classifiers, data, labels, count, seed, json_file, device, trust_pickle):  # fmt: skip
    """Read the attributes of pictures before and after every block was re-drawn."""
    from ssn_ext import consistency, resampling
    from ssn_ext.results import finite
    from torch_utils.distributed import choose_device
    from training.generating import load_generator
    from training.shapes import shape_of

    with user_errors():
        reader, details = load_reader(classifiers)
        G = load_generator(network, choose_device(1, device)[1], trust_pickle)
        resampling.check_network(G)
        (height, width), shape = reader.shape, shape_of(G)
        if height * shape[1] != width * shape[0]:
            raise ValueError(
                f"--classifiers={classifiers} reads pictures of {width}x{height}, the network makes"
                f" {shape[1]}x{shape[0]}: the proportions differ"
            )
        table = load_table(data or details["data"], labels or details["labels"], list(reader.values))
        if table.values != reader.values:
            raise ValueError(f"--classifiers={classifiers} was trained on a table with other values")
        grids = consistency.grids_read(G)
        if not grids:
            raise ValueError(f"--network={network} has a single block: there is no rest to stay the same")
        shown = consistency.visibility(reader, table, grids)
        results = consistency.check(
            G, reader, shown, count, seed, progress=lambda done: click.echo(f"  {done} of {count}", err=True)
        )
        real = consistency.real_ties(reader.cpu(), table, grids)
        _show_check(details, shown, results, real)
        if json_file:
            everything = dict(network=network, classifiers=details, count=count, seed=seed)
            everything["overall"] = consistency.overall(results)
            everything["attributes"] = {
                name: dict(each, tie_real=real[name], shown_by_block=shown[name].tolist())
                for name, each in results.items()
            }
            with open_atomic(json_file) as f:
                f.write((json.dumps(finite(everything), indent=2, allow_nan=False) + "\n").encode())


def _number(value: float, form: str) -> str:
    """A number as text, '-' where there is none."""
    return format(value, form) if np.isfinite(value) else "-"


def _show_check(details: dict, shown: dict, results: dict, real: dict) -> None:
    """A line an attribute, and what they add up to."""
    from ssn_ext import consistency

    click.echo("Change of a reading: 0 the same, 1 another. In brackets the standard error.\n")
    click.echo(
        f"{'':<17}right on  in the    rest of the picture, block re-drawn    two un-   block agrees with rest"
    )
    click.echo(
        f"{'attribute':<17}real pic. block     shows it       does not show it   related   before  after   real"
    )
    for name, each in results.items():
        cells = [
            f"{_number(each[key], '.3f')} ({_number(each[key + '_stderr'], '.3f')})"
            for key in ("here", "elsewhere")
        ]
        ties = [
            _number(each["tie_before"], ".3f"),
            _number(each["tie_after"], ".3f"),
            _number(real[name], ".3f"),
        ]
        click.echo(
            f"{name:<17}{details['accuracy'][name]:<10.3f}{_number(each['inside'], '.3f'):<10}"
            f"{cells[0]:<15}{cells[1]:<19}{each['unrelated']:<10.3f}{'   '.join(ties)}"
        )
    left_out = [name for name in details["accuracy"] if name not in results]
    click.echo("\nShown by blocks:")
    for name, each in shown.items():
        numbers = np.flatnonzero(each >= consistency.SHOWS).tolist()
        click.echo(f"  {name:<15} {', '.join(map(str, numbers)) or 'none alone'}")
    if left_out:
        click.echo(f"Not read reliably, and left out: {', '.join(left_out)}")
    total = consistency.overall(results)
    if total:
        ties = [_number(total[key], ".3f") for key in ("tie_before", "tie_after")]
        click.echo(
            f"\nThe rest keeps {_number(total['kept'], '.3f')} of what unrelated pictures differ in; where both are"
            f" sure,\nblock and rest agree in {ties[0]} before, and in {ties[1]} after the block has changed"
            " (means over attributes)"
        )


if __name__ == "__main__":
    main()
