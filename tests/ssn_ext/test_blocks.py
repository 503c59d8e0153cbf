# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.blocks against brute force: which values of a latent and which pixels belong to which block."""

import itertools

import pytest
import torch

from ssn_ext.blocks import (
    block_masks,
    blocks_of_mask,
    default_grid,
    halo_masks,
    neighbours,
    parse_blocks,
    replace_blocks,
    union_mask,
)

GRID = (2, 3)


def pair(*shape):
    """Two latents without a value in common."""
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return latent, latent + 100


@pytest.mark.parametrize("shape", [(3, 24), (3, 5, 24), (3, 4, 2, 3), (3, 2, 5, 24)])
def test_replace_blocks_changes_exactly_the_values_of_the_blocks(shape):
    latent, fresh = pair(*shape)
    result = replace_blocks(latent, fresh, [1, 5], GRID)
    flat = latent.reshape(3, -1, 24), fresh.reshape(3, -1, 24), result.reshape(3, -1, 24)
    for channel, row, column in itertools.product(range(4), range(2), range(3)):
        place = channel * 6 + row * 3 + column
        expected = flat[row * 3 + column in (1, 5)][..., place]
        assert torch.equal(flat[2][..., place], expected)
    assert result.shape == latent.shape


def test_one_block_a_sample_equals_samples_edited_one_at_a_time():
    latent, fresh = pair(4, 7, 12)
    blocks = torch.tensor([5, 0, 3, 3])
    result = replace_blocks(latent, fresh, blocks, GRID)
    for i, block in enumerate(blocks.tolist()):
        one = replace_blocks(latent[i : i + 1], fresh[i : i + 1], [block], GRID)
        assert torch.equal(result[i : i + 1], one)


def test_replacing_all_blocks_in_any_order_gives_the_fresh_latent():
    latent, fresh = pair(2, 24)
    for order in [(0, 1, 2, 3, 4, 5), (3, 5, 0, 1, 4, 2)]:
        result = latent
        for block in order:
            result = replace_blocks(result, fresh, [block], GRID)
        assert torch.equal(result, fresh)


def test_replacing_leaves_its_arguments_and_takes_a_fresh_one_for_all():
    latent, fresh = pair(3, 24)
    before = latent.clone()
    result = replace_blocks(latent, fresh[:1].double(), [2], GRID)
    assert torch.equal(latent, before) and result.dtype == latent.dtype
    assert torch.equal(result[1, 2::6], fresh[0, 2::6])
    assert torch.equal(replace_blocks(latent, fresh, [], GRID), latent)


def test_gradients_flow_into_both_latents():
    latent, fresh = (each.requires_grad_() for each in pair(1, 24))
    replace_blocks(latent, fresh, [4], GRID).sum().backward()
    chosen = torch.arange(24) % 6 == 4
    assert torch.equal(fresh.grad[0] == 1, chosen) and torch.equal(latent.grad[0] == 0, chosen)


@pytest.mark.parametrize(
    ("shape", "blocks", "message"),
    [
        ((2, 25), [0], "does not hold a 2x3 grid"),
        ((2, 24), [6], "Block 6 is outside the 2x3 grid: blocks are 0 to 5"),
        ((2, 24), [-1], "Block -1 is outside"),
        ((2, 24), torch.tensor([1]), "one block for each of 2 samples"),
    ],
)
def test_replace_blocks_says_what_does_not_fit(shape, blocks, message):
    with pytest.raises(ValueError, match=message):
        replace_blocks(*pair(*shape), blocks, GRID)


@pytest.mark.parametrize(
    ("grid", "shape"), [((4, 4), (32, 32)), ((2, 3), (7, 10)), ((3, 2), (3, 5)), ((1, 1), (4, 6))]
)
def test_block_masks_follow_the_formula_and_part_the_picture(grid, shape):
    masks = block_masks(grid, shape)
    (h, w), (height, width) = grid, shape
    for r, k in itertools.product(range(h), range(w)):
        expected = torch.zeros(shape, dtype=torch.bool)
        expected[r * height // h : (r + 1) * height // h, k * width // w : (k + 1) * width // w] = True
        assert torch.equal(masks[r * w + k], expected)
    assert (masks.sum(dim=0) == 1).all()


def test_a_picture_smaller_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="2x9 pixels is smaller than its 3x3 grid"):
        block_masks((3, 3), (2, 9))


def test_union_halo_and_neighbours():
    masks = block_masks((3, 3), (6, 9))
    assert torch.equal(union_mask([0, 4], (3, 3), (6, 9)), masks[0] | masks[4])
    near = neighbours((3, 3))
    assert near[4].all()
    assert torch.nonzero(near[0]).flatten().tolist() == [0, 1, 3, 4]
    assert torch.equal(neighbours((2, 5), cells=0), torch.eye(10, dtype=torch.bool))
    halo = halo_masks((3, 3), (6, 9))
    assert torch.equal(halo[8], masks[[4, 5, 7, 8]].any(dim=0))


def test_a_painted_mask_finds_its_blocks():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 0:2] = True  # two rows by two columns, half of it in block 0 and half in block 2
    assert blocks_of_mask(mask, (2, 2)) == [0, 2]
    mask[0:3, 0:4] = True  # 14 of block 0's 16 pixels, 2 of block 2's
    assert blocks_of_mask(mask, (2, 2), coverage=0.5) == [0]
    assert blocks_of_mask(mask & False, (2, 2)) == []


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((64, 64), [4, 4]),
        ((160, 160), [4, 4]),
        ((128, 192), [4, 6]),
        ((384, 512), [3, 4]),
        ((64, 16), [16, 4]),
        ((640, 512), [5, 4]),
        ((576, 1024), [4, 7]),
    ],
)
def test_default_grids(shape, grid):
    assert default_grid(*shape) == grid
    sides = [block_masks(grid, shape).any(dim=axis).sum(dim=1) for axis in (2, 1)]  # heights, widths
    assert max(s.max() for s in sides) <= 1.03 * min(s.min() for s in sides)  # square, of one size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5,6", [5, 6]),
        ("4-7", [4, 5, 6, 7]),
        ("row1", [4, 5, 6, 7]),
        ("rows0-1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("col2", [2, 6, 10]),
        ("cols1-2", [1, 2, 5, 6, 9, 10]),
        ("all", list(range(12))),
        (" 11 , Row0,3 ", [0, 1, 2, 3, 11]),
    ],
)
def test_parse_blocks_reads(text, expected):
    assert parse_blocks(text, (3, 4)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "'12' is outside the 3x4 grid: blocks are 0 to 11"),
        ("row3", "'row3' is outside the 3x4 grid: rows are 0 to 2"),
        ("cols2-4", "columns are 0 to 3"),
        ("6-5", "runs backwards"),
        ("eyes", "Cannot read 'eyes' as blocks"),
        ("", "Cannot read ''"),
        ("1,,2", "Cannot read ''"),
        ("-1", "Cannot read '-1'"),
    ],
)
def test_parse_blocks_refuses_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_blocks(text, (3, 4))
    assert "\n" not in str(error.value)
