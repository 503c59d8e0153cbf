# SPDX-License-Identifier: Apache-2.0
"""Spaces in which a distortion is a squared distance of values that each belong to one block.

The floor of docs/limit.md asks nothing of y but that: so it exists for pixels (mse), for the colours of each block
sorted along fixed directions (emd), and for deep features, which belong to the blocks that their positions cover.
`Principal` keeps the first principal components of each block where the values are too many. It is an orthogonal
projection that mixes no blocks, which makes no change outside a block larger: the floor of what it keeps is a
lower bound for the whole.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from metrics import detectors
from ssn_ext.blocks import block_masks
from ssn_ext.distortion import sorted_colours
from ssn_ext.floor import FloorResult, ldbr_floor
from ssn_ext.grids import Grid
from torch_utils.images import to_float

MOST_VALUES = (
    3072  # values that a covariance is taken of, all blocks together: those of 32x32 pixels in colour
)
FIT_PICTURES, FIT_VALUES = 1024, 1 << 27  # what principal components are found from, at most


@dataclass(frozen=True)
class Space:
    """Values of pictures. With |.|^2 over the values outside block a, |v(y) - v(y')|^2 / (1 - shares[a]) is the
    distortion per unit of area.

    values  pictures float [N, C, H, W] in [-1, 1] -> float [N, P]
    index   block of each value, LongTensor [P]
    shares  the part of the picture that each block takes, B numbers of sum 1
    """

    values: Callable[[torch.Tensor], torch.Tensor]
    index: torch.Tensor
    shares: Sequence[float]

    def changes(
        self, before: torch.Tensor, after: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(outside [N], inside [N]) of one block, per unit of area, from values [N, P]; float64."""
        change = (after.double() - before.double()).square()
        own = self.index.to(change.device) == block
        share = self.shares[block]
        return change[:, ~own].sum(dim=1) / (1 - share), change[:, own].sum(dim=1) / share


# The three spaces.


def open_space(
    distortion: str, grid: Grid, image_shape: Sequence[int], detector: str | torch.nn.Module | None = None
) -> Space:
    """The space of a distortion, 'mse', 'emd' or 'features', for pictures of image_shape (C, H, W) and one grid.

    detector: for 'features', the name of a detector that says where its features lie, or its module.
    """
    if distortion == "mse":
        return of_pixels(grid, image_shape)
    if distortion == "emd":
        return of_colours(grid, image_shape)
    if not isinstance(detector, torch.nn.Module):
        detector = detectors.load_for("maps", detector)

    @torch.no_grad()
    def features(pictures):
        return detectors.perceptual_features(detector, pictures)

    return of_features(grid, image_shape, features, detectors.feature_shapes(detector))


def of_pixels(grid: Grid, image_shape: Sequence[int]) -> Space:
    """The values of masked_mse for pictures of image_shape (C, H, W): the pixels."""
    channels, height, width = image_shape
    index = block_masks(grid, (height, width)).to(torch.uint8).argmax(dim=0).flatten().repeat(channels)
    return Space(lambda pictures: pictures.flatten(1) * len(index) ** -0.5, index, _shares(grid, image_shape))


def of_colours(grid: Grid, image_shape: Sequence[int]) -> Space:
    """The values of masked_emd of one grid: sorted colours."""
    index = sorted_colours(torch.zeros([1, *image_shape]), grid)[1]
    return Space(lambda pictures: sorted_colours(pictures, grid)[0], index, _shares(grid, image_shape))


def of_features(
    grid: Grid,
    image_shape: Sequence[int],
    features: Callable[[torch.Tensor], torch.Tensor],
    maps: Sequence[Sequence[int]],
) -> Space:
    """Deep features at their positions: each belongs to the blocks that its cell of the picture covers.

    features: pictures -> [N, P'], whose squared distances are means over positions and depths; maps: the (C, h, w)
    of each depth, laid out flat one after another. A cell on a border is split: the squares of its parts add up
    to its own, in the proportion of the areas.
    """
    source, scale, index, first = [], [], [], 0
    for channels, h, w in maps:
        part = _overlap(grid, image_shape[1:], (h, w)).flatten(1)  # [B, h*w]
        block, place = torch.nonzero(part > 1e-9, as_tuple=True)
        source.append(first + (torch.arange(channels)[:, None] * (h * w) + place).flatten())
        scale.append(part[block, place].sqrt().repeat(channels))
        index.append(block.repeat(channels))
        first += channels * h * w
    source, scale, index = (torch.cat(each) for each in (source, scale, index))

    def values(pictures):
        found = features(pictures)
        return found[:, source.to(found.device)] * scale.to(found)

    return Space(values, index, _shares(grid, image_shape))


def _shares(grid: Grid, image_shape: Sequence[int]) -> list[float]:
    return block_masks(grid, image_shape[1:]).double().mean(dim=(1, 2)).tolist()


def _overlap(grid: Grid, shape: Sequence[int], cells: Sequence[int]) -> torch.Tensor:
    """float64 [B, h, w]: the part of each of h x w equal cells of a picture that each block covers; sums to 1."""

    def along(parts, size, count):
        edges = (
            (torch.arange(parts + 1) * size // parts).double() / size * count
        )  # as blocks.block_masks has them
        low, high = edges[:-1, None], edges[1:, None]
        cell = torch.arange(count)
        return (torch.minimum(high, cell + 1.0) - torch.maximum(low, cell.double())).clamp(min=0)

    rows, columns = (along(*each) for each in zip(grid, shape, cells, strict=True))
    return torch.einsum("rh,cw->rchw", rows, columns).reshape(-1, *cells)


# From pictures to a floor.


def real_pictures(dataset: torch.utils.data.Dataset, count: int, size: int = 64) -> Iterator[torch.Tensor]:
    """Yields the first `count` pictures of a data set in [-1, 1], at most `size` at a time."""
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        yield to_float(torch.from_numpy(np.stack([dataset[i][0] for i in numbers])))


class Principal:
    """The first principal components of the values of each block: [N, P] -> [N, p], not centred.

    sample [n, P]: values to find them from; index: the block of each; most: values to keep, of all blocks together.
    `index` of the result is the block of each component. Where there are no more than `most` values, all stay as
    they are.
    """

    def __init__(self, sample: torch.Tensor, index: torch.Tensor, most: int):
        index = index.to(sample.device)
        count = int(index.max()) + 1
        self.index, self.parts = index, None
        if sample.shape[1] <= most:
            return
        places = [torch.nonzero(index == block).flatten() for block in range(count)]
        keep = max(most // count, 1)
        self.parts = [(place, _components(sample[:, place], keep)) for place in places]
        sizes = torch.tensor([basis.shape[1] for _, basis in self.parts], device=index.device)
        self.index = torch.repeat_interleave(torch.arange(count, device=index.device), sizes)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.parts is None:
            return values
        return torch.cat([values[:, place] @ basis.to(values) for place, basis in self.parts], dim=1)


def _components(sample: torch.Tensor, keep: int) -> torch.Tensor:
    """The first `keep` eigenvectors [P, k] of the covariance of a sample [n, P], in the smaller of n and P; k is less
    where the sample has no more dimensions."""
    centred = sample.double() - sample.double().mean(dim=0)
    if sample.shape[0] >= sample.shape[1]:
        return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -keep:].to(sample.dtype)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values[-keep:], vectors[:, -keep:]
    vectors = vectors[:, values > 1e-10 * values[-1].clamp(min=1e-30)]
    if vectors.shape[1] == 0:  # all alike: any direction will do
        return torch.eye(sample.shape[1], 1, dtype=sample.dtype, device=sample.device)
    return torch.linalg.qr(centred.T @ vectors).Q.to(sample.dtype)


def gather(
    space: Space, batches: Iterable[torch.Tensor], most: int | None = MOST_VALUES
) -> tuple[Space, torch.Tensor, float]:
    """From batches of a space's values [n, P]: (the space of their components, all values in it [N, p] on the
    CPU, the share of the variance that the components hold). most=None: all values as they are."""
    batches, first = iter(batches), []
    most = len(space.index) if most is None else most
    enough = min(FIT_PICTURES, max(FIT_VALUES // len(space.index), 2))
    while sum(map(len, first)) < enough and (batch := next(batches, None)) is not None:
        first.append(batch)
    principal = Principal(torch.cat(first), space.index, most)
    kept, count, total, squares = [], 0, 0.0, 0.0
    for batch in itertools.chain(first, batches):
        kept.append(principal(batch).cpu())
        count += len(batch)
        total = total + batch.double().sum(dim=0)
        squares += float(batch.double().square().sum())
    samples = torch.cat(kept)
    variance = squares / count - float((total / count).square().sum())
    whole = principal.parts is None or variance <= 0
    share = 1.0 if whole else float(samples.double().var(dim=0, correction=0).sum()) / variance
    smaller = replace(space, values=lambda x: principal(space.values(x)), index=principal.index.cpu())
    return smaller, samples, min(share, 1.0)


def floor_of(
    space: Space, batches: Iterable[torch.Tensor], most: int | None = MOST_VALUES, **settings: Any
) -> tuple[FloorResult, float, Space]:
    """The floor of the distortion of a space, from batches of its values [n, P].

    Returns (floor of the components that `gather` keeps, their share of the variance, their space); settings:
    those of ldbr_floor.
    """
    smaller, samples, share = gather(space, batches, most)
    return ldbr_floor(samples=samples, masks=smaller.index, shares=space.shares, **settings), share, smaller
