# SPDX-License-Identifier: Apache-2.0
"""torch_utils.ops.spatial_modulation: the definition, the closed form of the mean square, derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from torch_utils.ops import spatial_modulation
from torch_utils.ops.spatial_modulation import mean_square, modulate, resize

SIZES = [(4, 4), (1, 1), (3, 5), (8, 12), (16, 24), (16, 5), (9, 13)]  # finer, equal and coarser than 8 x 12


def draw(*shape, seed=0, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def resized_by_pytorch(grid, height, width):
    h, w = grid.shape[2:]
    grid = F.adaptive_avg_pool2d(grid, [min(h, height), min(w, width)])
    return F.interpolate(grid, size=[height, width], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize(size):
    grid = draw(2, 3, *size)
    torch.testing.assert_close(resize(grid, 8, 12), resized_by_pytorch(grid, 8, 12))
    constant = torch.full([1, 1, *size], 0.7, dtype=torch.float64)
    torch.testing.assert_close(resize(constant, 8, 12), torch.full([1, 1, 8, 12], 0.7, dtype=torch.float64))


@pytest.fixture
def full_maps(monkeypatch):
    """Counts the maps that are made, which the closed form does without."""
    made = []
    monkeypatch.setattr(spatial_modulation, "resize", lambda *args: made.append(args) or resize(*args))
    return made


SMALL = [(4, 4), (1, 1), (3, 5), (80, 1), (9, 13), (16, 24)]  # for maps of 64 x 48: one axis is coarser once


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_mean_square_of_one_grid(size, full_maps):
    grid = draw(2, 3, *size)
    expected = resized_by_pytorch(grid, 64, 48).square().mean(dim=[2, 3])
    torch.testing.assert_close(mean_square(grid, 64, 48), expected)
    torch.testing.assert_close(mean_square([grid], 64, 48), expected)
    assert full_maps == []


def test_mean_square_of_sums(full_maps):
    grids = [draw(2, 3, *size, seed=i) for i, size in enumerate(SMALL)]
    for count in (2, 3, 6):
        total = sum(resized_by_pytorch(grid, 64, 48) for grid in grids[:count])
        torch.testing.assert_close(mean_square(grids[:count], 64, 48), total.square().mean(dim=[2, 3]))
    twice = mean_square([grids[0], grids[0]], 64, 48)  # the same tensor as two grids
    torch.testing.assert_close(twice, 4 * mean_square(grids[0], 64, 48))
    assert full_maps == []


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mean_square_of_grids_about_as_fine_as_the_map(size, full_maps):
    grids = [draw(2, 3, 1, 1), draw(2, 3, *size)]
    total = sum(resized_by_pytorch(grid, 8, 12) for grid in grids)
    torch.testing.assert_close(mean_square(grids, 8, 12), total.square().mean(dim=[2, 3]))
    assert len(full_maps) == (2 if size[0] * size[1] * 8 > 96 else 0)


def test_mean_square_is_exact_where_the_layers_need_it():
    """Constant styles give their square, as in StyleGAN2; sums that cancel give zero and never less."""
    style = draw(2, 5, 1, 1, dtype=torch.float32)
    result = mean_square(style.expand(-1, -1, 4, 4), 64, 64)
    torch.testing.assert_close(result, style.flatten(1).square(), rtol=1e-6, atol=0)
    wave = torch.tensor([1.0, -1.0]).repeat(16).reshape(1, 1, 1, 32) * draw(4, 99, 8, 1, dtype=torch.float32)
    for grids, height, width in (([wave], 512, 16), ([wave, -wave], 64, 64)):
        result = mean_square(grids, height, width)
        assert (result >= 0).all() and result.max() < 1e-5
    assert mean_square(style.half(), 8, 8).dtype == torch.float32


@pytest.mark.parametrize("side", [4, 16])
def test_mean_square_gradients(side):
    grids = [draw(2, 2, *size, seed=i, grad=True) for i, size in enumerate([(2, 3), (5, 2)])]
    assert gradcheck(lambda *grids: mean_square(grids, side, side), grids)
    assert gradgradcheck(lambda *grids: mean_square(grids, side, side), grids)


@pytest.mark.parametrize("impl", ["ref", "cuda"])
def test_modulate(impl):
    x, grids = draw(2, 3, 8, 12), [draw(2, 3, *size, seed=i + 1) for i, size in enumerate(SIZES[:3])]
    expected = x * sum(resized_by_pytorch(grid, 8, 12) for grid in grids)
    torch.testing.assert_close(modulate(x, *grids, impl=impl), expected)
    half = modulate(x.half(), *(grid.float() for grid in grids), impl=impl)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), expected, rtol=2e-3, atol=2e-3)
    last = modulate(x.contiguous(memory_format=torch.channels_last), *grids, impl=impl)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_modulate_gradients():
    inputs = [
        draw(1, 2, 4, 3, grad=True),
        draw(1, 2, 2, 2, seed=1, grad=True),
        draw(1, 2, 5, 1, seed=2, grad=True),
    ]
    assert gradcheck(modulate, inputs)
    assert gradgradcheck(modulate, inputs)


def test_the_matrices_may_be_made_in_inference_mode():
    """What the first call keeps serves later ones that need gradients."""
    grid = draw(1, 1, 2, 2, grad=True)
    with torch.inference_mode():
        mean_square(grid, 37, 41), resize(grid, 37, 41)
    (gradient,) = torch.autograd.grad(mean_square(grid, 37, 41).sum() + resize(grid, 37, 41).sum(), grid)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([(2, 3, 8, 8)], "at least one grid"),
        ([(2, 3, 8), (2, 3, 2, 2)], r"modulate takes x \[N,C,H,W\]"),
        ([(2, 3, 8, 8), (2, 4, 2, 2)], r"a grid has shape \[2, 4, 2, 2\], expected \[2, 3, 'h', 'w'\]"),
        ([(2, 3, 8, 8), (2, 3, 2)], r"a grid has shape \[2, 3, 2\]"),
    ],
    ids=str,
)
def test_modulate_mistakes(arguments, message):
    with pytest.raises(AssertionError, match=message):
        modulate(*(torch.zeros(shape) for shape in arguments))
    with pytest.raises(AssertionError, match="impl is 'fast'"):
        modulate(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1), impl="fast")
