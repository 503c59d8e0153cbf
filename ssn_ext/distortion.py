# SPDX-License-Identifier: Apache-2.0
"""How much a picture changed inside and outside a set of pixels: pure functions, for loss, metric and script.

Pictures are float [N, C, H, W] in [-1, 1]; a mask is bool [H, W] or [N, H, W] and True on the edited block.
"""

import torch


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
