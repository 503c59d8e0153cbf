# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: candidates side by side, change maps, outlined and numbered blocks, the influence
matrix.

Pictures go in as uint8 [H, W, C] (one channel, RGB, RGBA) and come out as uint8 [H, W, 3]; nothing is written
here. Small pictures are enlarged by a whole factor, so that every pixel of a 32x32 picture can be seen.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssn_ext.blocks import block_masks, check_blocks, union_mask
from ssn_ext.grids import Grid, Grids, as_grids, block_name, blocks_of_grid, grid_name

PAPER, INK, FAINT = (255, 255, 255), (40, 40, 46), (130, 130, 138)
ACCENT = (40, 220, 255)  # outlines: a colour that change maps do not have
GAP = 12  # pixels between cells
HEAT_LIMIT = 0.5  # change maps show no more than this
TARGET_SIZE = 192  # pictures smaller than this are enlarged
# Black, violet, red, orange, pale yellow: brightness grows evenly, so the map reads in greyscale too.
HEAT_COLORS = np.array(
    [[8, 6, 20], [52, 16, 92], [120, 28, 109], [188, 55, 84], [236, 105, 37], [251, 180, 40], [252, 250, 190]]
)

Cell = tuple[np.ndarray | None, str]  # a picture (None: an empty place) and the text under it


# Single pictures.


def to_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] or [H, W] -> [H, W, 3]: grey is repeated, alpha and further channels are left out."""
    picture = picture.reshape(*picture.shape[:2], -1)
    return picture[:, :, :3] if picture.shape[2] >= 3 else np.repeat(picture[:, :, :1], 3, axis=2)


def enlargement(shape: Sequence[int], target: int = TARGET_SIZE) -> int:
    """The whole factor >= 1 that brings the longer side of (H, W) nearest to `target` from below."""
    return max(1, target // max(shape[:2]))


def enlarge(values: np.ndarray, factor: int) -> np.ndarray:
    """Colours [H, W, 3] or a mask [H, W] blown up by a whole factor: every pixel becomes a square."""
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def magnify(picture: np.ndarray, factor: int) -> np.ndarray:
    """A picture, uint8 [H, W, C], as RGB, larger by a whole factor, smoothly: faces stay faces."""
    picture = np.ascontiguousarray(to_rgb(picture))
    if factor == 1:
        return picture
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of numbers in [0, 1] (clipped), black to pale yellow: [...] -> uint8 [..., 3]."""
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(HEAT_COLORS) - 1)
    stops = np.arange(len(HEAT_COLORS))
    return (
        np.stack([np.interp(place, stops, channel) for channel in HEAT_COLORS.T], axis=-1)
        .round()
        .astype(np.uint8)
    )


def rms_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Root mean square over channels of a change in [-1, 1] units: uint8 [H, W, C] -> [H, W]."""
    change = (after.astype(np.float64) - before) / 127.5
    return np.sqrt(np.square(change).reshape(*change.shape[:2], -1).mean(axis=2))


def outline(picture: np.ndarray, mask: np.ndarray, width: int = 1) -> np.ndarray:
    """[H, W, 3] with a line on the border of a bool mask [H, W]: `width` pixels coloured, then black."""
    inner, outer = mask, ~mask
    for _ in range(width):
        inner, outer = _eroded(inner, False), _eroded(outer, True)
    picture = picture.copy()
    picture[mask & ~inner] = ACCENT
    picture[~mask & ~outer] = 0
    return picture


def _eroded(mask: np.ndarray, beyond: bool) -> np.ndarray:
    """Bool [H, W]: pixels whose 3x3 neighbourhood lies in the mask; beyond: so counts what is outside."""
    height, width = mask.shape
    padded = np.pad(mask, 1, constant_values=beyond)
    shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_and.reduce(shifted)


# Sheets of labelled pictures.


def font(size: int) -> ImageFont.ImageFont:
    """Pillow's own font: no file to look for, the same on every machine."""
    return ImageFont.load_default(size)


def sheet(
    rows: Sequence[Sequence[Cell]], title: str = "", note: str = "", top: float | None = None
) -> np.ndarray:
    """Rows of cells on white, a title above, a note below; all cells are as large as the largest picture.

    top: draws the colour bar of the heat maps before the note, from 0 to this number.
    """
    pictures = [picture for row in rows for picture, _ in row if picture is not None]
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    texts = [18 * max(label.count("\n") + 1 if label else 0 for _, label in row) for row in rows]
    uppers = np.cumsum([GAP + (26 if title else 0), *(height + text + GAP for text in texts)]).tolist()
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (GAP + columns * (width + GAP), uppers[-1] + (26 if note else 0)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP - 3), title, INK, font(17))
    for upper, row in zip(uppers, rows, strict=False):
        for x, (picture, label) in enumerate(row):
            left = GAP + x * (width + GAP)
            if picture is not None:
                canvas.paste(Image.fromarray(picture), (left, upper))
            draw.multiline_text((left, upper + height + 3), label, INK, font(13), spacing=3)
    left = GAP if top is None else _color_bar(canvas, (GAP, uppers[-1]), top)
    draw.text((left, uppers[-1]), note, FAINT, font(13))
    return np.asarray(canvas)


def _color_bar(canvas: Image.Image, place: tuple[int, int], top: float) -> int:
    """Draws '0 [colours] top' at a place (left, upper); returns where the next text may begin."""
    left, upper = place
    bar = heat(np.tile(np.linspace(0, 1, 96), (11, 1)))
    canvas.paste(Image.fromarray(bar), (left + 14, upper + 3))
    draw = ImageDraw.Draw(canvas)
    draw.text((left, upper), "0", INK, font(13))
    draw.text((left + 116, upper), f"{top:.2g}" + "+" * (top == HEAT_LIMIT), INK, font(13))
    return left + 158


def heat_top(changes: Sequence[np.ndarray]) -> float:
    """Where the colours of change maps end: their maximum, but HEAT_LIMIT at most, so that leaks can be seen,
    and 0.1 at least, so that rounding errors do not look like a change."""
    return min(HEAT_LIMIT, max([0.1, *(float(change.max()) for change in changes)]))


def candidate_sheet(
    before: np.ndarray,
    after: Sequence[np.ndarray],
    mask: np.ndarray,
    labels: Sequence[str],
    title: str = "",
    max_columns: int = 6,
) -> np.ndarray:
    """What resample.py shows: the original and its candidates, under each candidate the map of its change.

    before, after: uint8 [H, W, C]; mask bool [H, W]: outlined, what was re-drawn; labels: of the original, of
    the candidates. More than `max_columns` candidates go on in further rows. All change maps share one scale.
    """
    factor = enlargement(before.shape)
    original, large_mask = magnify(before, factor), enlarge(mask, factor)
    maps = [rms_change(before, each) for each in after]
    top = heat_top(maps)
    rows = []
    columns = -(-len(after) // -(-len(after) // max_columns))  # as few rows as possible, equally long
    for start in range(0, len(after), columns):
        part = slice(start, start + columns)
        pictures = [(magnify(p, factor), name) for p, name in zip(after[part], labels[1:][part], strict=True)]
        changes = [(outline(enlarge(heat(m / top), factor), large_mask, 2), "") for m in maps[part]]
        first = start == 0
        rows.append([(original, labels[0]) if first else (None, ""), *pictures])
        rows.append([(outline(original, large_mask, 2) if first else None, ""), *changes])
    return sheet(rows, title, "change of a pixel (root mean square; the pictures' range is 2)", top)


def change_sheet(
    originals: Sequence[np.ndarray],
    resampled: Sequence[Sequence[np.ndarray]],
    blocks: Sequence[int],
    grid: Grids,
) -> np.ndarray:
    """N rows: original | one column per block, that block re-drawn and outlined | mean change over them.

    originals: N pictures uint8 [H, W, C]; resampled: N lists of len(blocks) pictures; all heat maps share one
    scale.
    """
    shape = originals[0].shape[:2]
    factor = enlargement(shape, 2 * TARGET_SIZE // 3)
    masks = [enlarge(union_mask([block], grid, shape).numpy(), factor) for block in blocks]
    changes = [
        np.sqrt(np.mean([np.square(rms_change(before, after)) for after in row], axis=0))
        for before, row in zip(originals, resampled, strict=True)
    ]
    top = heat_top(changes)
    names = ["original", *(f"block {block_name(block, grid)}" for block in blocks), "mean change"]
    rows = []
    for before, row, change in zip(originals, resampled, changes, strict=True):
        edited = [outline(magnify(p, factor), mask) for p, mask in zip(row, masks, strict=True)]
        pictures = [magnify(before, factor), *edited, enlarge(heat(change / top), factor)]
        labels = names if len(rows) == len(originals) - 1 else [""] * len(names)
        rows.append(list(zip(pictures, labels, strict=True)))
    return sheet(rows, note="change of a pixel (root mean square; the pictures' range is 2)", top=top)


# Blocks.


def numbering_picture(picture: np.ndarray, grid: Grids, chosen: Sequence[int] = ()) -> np.ndarray:
    """The picture with the borders and numbers of all blocks over it; the chosen ones are outlined. Of several grids
    one picture each, side by side."""
    check_blocks(chosen, grid)
    grids, cells = as_grids(grid), []
    factor = enlargement(picture.shape, max(2 * TARGET_SIZE, 64 * max(map(max, grids))))
    for number, each in enumerate(grids):
        own = [i for i, block in enumerate(blocks_of_grid(grids, number)) if block in chosen]
        label = f"{number}:...  the blocks of the {grid_name(each)} grid"
        cells.append((_numbered_blocks(picture, each, own, factor), label))
    return cells[0][0] if len(cells) == 1 else sheet([cells])


def _numbered_blocks(picture: np.ndarray, grid: Grid, chosen: Sequence[int], factor: int) -> np.ndarray:
    """`numbering_picture` of one grid, `factor` times as large as the picture."""
    shape = picture.shape[:2]
    large = magnify(picture, factor).copy()
    masks = [enlarge(mask, factor) for mask in block_masks(grid, shape).numpy()]
    for mask in masks:
        edge = mask & ~_eroded(mask, True)
        large[edge] = large[edge] // 3 + 2 * 255 // 3
    if len(chosen):
        large = outline(large, enlarge(union_mask(chosen, grid, shape).numpy(), factor), width=2)
    canvas = Image.fromarray(large)
    draw = ImageDraw.Draw(canvas)
    for number, mask in enumerate(masks):
        rows, columns = np.nonzero(mask)
        size = max(10, min(28, (rows.max() - rows.min()) // 3))
        center = (float(columns.mean()), float(rows.mean()))
        draw.text(center, str(number), PAPER, font(size), anchor="mm", stroke_width=2, stroke_fill=INK)
    return np.asarray(canvas)


def influence_picture(matrix: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """The B x B influence matrix as it is, and folded: each row drawn as a grid in its block's place.

    matrix [B, B]: [a, b] is the mean squared change of block b when a is re-drawn. Colours show its square
    root.
    """
    h, w = grid
    values = np.sqrt(np.maximum(np.asarray(matrix, dtype=np.float64), 0))
    top = max(float(values.max()), 1e-12)
    cell = max(6, 384 // (h * w))
    plain = _numbered(enlarge(heat(values / top), cell), h * w, cell)
    side = max(h, w)
    small = max(3, (plain.shape[0] - side * GAP) // side**2)
    tiles = []
    for number, row in enumerate(values / top):
        tile = enlarge(heat(row.reshape(h, w)), small)
        own = enlarge((np.arange(h * w) == number).reshape(h, w), small)
        tiles.append(np.pad(outline(tile, own), [(0, GAP), (0, GAP), (0, 0)], constant_values=255))
    folded = np.concatenate([np.concatenate(tiles[r * w : (r + 1) * w], axis=1) for r in range(h)])
    cells = [
        (plain, "row: block re-drawn, column: block changed"),
        (folded, "each row as a grid, in its block's place"),
    ]
    return sheet([cells], "Influence of every block", "change of a block (root mean square)", top)


def _numbered(picture: np.ndarray, count: int, cell: int) -> np.ndarray:
    """A matrix picture with its row and column numbers along the top and the left."""
    margin = 22
    canvas = Image.new("RGB", (picture.shape[1] + margin, picture.shape[0] + margin), PAPER)
    canvas.paste(Image.fromarray(picture), (margin, margin))
    draw = ImageDraw.Draw(canvas)
    for number in range(0, count, 1 if cell >= 16 else 4):
        place = margin + (number + 0.5) * cell
        draw.text((place, margin / 2), str(number), INK, font(11), anchor="mm")
        draw.text((margin / 2, place), str(number), INK, font(11), anchor="mm")
    return np.asarray(canvas)
