# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.distortion against closed forms and NumPy selections."""

import numpy as np
import pytest
import scipy.optimize
import torch

from ssn_ext import distortion
from ssn_ext.blocks import block_masks, halo_masks, neighbours
from ssn_ext.distortion import (
    block_change,
    change_map,
    inside_change,
    masked_mse,
    outside_change,
    split_influence,
)
from training.networks import Discriminator

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


# The siblings: mse, emd, features.


def tiny_discriminator(architecture="resnet"):
    torch.manual_seed(0)
    D = Discriminator(
        c_dim=0,
        img_resolution=16,
        img_channels=3,
        channel_base=64,
        channel_max=8,
        architecture=architecture,
    )
    return D.requires_grad_(False)


def siblings(grid=(2, 2)):
    D = tiny_discriminator()
    return distortion.choose(grid, lambda pictures: distortion.discriminator_features(D, pictures.float()))


def close(a, b):
    """Equal up to the float32 that networks compute in."""
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def faces():
    """Two sets of 3 pictures of 16x16."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn([2, 3, 3, 16, 16], generator=generator, dtype=torch.float64).unbind()


def test_the_names_are_what_can_be_chosen():
    assert sorted(siblings()) == sorted(distortion.NAMES)
    assert "features" not in distortion.choose((2, 2))


@pytest.mark.parametrize("name", distortion.NAMES)
def test_equal_pictures_have_distortion_zero_and_zero_gradients(name, faces):
    before = faces[0].clone().requires_grad_()
    after = faces[0].clone().requires_grad_()
    mask = block_masks((2, 2), (16, 16))[1]
    value = siblings()[name](before, after, mask)
    assert (value == 0).all()
    value.sum().backward()
    for picture in (before, after):
        assert picture.grad.isfinite().all() and float(picture.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("name", distortion.NAMES)
def test_only_what_is_in_the_mask_counts_and_gets_a_gradient(name, faces):
    before, after = faces
    masks = ~block_masks((2, 2), (16, 16))[[0, 3, 1]]  # a mask for each sample
    where = masks[:, None].expand_as(after)
    measure = siblings()[name]
    values = measure(before, after, masks)
    assert values.shape == (3,) and (values > 0).all()
    close(measure(before, torch.where(where, after, -after), masks), values)
    assert (measure(before, torch.where(where, before, after), masks) == 0).all()
    singly = [measure(before[i : i + 1], after[i : i + 1], masks[i]) for i in range(3)]
    close(torch.cat(singly), values)
    after = after.clone().requires_grad_()
    measure(before, after, masks).sum().backward()
    assert (after.grad[~where] == 0).all() and (after.grad[where] != 0).double().mean() > 0.99


def test_gradients_are_those_of_finite_differences(faces):
    before, after = (each[:1, :2, :4, :4].clone().requires_grad_() for each in faces)
    mask = ~block_masks((2, 2), (4, 4))[1]
    for measure in distortion.choose((2, 2), lambda pictures: torch.sin(pictures).flatten(1)).values():
        assert torch.autograd.gradcheck(lambda a, b, f=measure: f(a, b, mask), (before, after))


@pytest.mark.parametrize("name", distortion.NAMES)
def test_symmetric_where_the_mask_is_everything(name, faces):
    """(features: elsewhere the surroundings are those of the first picture)"""
    everything = torch.ones(16, 16, dtype=torch.bool)
    measure = siblings()[name]
    close(measure(*faces, everything), measure(*faces[::-1], everything))


@pytest.mark.parametrize("name", distortion.NAMES)
def test_an_empty_mask_is_nan_and_one_original_serves_many(name, faces):
    before, after = faces
    measure = siblings()[name]
    assert measure(before, after, torch.zeros(16, 16, dtype=torch.bool)).isnan().all()
    mask = block_masks((2, 2), (16, 16))[2]
    expected = measure(before[:1].expand_as(after), after, mask)
    close(measure(before[:1], after, mask), expected)


@pytest.mark.parametrize("name", ["mse", "emd"])
@pytest.mark.parametrize("color", [(0.3,), (0.3, -0.2, 0.1), (0.3, 0.0, -0.1, 0.5)])
def test_a_change_by_one_colour_is_its_mean_square(name, color):
    """mse and emd are on one scale, for any number of channels: c^2 for a shift by c."""
    before = torch.rand(2, len(color), *SHAPE)
    after = before + torch.tensor(color)[:, None, None]
    value = distortion.choose(GRID)[name](before, after, ~block_masks(GRID, SHAPE)[4])
    torch.testing.assert_close(value, torch.full([2], float(np.mean(np.square(color)))))


def test_emd_forgives_moves_within_a_block_but_not_between_blocks(pictures):
    before = pictures[0]
    cells = block_masks(GRID, SHAPE)
    moved = before.clone()
    for cell in cells:
        order = torch.randperm(int(cell.sum()))
        moved[:, :, cell] = before[:, :, cell][:, :, order]
    everything = torch.ones(SHAPE, dtype=torch.bool)
    measures = distortion.choose(GRID)
    assert (measures["mse"](before, moved, everything) > 0.1).all()
    assert float(measures["emd"](before, moved, everything).max()) < 1e-20
    swapped = before.flip(3)  # the outer columns of blocks change places
    assert (measures["emd"](before, swapped, everything) > 1e-3).all()


def test_emd_is_the_wasserstein_distance_of_each_block(pictures):
    """Against scipy's assignment: with n equal weights the cheapest transport is a permutation."""
    before, after = (each[:, :1] for each in pictures)
    mask = torch.rand(SHAPE) < 0.7
    total = torch.zeros(4, dtype=torch.float64)
    for cell in block_masks(GRID, SHAPE) & mask:
        for i in range(4):
            x, y = before[i, 0, cell].numpy(), after[i, 0, cell].numpy()
            cost = np.square(x[:, None] - y[None])
            total[i] += cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    torch.testing.assert_close(distortion.masked_emd(before, after, mask, GRID), total / mask.sum())


def test_emd_is_at_most_mse_and_knows_colours_not_only_channels(pictures):
    before, after = pictures
    mask = ~block_masks(GRID, SHAPE)[0]
    measures = distortion.choose(GRID)
    assert (measures["emd"](before, after, mask) < measures["mse"](before, after, mask)).all()
    # Each channel has the values 1 and 0 in both pictures; only together they are other colours.
    red_blue = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).reshape(1, 3, 1, 2)
    both_none = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).reshape(1, 3, 1, 2)
    pair = torch.ones(1, 2, dtype=torch.bool)
    assert float(distortion.masked_emd(red_blue, both_none, pair, (1, 1))) > 0.01
    frame = distortion.channel_directions(3)
    torch.testing.assert_close(frame.T @ frame / len(frame), torch.eye(3, dtype=torch.float64) / 3)


def test_features_per_unit_of_area():
    """With pixels as features it is the mean square over the mask, of one channel."""
    before, after = torch.rand(2, 3, 1, 8, 8)
    mask = block_masks((2, 2), (8, 8))[3]
    value = distortion.masked_features(before, after, mask, lambda pictures: pictures.flatten(1) / 8)
    torch.testing.assert_close(value, masked_mse(before, after, mask))


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_discriminator_features_are_its_blocks_outputs(architecture, faces):
    D = tiny_discriminator(architecture)
    outputs = []
    for block in (D.b16, D.b8):
        block.register_forward_hook(lambda _m, _args, result: outputs.append(result[0]))
    D(faces[0].float(), None)
    got = distortion.discriminator_features(D, faces[0].float())
    outputs = [each / each.norm(dim=1, keepdim=True) for each in outputs[:2]]
    means = [each.flatten(1) / (2 * each.shape[2] * each.shape[3]) ** 0.5 for each in outputs]
    close(got, torch.cat(means, dim=1).float())
    close(got.square().sum(dim=1), torch.ones(3))


def test_discriminator_features_do_not_depend_on_the_batch(faces):
    D = tiny_discriminator()
    together = distortion.discriminator_features(D, faces[0].float())
    close(distortion.discriminator_features(D, faces[0][1:2].float()), together[1:2])


def test_emd_of_several_grids_is_the_mean_over_those_of_more_than_one_block(pictures):
    before, after = pictures
    mask = ~block_masks(GRID, SHAPE)[1]
    together = distortion.choose([[1, 1], [2, 3], [4, 5]])["emd"](before, after, mask)
    each = [distortion.masked_emd(before, after, mask, grid) for grid in ([2, 3], [4, 5])]
    torch.testing.assert_close(together, (each[0] + each[1]) / 2)
    assert (each[1] > each[0]).all()  # smaller blocks leave less room to move
