# SPDX-License-Identifier: Apache-2.0
"""Latents at several scales: a coarse grid of blocks for layout and finer ones for detail, over one picture.

Which layers read which grid. Every layer reads one grid, chosen by the resolution of the layer's input: layers
below the first split read the first (coarsest) grid, those from the split on the second, and so on. That is where
StyleGAN2's own layers divide layout from detail, and it is the finest division that keeps all of this:
- The exact start. Given one vector u in all blocks of the first grid and one vector v in all of the second, the
  network transferred from a StyleGAN2 shows that StyleGAN2's picture of u mixed with v at the split, a picture
  which its training with style mixing has met; u = v is the plain picture. All layers of an input resolution
  share an entry of ws or an encoder branch, so no finer division would be one that StyleGAN2 knows.
- Independence. Blocks share nothing but the weights, so re-drawing all blocks of all grids, in any order, is an
  independent sample bit for bit; and a block of a finer grid changes nothing in the layers below its split.
- N(0, I) latents. The mapping stays per block, the same for all blocks of all grids: it normalises each block's z
  by itself, and a label joins every one.
The other candidate, w(y, x) = resize(w_coarse) + resize(w_fine) in every layer, keeps neither the start (the sum of
two of StyleGAN2's w is none of its w, their mean has half the variance) nor the division: every layer would follow
both grids.

Flat at the boundary. All blocks have C channels; a latent is [N, C, B] seen as one axis, where B counts the blocks
of all grids, the first grid's first. So z_dim and w_dim are C*B, one grid is the special case [N, C, h*w], and code
that only counts blocks (mapping, w_avg, replace_blocks, path length in Z, projection) knows no difference:
`G.latent_grid` is [1, B], one row of blocks. What looks at pixels asks for `G.latent_grids`, by `grids_of`. The
entry i of ws holds all B blocks, of which its layers read their own grid's; the rest of that entry is not looked at.

In pictures every grid has rectangles of its own. R_D and its metrics are means over the grids of each grid's own:
a block of one grid is re-drawn while all else stays, and everything outside its rectangle counts. A grid of one
block has no outside and takes no part, so that 1x1,8x8 is a global latent for the layout and a grid for the rest.

Functions here and in ssn_ext.blocks take as `grid` either one grid (h, w) or a list of grids.
"""

import math
from collections.abc import Sequence

import torch

Grid = Sequence[int]
Grids = Grid | Sequence[Grid]  # one grid or several


def as_grids(grid: Grids) -> list[list[int]]:
    """One grid (h, w) or several as a list of [h, w]."""
    several = grid if isinstance(grid[0], Sequence) else [grid]
    return [[int(h), int(w)] for h, w in several]


def grids_of(G: torch.nn.Module) -> list[list[int]]:
    """The grids of a generator or of its synthesis network: `latent_grids`, else its one `latent_grid`."""
    return as_grids(getattr(G, "latent_grids", None) or G.latent_grid)


def block_counts(grid: Grids) -> list[int]:
    """How many blocks each grid has."""
    return [h * w for h, w in as_grids(grid)]


def blocks_of_grid(grid: Grids, number: int) -> list[int]:
    """The blocks of one of the grids, numbered over all of them."""
    counts = block_counts(grid)
    first = sum(counts[:number])
    return list(range(first, first + counts[number]))


def grids_with_outside(grid: Grids) -> list[int]:
    """Numbers of the grids that have more than one block, so that something is outside each."""
    return [number for number, count in enumerate(block_counts(grid)) if count > 1]


def random_blocks(grid: Grids, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """LongTensor of `shape`: blocks numbered over all grids, drawn as a uniform one of those grids that have an
    outside and in it a uniform block. One draw of random numbers; for one grid it is torch.randint(h*w)."""
    counts, chosen = block_counts(grid), grids_with_outside(grid)
    each = math.lcm(*(counts[number] for number in chosen))  # a multiple of every count: % stays uniform
    draw = torch.randint(len(chosen) * each, list(shape), device=device)
    first = torch.tensor([sum(counts[:number]) for number in chosen], device=device)
    count = torch.tensor([counts[number] for number in chosen], device=device)
    number = draw // each
    return first[number] + draw % each % count[number]


def grid_means(values: torch.Tensor, grid: Grids) -> torch.Tensor:
    """Mean over the blocks of each grid, then over the grids that have an outside: [..., B] -> [...]."""
    parts = values.split(block_counts(grid), dim=-1)
    return torch.stack([parts[number].mean(dim=-1) for number in grids_with_outside(grid)]).mean(dim=0)


def default_splits(grid: Grids, img_shape: Sequence[int], last: int) -> list[int]:
    """Where each grid after the first takes over: the first resolution at which its blocks have two pixels a side.

    img_shape: [H, W] of the pictures, which the layers of resolution `last` make; `last` itself where even these
    blocks are smaller.
    """
    return [max(resolution_for(each, img_shape, last, pixels=2), 8) for each in as_grids(grid)[1:]]


def resolution_for(grid: Grid, img_shape: Sequence[int], last: int, pixels: int = 1) -> int:
    """The first resolution of 4, 8, ... `last` at which every block of one grid has `pixels` pixels a side; `last`
    where there is none. img_shape: as for `default_splits`."""
    resolution = 4
    while resolution < last and any(
        side * resolution < pixels * blocks * last for side, blocks in zip(img_shape, grid, strict=True)
    ):
        resolution *= 2
    return resolution


def check_splits(grid: Grids, splits: Sequence[int], last: int) -> None:
    """ValueError, in one line, unless every grid has layers: one split for each grid after the first, rising, of
    the resolutions 8, 16, ... `last`."""
    count = len(as_grids(grid)) - 1
    known = [2**i for i in range(3, last.bit_length())]
    if len(splits) != count or list(splits) != sorted(set(splits)) or not set(splits) <= set(known):
        given, accepted = (",".join(map(str, each)) for each in (splits, known))
        raise ValueError(
            f"{given}: {grid_name(grid)} takes {count} rising resolution{'s' * (count != 1)} of {accepted}"
        )


# Names of grids and blocks.


def grid_name(grid: Grids) -> str:
    """'4x4', or '4x4,8x8' for several."""
    return ",".join(f"{h}x{w}" for h, w in as_grids(grid))


def block_name(block: int, grid: Grids) -> str:
    """A block numbered over all grids as parse_blocks reads it: '5', or '1:5' where there are several grids."""
    counts = block_counts(grid)
    if len(counts) == 1:
        return str(block)
    number = 0
    while block >= counts[number]:
        block, number = block - counts[number], number + 1
    return f"{number}:{block}"
