# SPDX-License-Identifier: Apache-2.0
"""The paper's figures from any network: `python -m ssn_ext.paper_figures rows | adapt | droplets`.

rows      originals, the same pictures with blocks re-drawn, the change (figures 2, 6 and 7)
adapt     where the rest of a picture adapts to a re-drawn block, beside pasting the block (figure 8)
droplets  feature norms of every layer (figure 4)

Constant noise, and everything else from the seeds: the same call makes the same picture. The re-drawn pictures are
those that resample.py numbers 1, 2, ... for the same seed and blocks.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import click
import numpy as np
import torch

from dnnlib.cli import DEVICE, TRUST_PICKLE, Finite, NumRange, user_errors
from ssn_ext import droplets as droplet_maps
from ssn_ext import figures, resampling
from ssn_ext.blocks import parse_blocks, union_mask
from ssn_ext.grids import block_name, grids_of
from torch_utils.distributed import choose_device
from torch_utils.images import to_uint8, write_png
from training import generating
from training.configs import demo_file
from training.shapes import shape_of

DEMO_NETWORK = demo_file("lorelei32.pkl")
LARGEST_CELL = 256  # pixels a side of the pictures among feature maps
MOST_ROWS = 8  # that `adapt` draws; what it prints is over all seeds
NORM_LIMIT = 6  # feature maps show no more than this multiple of their mean
BLANK = (225, 225, 228)  # what a map leaves out
CHANGE_NOTE = "change of a pixel (root mean square; the pictures' range is 2)"

# Seams.


def seam_energy(picture: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean squared difference between neighbouring pixels, one in the mask and one outside, over channels and all such
    pairs, across and down: the gradient energy on the mask's border. picture [C, H, W]; mask bool [H, W].

    0.0 where the mask has no border.
    """
    total, pairs = 0.0, 0
    for axis in (0, 1):
        cut = mask.diff(dim=axis)  # True between two pixels of which one is in the mask
        steps = picture.diff(dim=axis + 1).square().mean(dim=0)
        total, pairs = total + float(steps[cut].sum()), pairs + int(cut.sum())
    return total / max(pairs, 1)


def paste(picture: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """picture [C, H, W] with the pixels of the mask [H, W] taken from source: nothing outside changes."""
    return torch.where(mask, source, picture)


def summarise_seams(seams: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Name -> (sum of energies / sum of those of 'before', standard error over pictures) of several `Edit.seams`.

    NaN where the pictures have no gradient there; the error is that of a ratio of means, to first order, and NaN for
    a single picture.
    """
    table = {name: np.array([each[name] for each in seams]) for name in seams[0]}
    before = table.pop("before")
    result = {}
    for name, energy in table.items():
        ratio = energy.sum() / before.sum() if before.sum() > 0 else np.nan
        spread = (energy - ratio * before).std(ddof=1) if len(before) > 1 else np.nan
        result[name] = (float(ratio), float(spread / max(before.mean(), 1e-30) / len(before) ** 0.5))
    return result


# Edits.


@dataclass(frozen=True)
class Edit:
    """A picture, the same with blocks re-drawn, and the whole picture that the new blocks' latents are from: float
    [C, H, W], clamped to [-1, 1]; mask bool [H, W] of the blocks."""

    before: torch.Tensor
    after: torch.Tensor
    donor: torch.Tensor
    mask: torch.Tensor

    def change(self) -> dict:
        """Change inside and outside, as resample.py prints it."""
        return resampling.measure(self.before[None], self.after[None], self.mask, [1, 1])[0]

    def seams(self) -> dict[str, float]:
        """Gradient energy on the border: of the picture as it was, of the re-drawn one, of the re-drawn block pasted
        into the old picture, and of the donor's block pasted."""
        pictures = {
            "before": self.before,
            "re-drawn": self.after,
            "pasted": paste(self.before, self.after, self.mask),
            "donor pasted": paste(self.before, self.donor, self.mask),
        }
        return {name: seam_energy(picture, self.mask) for name, picture in pictures.items()}


@torch.no_grad()
def make_edit(
    G: torch.nn.Module,
    seed: int,
    blocks: Sequence[int],
    candidate: int = 1,
    label: torch.Tensor | None = None,
    psi: float = 1.0,
) -> Edit:
    """The edit that resample.py numbers `candidate` (from 1) for this seed and these blocks; label [1, c_dim] or
    None."""
    device = next(G.parameters()).device
    ws = generating.map_seed(G, seed, label, psi, device)
    donor = resampling.donor_seeds(0, seed, 0, candidate)[-1]
    ws = torch.cat(
        [
            ws,
            resampling.redraw(G, ws, blocks, [donor], label, psi),
            generating.map_seed(G, donor, label, psi, device),
        ]
    )
    before, after, other = resampling.render(G, ws).clamp(-1, 1).cpu()
    return Edit(before, after, other, union_mask(blocks, grids_of(G), shape_of(G)))


def pixels(picture: torch.Tensor) -> np.ndarray:
    """A picture [C, H, W] in [-1, 1] as uint8 [H, W, C]."""
    return to_uint8(picture).permute(1, 2, 0).cpu().numpy()


# Figures.


def rows_figure(edits: Sequence[Sequence[Edit]], names: Sequence[str], title: str = "") -> np.ndarray:
    """Figures 2, 6 and 7: a row of originals, then for each choice of blocks a row of re-drawn pictures and one of
    changes.

    edits: for each choice of blocks one edit a column, all of the same originals; names: of the choices. All change
    maps share one scale. Returns uint8 [H, W, 3].
    """
    factor = figures.enlargement(edits[0][0].mask.shape, 2 * figures.TARGET_SIZE // 3)
    maps = [[figures.rms_change(pixels(e.before), pixels(e.after)) for e in row] for row in edits]
    top = figures.heat_top([each for row in maps for each in row])
    rows = [[(figures.magnify(pixels(e.before), factor), "") for e in edits[0]]]
    rows[0][0] = (rows[0][0][0], "originals")
    for name, row, changes in zip(names, edits, maps, strict=True):
        pictures = [(figures.magnify(pixels(e.after), factor), "") for e in row]
        pictures[0] = (pictures[0][0], f"{name} re-drawn")
        shown = []
        for edit, change in zip(row, changes, strict=True):
            large = figures.enlarge(figures.heat(change / top), factor)
            label = "inside {inside:.3f}\noutside {outside:.4f}".format(**edit.change())
            shown.append((figures.outline(large, figures.enlarge(edit.mask.numpy(), factor), 2), label))
        rows += [pictures, shown]
    return figures.sheet(rows, title, f"{CHANGE_NOTE}; numbers: mean squares", top)


def adapt_figure(edits: Sequence[Edit], title: str = "") -> np.ndarray:
    """Figure 8, a row an edit: the original, the re-drawn picture, where the rest changed, and two pictures with pasted
    pixels: the re-drawn block, and the block of the picture that its latents are from.

    Under the last ones stands the seam: gradient energy on the block's border relative to the original's. Returns
    uint8 [H, W, 3].
    """
    factor = figures.enlargement(edits[0].mask.shape)
    maps = []
    for edit in edits:
        change = figures.rms_change(pixels(edit.before), pixels(edit.after))
        maps.append(np.where(edit.mask.numpy(), 0.0, change))
    top = figures.heat_top(maps)
    rows = []
    for edit, change in zip(edits, maps, strict=True):
        mask = figures.enlarge(edit.mask.numpy(), factor)
        rest = figures.enlarge(figures.heat(change / top), factor)
        rest[mask] = BLANK
        seams = edit.seams()
        original = figures.outline(figures.magnify(pixels(edit.before), factor), mask, 2)
        cells = [(original, "original")]
        cells += [_with_seam(edit.after, "re-drawn", seams["re-drawn"], seams, factor)]
        cells += [(figures.outline(rest, mask, 2), "where the rest adapts")]
        for name, source in [("pasted", edit.after), ("donor pasted", edit.donor)]:
            picture = paste(edit.before, source, edit.mask)
            label = "the same block pasted" if name == "pasted" else "another picture's block pasted"
            cells.append(_with_seam(picture, label, seams[name], seams, factor))
        rows.append(cells)
    return figures.sheet(rows, title, CHANGE_NOTE, top)


def _with_seam(picture, label, energy, seams, factor):
    return figures.magnify(pixels(picture), factor), f"{label}\nseam {_ratio(energy, seams['before'])}"


def _ratio(energy: float, before: float) -> str:
    """An energy relative to the original's as text; '-' where the original has none there."""
    return f"{energy / before:.2f}" if before > 1e-6 else "-"


def droplet_figure(rows: Sequence[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]) -> np.ndarray:
    """Figure 4, a row a picture: the picture, then every layer's feature norms divided by their mean.

    rows: (name, picture [C, H, W] in [-1, 1], layer -> norms [H', W']); networks may differ in their layers. All maps
    share one scale. Returns uint8 [H, W, 3].
    """
    relative = [{k: (v / v.mean().clamp(min=1e-30)).cpu().numpy() for k, v in row[2].items()} for row in rows]
    top = min(NORM_LIMIT, max(float(each.max()) for maps in relative for each in maps.values()))
    cells = []
    for (name, picture, _norms), maps in zip(rows, relative, strict=True):
        line = [(_shrunk(figures.magnify(pixels(picture), figures.enlargement(picture.shape[1:]))), name)]
        side = max(line[0][0].shape[:2])
        for layer, values in maps.items():
            values = _shrunk(values)
            shown = figures.enlarge(figures.heat(values / top), max(1, side // max(values.shape)))
            line.append((shown, f"{layer}\npeak {maps[layer].max():.2f}"))
        cells.append(line)
    title = "Norm of the features at every position, over its mean"
    note = f"multiples of the mean{f', {top} and more alike' if top == NORM_LIMIT else ''}"
    return figures.sheet(cells, title, note, top)


def _shrunk(values: np.ndarray) -> np.ndarray:
    """An array [H, W] or [H, W, 3] of at most LARGEST_CELL a side: maxima over squares of a map, so that peaks stay,
    means of a picture."""
    step = -(-max(values.shape[:2]) // LARGEST_CELL)
    if step == 1:
        return values
    height, width = (side // step for side in values.shape[:2])
    cut = values[: height * step, : width * step].reshape(height, step, width, step, *values.shape[2:])
    return cut.max(axis=(1, 3)) if values.ndim == 2 else cut.mean(axis=(1, 3)).astype(np.uint8)


# Commands.


def _options(*extra):
    """Decorator: the options of all figures, after those of one."""
    shared = [
        click.option("--seeds", type=NumRange(), default="0-3", show_default=True, help="Pictures to begin with"),
        *extra,
        click.option("--trunc", type=Finite(), default=1.0, show_default=True, help="Truncation psi"),
        click.option("--class", "class_idx", type=int, help="Class of a conditional network"),
        click.option("--out", metavar="FILE.png", help="Where the picture goes  [default: out/<figure>.png]"),
        click.option("--overwrite", is_flag=True, help="Replace a file that is there"),
        click.option("--trust-pickle", **TRUST_PICKLE),
        click.option("--device", **DEVICE),
    ]  # fmt: skip

    def decorate(function):
        for option in reversed(shared):
            function = option(function)
        return function

    return decorate


NETWORK = click.option(
    "--network", default=DEMO_NETWORK, metavar="FILE|URL", help="Network pickle  [default: the demo]"
)
CANDIDATE = click.option(
    "--candidate",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="As resample.py numbers them",
)


@click.group()
def main() -> None:
    """The figures of the SSN paper, from any network; the same call makes the same picture."""


@main.command()
@NETWORK
@_options(
    click.option(
        "--blocks", multiple=True, required=True, metavar="LIST",
        help="Re-draw these: 5,6 / 4-7 / row1 / col2 / all; given several times, one pair of rows each",
    ),
    CANDIDATE,
)  # fmt: skip
def rows(**given) -> None:
    """Originals, re-drawn, changes: figures 2, 6, 7."""
    with user_errors():
        out, G, label = _prepare("rows", given["network"], given)
        resampling.check_network(G)
        choices = [parse_blocks(text, grids_of(G)) for text in given["blocks"]]
        edits = [
            [make_edit(G, seed, blocks, given["candidate"], label, given["trunc"]) for seed in given["seeds"]]
            for blocks in choices
        ]
        names = [_named(blocks, G) for blocks in choices]
        _write(out, rows_figure(edits, names))
        for name, row in zip(names, edits, strict=True):
            changes = [edit.change() for edit in row]
            inside, outside = (np.mean([each[key] for each in changes]) for key in ("inside", "outside"))
            click.echo(f"{name}: mean squared change inside {inside:.4f}, outside {outside:.4f}")


@main.command()
@NETWORK
@_options(
    click.option("--blocks", required=True, metavar="LIST", help="Re-draw these: 5,6 / 4-7 / row1 / col2"),
    CANDIDATE,
)
def adapt(**given) -> None:
    """Where the rest adapts, and pasting: figure 8.

    Pasting leaves the rest exactly as it was and shows at the border. Seams are the gradient energy there, relative to
    the untouched picture's. The first 8 seeds are drawn, the printed numbers are over all of them.
    """
    with user_errors():
        out, G, label = _prepare("adapt", given["network"], given)
        resampling.check_network(G)
        blocks = parse_blocks(given["blocks"], grids_of(G))
        edits = [
            make_edit(G, seed, blocks, given["candidate"], label, given["trunc"]) for seed in given["seeds"]
        ]
        if bool(edits[0].mask.all()):
            raise ValueError(
                f"--blocks={given['blocks']} is the whole picture: nothing is left that could adapt"
            )
        _write(out, adapt_figure(edits[:MOST_ROWS], f"{_named(blocks, G)} re-drawn".capitalize()))
        if len(edits) > MOST_ROWS:
            click.echo(f"It shows the first {MOST_ROWS} of {len(edits)} pictures.")
        for name, (ratio, error) in summarise_seams([edit.seams() for edit in edits]).items():
            more = f" +- {error:.2f}" if math.isfinite(error) else ""
            click.echo(f"seam, {name}: {ratio:.2f}{more}")


@main.command()
@click.option(
    "--network",
    multiple=True,
    metavar="FILE|URL",
    help="Network pickle; several, to compare  [default: the demo]",
)
@_options()
def droplets(**given) -> None:
    """Feature norms of every layer: figure 4.

    For any generator of the family. Droplets show as small spots that are far stronger than the rest.

    The numbers are peaks over means. calc_metrics.py --metrics=droplet averages them over 256 pictures.
    """
    with user_errors():
        lines, networks = [], given["network"] or [DEMO_NETWORK]
        for number, network in enumerate(networks, 1):
            out, G, label = _prepare("droplets", network, given)
            name = type(G).__name__
            if len(networks) > 1:
                name = f"{number}: {name}"
                click.echo(f"{name}, {network}")
            for seed in given["seeds"]:
                ws = generating.map_seed(G, seed, label, given["trunc"], next(G.parameters()).device)
                picture, norms = droplet_maps.feature_norms(G, ws)
                first = {layer: each[0] for layer, each in norms.items()}
                lines.append((f"{name}\nseed {seed}", picture[0], first))
        _write(out, droplet_figure(lines))


def _prepare(name, network, given):
    """(path to write, generator, label) of a call; mistakes are found before any work is done."""
    out = given["out"] or os.path.join("out", f"{name}.png")
    if not out.lower().endswith(".png"):
        raise ValueError(f"--out={out}: the name must end in .png")
    if os.path.exists(out) and not given["overwrite"]:
        raise ValueError(f"--out={out} is there already; --overwrite replaces it")
    device = torch.device(choose_device(1, given["device"])[1])
    G = generating.load_generator(network, device, trust=given["trust_pickle"])
    return out, G, generating.class_label(G, given["class_idx"], device)


def _named(blocks, G):
    names = [block_name(block, grids_of(G)) for block in blocks]
    return f"block{'s' * (len(blocks) > 1)} {', '.join(names)}"


def _write(out, picture):
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write_png(out, picture)
    click.echo(f"Wrote {out}")


if __name__ == "__main__":
    main()
