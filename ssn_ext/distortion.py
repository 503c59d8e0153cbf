# SPDX-License-Identifier: Apache-2.0
"""How much a picture changed inside and outside a set of pixels: pure functions, for loss, metric and script.

Pictures are float [N, C, H, W] in [-1, 1]; a mask is bool [H, W] or [N, H, W]. The distortions D of eq. (2) are
siblings, masked_mse, masked_emd and masked_features: (before, after, mask) -> [N], the change per unit of area
where the mask is True. All are squared distances on one scale: 0 for equal pictures, for the first two c^2 for
pictures that differ by c everywhere.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from ssn_ext.blocks import block_masks
from ssn_ext.grids import Grid, Grids, as_grids, grids_with_outside

NAMES = ("mse", "features", "emd")
NUM_BASES = 4  # orthonormal bases of channel space along which masked_emd looks: the channels and three more

Distortion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def choose(
    grid: Grids, features: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, Distortion]:
    """The distortions by name, as functions (before, after, mask) -> [N]; 'features' only where these are given.

    grid: (h, w) of the blocks, or several grids, for emd; features: see masked_features.
    """
    found = {"mse": masked_mse, "emd": functools.partial(masked_emd, grid=grid)}
    if features is not None:
        found["features"] = functools.partial(masked_features, features=features)
    return found


def outside_change(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the values outside the mask -> [N]; NaN where nothing is outside."""
    return masked_mse(before, after, ~mask)


def inside_change(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the values inside the mask -> [N]; NaN where the mask is empty."""
    return masked_mse(before, after, mask)


def masked_mse(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over pixels where mask is True and over all channels -> [N].

    mean over (c, x, y) in the mask of (after - before)^2. NaN for an empty mask. Gradients flow into both.
    """
    change = change_map(before, after)  # [N, H, W]
    weight = mask.to(change.device, change.dtype).expand_as(change)
    return (change * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def masked_emd(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor, grid: Grids) -> torch.Tensor:
    """Earth mover's distance of the colours in each block, squared and sliced, mean over the mask -> [N].

    For each block of the grid the colours of its pixels in the mask, wherever they lie, are two sets of points
    in channel space. Along a direction the cheapest way to carry one set onto the other pairs their sorted
    values; the squared differences are averaged over pixels and over `channel_directions` (2-Wasserstein,
    squared). Moving pixels about within a block costs nothing, so it is never more than masked_mse; it equals it for
    a change by one colour. Of several grids: the mean over those of more than one block. NaN for an empty mask.
    Gradients flow into both.
    """
    before, after = torch.broadcast_tensors(before, after)
    several = as_grids(grid)
    chosen = [several[number] for number in grids_with_outside(several)] or several
    return torch.stack([_emd_of_grid(before, after, mask, each) for each in chosen]).mean(dim=0)


def _emd_of_grid(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`masked_emd` of pictures of one shape and one grid."""
    count, channels, height, width = before.shape
    places, real = _places(grid, (height, width), before.device)  # [B, n], [B, n]
    taken = mask.to(before.device).expand(count, -1, -1).flatten(1)[:, places] & real  # [N, B, n]
    directions = channel_directions(channels).to(before.device)  # [K, C]
    first, second = (_ordered(each, directions, places, taken) for each in (before, after))
    return (second - first).square().mean(dim=1).sum(dim=(1, 2)) / taken.sum(dim=(1, 2))


def _ordered(
    pictures: torch.Tensor, directions: torch.Tensor, places: torch.Tensor, taken: torch.Tensor
) -> torch.Tensor:
    """The colours at the places taken [N, B, n] along each direction, sorted within the block -> [N, K, B, n]."""
    values = pictures.to(torch.promote_types(pictures.dtype, torch.float32)).flatten(2)  # [N, C, H*W]
    values = torch.einsum("kc,ncp->nkp", directions.to(values), values)[:, :, places]  # [N, K, B, n]
    absent = torch.finfo(values.dtype).max  # sorts behind all others, at equal places in all pictures
    return values.masked_fill(~taken[:, None], absent).sort(dim=-1).values


def sorted_colours(pictures: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """What `masked_emd` of one grid compares when whole blocks are in its mask: (values [N, P], block of each [P]).

    The sum of squared differences of two rows, of all values but those of the blocks left out, is the distance
    times the share of the picture that the others take.
    """
    count, channels, height, width = pictures.shape
    places, real = _places(grid, (height, width), pictures.device)  # [B, n], [B, n]
    directions = channel_directions(channels).to(pictures.device)  # [K, C]
    values = _ordered(pictures, directions, places, real.expand(count, -1, -1))
    number = torch.arange(len(real), device=real.device)[:, None].expand_as(real)  # [B, n]
    scale = (len(directions) * height * width) ** -0.5
    return values[:, :, real].flatten(1) * scale, number[real].repeat(len(directions))


def channel_directions(channels: int) -> torch.Tensor:
    """float64 [K, C] unit vectors: NUM_BASES orthonormal bases, the channels themselves and fixed random ones.

    The mean of (direction . v)^2 over them is |v|^2 / C for every v. One channel has one direction.
    """
    bases = [torch.eye(channels, dtype=torch.float64)]
    rnd = torch.Generator().manual_seed(0)
    for _ in range(NUM_BASES - 1 if channels > 1 else 0):
        bases.append(torch.linalg.qr(torch.randn([channels, channels], generator=rnd, dtype=torch.float64)).Q)
    return torch.cat(bases)


def _places(grid: Grid, shape: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel numbers of each block [B, n], n of the largest, and which of them are not mere filling, bool."""
    inside = block_masks(grid, shape).flatten(1).to(torch.uint8)  # [B, H*W]
    most = int(inside.sum(dim=1).max())
    real, places = inside.sort(dim=1, descending=True, stable=True)
    return places[:, :most].to(device), real[:, :most].bool().to(device)


def masked_features(
    before: torch.Tensor,
    after: torch.Tensor,
    mask: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Squared distance of deep features, for a change in the mask alone, by the mask's share of the picture -> [N].

    `features`: pictures [N, C, H, W] -> [N, P], whose squared distances are averages over positions and depths
    (discriminator_features, metrics.detectors.perceptual_features). Features see beyond the pixels under them, so
    what is not in the mask is taken from `before` in both pictures: it adds nothing and gets no gradient, at any
    depth. NaN for an empty mask. Gradients flow into both.
    """
    mask = mask.to(before.device).expand(after.shape[0], -1, -1)
    before, after = torch.broadcast_tensors(before, after)
    pasted = torch.where(mask[:, None], after, before)
    first, second = features(torch.cat([before, pasted])).chunk(2)
    change = (first - second).to(torch.promote_types(first.dtype, torch.float32)).square().sum(dim=1)
    return change / mask.to(change).mean(dim=(1, 2))


def discriminator_features(D: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Features of a discriminator at all resolutions from half the picture's on -> float32 [N, P].

    pictures [N, C, H, W] in [-1, 1]. The outputs of its blocks but for the last, which compares the pictures of a
    batch. Features have unit length at each position; the squared distance of two rows is the mean over positions
    of the squared distance, 0 to 4, averaged over depths. Nothing is accumulated in D if it requires no gradients.
    """
    x, img, depths = None, pictures, []
    for resolution in D.block_resolutions:
        x, img = getattr(D, f"b{resolution}")(x, img)
        values = x.to(torch.float32)
        values = values * torch.rsqrt(values.square().sum(dim=1, keepdim=True) + 1e-8)  # [N, C, h, w]
        depths.append(values.flatten(1) / (len(D.block_resolutions) * values[0, 0].numel()) ** 0.5)
    return torch.cat(depths, dim=1)


def block_change(before: torch.Tensor, after: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean squared difference in each of B pixel blocks, given as bool masks [B, H, W] -> [N, B]."""
    change = change_map(before, after)
    weight = masks.to(change.device, change.dtype)
    return torch.einsum("nyx,byx->nb", change, weight) / weight.sum(dim=(1, 2))


def change_map(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Squared difference of every pixel, averaged over channels -> [N, H, W], float32 or better."""
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return (after.to(dtype) - before.to(dtype)).square().mean(dim=1)


def split_influence(
    matrix: torch.Tensor, sizes: torch.Tensor, near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inside and outside change of every re-drawn block, from the influence matrix alone.

    matrix [..., B, B]: [a, b] is the mean squared change of pixel block b when block a is re-drawn; sizes
    [B]: pixels of each block; near bool [B, B]: blocks that do not count as outside (blocks.neighbours;
    cells=0 is a alone). Returns inside [..., B] (the diagonal) and outside [..., B], the mean over all values
    that are not near a.
    """
    weight = sizes.to(matrix) * (~near).to(matrix)  # [B, B]
    inside = torch.diagonal(matrix, dim1=-2, dim2=-1)
    return inside, (matrix * weight).sum(dim=-1) / weight.sum(dim=-1)
