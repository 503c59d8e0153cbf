# SPDX-License-Identifier: Apache-2.0
"""Blocks of a spatial latent and of a picture: replace them, outline them, name them. Pure functions.

A grid is (h, w) and has B = h*w blocks, numbered row by row from the top left. A spatial latent is flat and
channel-major: [..., C*h*w] is [..., C, h, w] seen as one axis; the value at [c, r, k] is of block r*w + k.

Where a function takes a `grid` as Grids, it may also be a list of grids over the same picture (ssn_ext.grids): their
blocks are numbered in one row, the first grid's first, and a latent is [..., C, B] seen as one axis.
"""

import math
import re
from collections.abc import Sequence

import torch

from ssn_ext.grids import Grid, Grids, as_grids, block_counts, blocks_of_grid, grid_name

# Blocks of a latent.


def replace_blocks(
    latent: torch.Tensor, fresh: torch.Tensor, blocks: Sequence[int] | torch.Tensor, grid: Grids
) -> torch.Tensor:
    """`latent` with the chosen blocks taken from `fresh`; every other value is bit for bit that of `latent`.

    latent, fresh: [N, ..., C*h*w] (z, or ws [N, num_ws, w_dim]) or [N, C, h, w]; fresh may broadcast.
    blocks: list of ints, the same for all samples, or LongTensor [N], one block a sample.
    Returns a new tensor of latent's shape and dtype; gradients flow into both arguments.
    Raises ValueError for a shape that does not fit the grid or a block outside it.
    """
    tail = _tail_shape(latent.shape, grid)
    chosen = block_selector(blocks, latent.shape[0], grid, device=latent.device)  # [N or 1, B]
    where = chosen.reshape(chosen.shape[0], *[1] * (len(tail) - 3), *tail[-2:])
    fresh = fresh.to(latent.dtype).expand_as(latent)
    return torch.where(where, fresh.reshape(tail), latent.reshape(tail)).reshape(latent.shape)


def block_selector(
    blocks: Sequence[int] | torch.Tensor, num_samples: int, grid: Grids, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Bool [N, B] (from a LongTensor [N]) or [1, B] (from a list): True where a sample's block is chosen."""
    num_blocks = sum(block_counts(grid))
    if isinstance(blocks, torch.Tensor):
        if blocks.shape != (num_samples,):
            raise ValueError(
                f"Expected one block for each of {num_samples} samples, not {list(blocks.shape)}"
            )
        chosen = torch.zeros([num_samples, num_blocks], dtype=torch.bool, device=device)
        return chosen.scatter(1, blocks.to(device)[:, None], True)  # an index outside the grid raises here
    check_blocks(blocks, grid)
    chosen = torch.zeros([1, num_blocks], dtype=torch.bool)
    chosen[:, list(blocks)] = True
    return chosen.to(device)


def check_blocks(blocks: Sequence[int], grid: Grids) -> None:
    """Raises ValueError naming the first block that a grid (h, w), or the grids together, do not have."""
    last = sum(block_counts(grid)) - 1
    for block in blocks:
        if not 0 <= block <= last:
            raise ValueError(f"Block {block} is outside the {grid_name(grid)} grid: blocks are 0 to {last}")


def _tail_shape(shape: torch.Size, grid: Grids) -> tuple[int, ...]:
    """The shape [N, ..., C, h, w] under which a latent of this shape is seen; several grids are one row."""
    grids = as_grids(grid)
    h, w = grids[0] if len(grids) == 1 else (1, sum(block_counts(grid)))
    if len(shape) == 4 and tuple(shape[-2:]) == (h, w):
        return tuple(shape)
    if len(shape) < 2 or shape[-1] % (h * w) != 0:
        raise ValueError(f"A latent of shape {list(shape)} does not hold a {grid_name(grid)} grid of blocks")
    return (*shape[:-1], shape[-1] // (h * w), h, w)


# Blocks of a picture.


def block_masks(grid: Grids, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Bool [B, H, W] for pictures of shape (H, W): block (r, k) covers rows floor(r*H/h)..floor((r+1)*H/h).

    The masks of one grid are disjoint, cover the picture, and none is empty: ValueError if the picture has fewer
    pixels than the grid has blocks along a side.
    """
    return torch.cat([_grid_masks(each, shape) for each in as_grids(grid)]).to(device)


def _grid_masks(grid: Grid, shape: Sequence[int]) -> torch.Tensor:
    """`block_masks` of one grid."""
    (h, w), (height, width) = grid, shape
    if height < h or width < w:
        raise ValueError(f"A picture of {height}x{width} pixels is smaller than its {h}x{w} grid of blocks")
    rows = _intervals(h, height)  # [h, H]
    columns = _intervals(w, width)  # [w, W]
    masks = rows[:, None, :, None] & columns[None, :, None, :]  # [h, w, H, W]
    return masks.reshape(h * w, height, width)


def union_mask(blocks: Sequence[int], grid: Grids, shape: Sequence[int]) -> torch.Tensor:
    """Bool [H, W]: the pixels of the chosen blocks together."""
    check_blocks(blocks, grid)
    return block_masks(grid, shape)[list(blocks)].any(dim=0)


def neighbours(grid: Grid, cells: int = 1) -> torch.Tensor:
    """Bool [B, B]: True where two blocks are at most `cells` apart, diagonals and itself included."""
    number = torch.arange(grid[0] * grid[1])
    place = torch.stack([number // grid[1], number % grid[1]])  # [2, B]
    return (place[:, :, None] - place[:, None, :]).abs().amax(dim=0) <= cells


def halo_masks(grid: Grid, shape: Sequence[int], cells: int = 1) -> torch.Tensor:
    """Bool [B, H, W]: each block together with a halo of `cells` blocks around it."""
    masks = block_masks(grid, shape)
    return torch.stack([masks[near].any(dim=0) for near in neighbours(grid, cells)])


def blocks_of_mask(mask: torch.Tensor, grid: Grids, coverage: float = 0.0) -> list[int]:
    """The blocks of which a bool mask [H, W] covers more than the share `coverage` in [0, 1)."""
    masks = block_masks(grid, mask.shape)
    share = (masks & mask.bool()).sum(dim=(1, 2)) / masks.sum(dim=(1, 2))  # [B]
    return torch.nonzero(share > coverage).flatten().tolist()


def _intervals(parts: int, size: int) -> torch.Tensor:
    """Bool [parts, size]: a row of pixels cut into consecutive parts at floor(i * size / parts)."""
    edges = torch.arange(parts + 1) * size // parts
    pixels = torch.arange(size)
    return (pixels >= edges[:-1, None]) & (pixels < edges[1:, None])


# Names of grids and blocks.


def default_grid(height: int, width: int) -> list[int]:
    """[h, w] for pictures of this shape: square blocks of one size, 3 to 5 of them along the shorter side.

    4x4 for a square, 4x6 for 3:2, 3x4 for 4:3. Proportions that have no such grid, 16:9 for one, get 4 blocks
    along the shorter side and nearly square ones.
    """
    common = math.gcd(height, width)
    h, w = height // common, width // common
    while min(h, w) < 3:
        h, w = 2 * h, 2 * w
    if min(h, w) > 5:
        h, w = (round(4 * side / min(height, width)) for side in (height, width))
    return [h, w]


def parse_grid(text: str) -> list[int]:
    """'4x6' -> [4, 6]: rows and columns of blocks. ValueError, in one line, for anything else."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"{text}: expected rows x columns, such as 4x4")
    return [int(side) for side in sides]


def parse_grids(text: str) -> list[list[int]]:
    """'4x4,8x8' -> [[4, 4], [8, 8]]. ValueError, in one line, unless each grid is finer than the one before."""
    grids = [parse_grid(part.strip()) for part in text.split(",")]
    for coarse, fine in zip(grids, grids[1:], strict=False):
        if coarse == fine or coarse[0] > fine[0] or coarse[1] > fine[1]:
            names = f"{grid_name(coarse)} before {grid_name(fine)}"
            raise ValueError(f"{text}: grids go from coarse to fine, not {names}")
    return grids


def parse_blocks(text: str, grid: Grids) -> list[int]:
    """Sorted block numbers from a list such as '5,6', '4-7', 'row1', 'rows0-1', 'col2', 'cols1-2' or 'all'.

    Parts are joined by commas: 'row0,12-15'. Rows and columns count from 0 as blocks do. Of several grids, 'all'
    is every block, and else '1:' says which grid (from 0) a part and those after it are of: '0:5,6,1:row0'.
    Raises ValueError, in one line, for a part that reads otherwise or lies outside its grid (h, w).
    """
    grids = as_grids(grid)
    number = 0 if len(grids) == 1 else None
    chosen = set()
    for part in text.lower().split(","):
        prefix, colon, rest = part.rpartition(":")
        number = _parse_number(prefix.strip(), grids) if colon else number
        if number is None and rest.strip() == "all":
            return list(range(sum(block_counts(grids))))
        if number is None:
            raise ValueError(f"{part.strip()!r} is of which grid? {_grid_choices(grids)}")
        of_grid = blocks_of_grid(grids, number)
        chosen.update(of_grid[block] for block in _parse_part(rest.strip(), grids[number]))
    return sorted(chosen)


def _parse_number(text: str, grids: Sequence[Grid]) -> int:
    if not text.isdigit() or int(text) >= len(grids):
        raise ValueError(f"There is no grid {text!r}: {_grid_choices(grids)}")
    return int(text)


def _grid_choices(grids: Sequence[Grid]) -> str:
    return "write " + " or ".join(
        f"'{number}:...' for {grid_name(each)}" for number, each in enumerate(grids)
    )


def _parse_part(part: str, grid: Grid) -> list[int]:
    h, w = grid
    numbers = torch.arange(h * w).reshape(h, w)
    if part == "all":
        return numbers.flatten().tolist()
    match = re.fullmatch(r"(rows?|cols?|)\s*(\d+)(?:\s*-\s*(\d+))?", part)
    if match is None:
        raise ValueError(f"Cannot read {part!r} as blocks: use '5,6', '4-7', 'row1', 'cols1-2' or 'all'")
    kind = match[1].rstrip("s")
    first, last = int(match[2]), int(match[3] or match[2])
    name, count = {"row": ("rows", h), "col": ("columns", w), "": ("blocks", h * w)}[kind]
    if first > last:
        raise ValueError(f"The range {part!r} runs backwards: write the smaller number first")
    if last >= count:
        raise ValueError(f"{part!r} is outside the {h}x{w} grid: {name} are 0 to {count - 1}")
    chosen = {"row": numbers[first : last + 1], "col": numbers[:, first : last + 1]}
    return chosen.get(kind, torch.arange(first, last + 1)).flatten().tolist()
