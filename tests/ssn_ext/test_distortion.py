# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.distortion against closed forms and NumPy selections."""

import numpy as np
import pytest
import torch

from ssn_ext.blocks import block_masks, halo_masks, neighbours
from ssn_ext.distortion import block_change, change_map, inside_change, outside_change, split_influence

GRID, SHAPE = (2, 3), (5, 7)  # blocks of unequal sizes


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.randn([2, 4, 3, *SHAPE], generator=generator, dtype=torch.float64).unbind()


def test_inside_and_outside_of_a_constant_change():
    before = torch.zeros(1, 3, 4, 4)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    after = torch.where(mask, 0.5, torch.tensor(-0.1)).expand(1, 3, 4, 4)
    torch.testing.assert_close(inside_change(before, after, mask), torch.tensor([0.25]))
    torch.testing.assert_close(outside_change(before, after, mask), torch.tensor([0.01]))


@pytest.mark.parametrize("per_sample", [False, True])
def test_means_are_over_the_selected_values(pictures, per_sample):
    before, after = pictures
    masks = block_masks(GRID, SHAPE)[:4] if per_sample else block_masks(GRID, SHAPE)[5]
    inside, outside = inside_change(before, after, masks), outside_change(before, after, masks)
    square = np.square(before.numpy() - after.numpy())
    for i in range(4):
        mask = (masks[i] if per_sample else masks).numpy()
        assert inside[i].item() == pytest.approx(square[i][:, mask].mean(), rel=1e-12)
        assert outside[i].item() == pytest.approx(square[i][:, ~mask].mean(), rel=1e-12)


def test_block_change_is_the_inside_change_of_every_block(pictures):
    before, after = pictures
    masks = block_masks(GRID, SHAPE)
    blocks = block_change(before, after, masks)
    expected = torch.stack([inside_change(before, after, mask) for mask in masks], dim=1)
    torch.testing.assert_close(blocks, expected)


def test_one_original_serves_many_candidates(pictures):
    before, after = pictures
    mask = block_masks(GRID, SHAPE)[0]
    torch.testing.assert_close(
        outside_change(before[:1], after, mask), outside_change(before[:1].expand_as(after), after, mask)
    )


def test_an_empty_side_is_nan_and_halves_are_measured_in_float32(pictures):
    before, after = pictures
    assert outside_change(before, after, torch.ones(SHAPE, dtype=torch.bool)).isnan().all()
    assert change_map(before.half(), after.half()).dtype == torch.float32


def test_gradients_reach_both_pictures(pictures):
    before, after = (each.clone().requires_grad_() for each in pictures)
    mask = block_masks(GRID, SHAPE)[2]
    outside_change(before, after, mask).sum().backward()
    torch.testing.assert_close(before.grad, -after.grad)
    assert (after.grad[..., mask] == 0).all() and (after.grad[..., ~mask] != 0).all()


@pytest.mark.parametrize("cells", [0, 1])
def test_influence_matrix_splits_into_what_the_pictures_say(pictures, cells):
    before, after = pictures
    masks = block_masks(GRID, SHAPE)
    matrix = torch.stack(
        [block_change(before, after + block, masks) for block in range(6)], dim=1
    )  # [N, B, B]
    inside, outside = split_influence(matrix, masks.sum(dim=(1, 2)), neighbours(GRID, cells))
    excluded = halo_masks(GRID, SHAPE, cells)
    for block in range(6):
        torch.testing.assert_close(inside[:, block], inside_change(before, after + block, masks[block]))
        if not excluded[block].all():
            torch.testing.assert_close(
                outside[:, block], outside_change(before, after + block, excluded[block])
            )
        else:
            assert outside[:, block].isnan().all()
