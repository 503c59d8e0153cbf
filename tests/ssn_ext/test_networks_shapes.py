# SPDX-License-Identifier: Apache-2.0
"""Spatial generators of pictures that are not square: the exact start, other grids, invariances."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from ssn_ext import blocks, transfer
from ssn_ext.networks import SpatialGenerator, resize
from training.networks import Generator


def plain_generator(height, width, architecture="skip"):
    torch.manual_seed(0)
    G = Generator(
        z_dim=8, c_dim=0, w_dim=10, img_resolution=max(height, width), img_channels=3, img_shape=[height, width],
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(channel_base=256, channel_max=16, architecture=architecture),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith((".bias", "noise_strength")):
                p.add_(torch.randn_like(p) * 0.2)
        G.mapping.w_avg.normal_()
    return G.eval().requires_grad_(False)


def spatial_generator(height, width, grid, **synthesis_kwargs):
    """A small random one whose encoder already acts."""
    torch.manual_seed(1)
    count = grid[0] * grid[1]
    G = SpatialGenerator(
        z_dim=6 * count, c_dim=0, w_dim=6 * count, img_resolution=max(height, width), img_channels=3,
        img_shape=[height, width], latent_grid=grid, mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(
            channel_base=256, channel_max=12, encoder_kwargs=dict(channels=5, max_resolution=8), **synthesis_kwargs
        ),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if "encoder_style" in name:
                p.normal_()
            if name.endswith((".bias", "noise_strength")):
                p.add_(torch.randn_like(p) * 0.2)
    return G.eval().requires_grad_(False)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("grid", [None, [1, 1], [3, 4], [2, 3], [5, 3], [8, 12]])
def test_the_start_is_exact_for_every_grid(grid, architecture):
    """32x48 pictures begin at 4x6: the grid may be finer, coarser, or of other proportions."""
    G = plain_generator(32, 48, architecture)
    S = transfer.from_stylegan2(G, latent_grid=grid)
    assert S.img_shape == [32, 48] and S.latent_grid == (grid or [4, 6])
    z = torch.randn(2, G.z_dim)
    want = G(z, None, noise_mode="const", truncation_psi=0.8)
    many = z.repeat_interleave(math.prod(S.latent_grid), dim=1)
    got = S(many, None, noise_mode="const", truncation_psi=0.8)
    assert got.shape == (2, 3, 32, 48) and (got - want).abs().max() <= 1e-4 * want.std()


def test_1x1_grid_has_the_plain_generator_s_gradients():
    G = plain_generator(24, 32)
    S = transfer.from_stylegan2(G, latent_grid=[1, 1])
    z, grads = torch.randn(3, G.z_dim), []
    for net in [G, S]:
        net.train().requires_grad_(True)
        torch.manual_seed(3)
        net(z, None, noise_mode="random").square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max() + 1e-6)
        )


@pytest.mark.parametrize("encoder_init", ["exact", "random", "none"])
def test_height_and_width_are_exchanged_by_turning_weights_and_latents(encoder_init):
    wide = spatial_generator(32, 48, [3, 5], encoder_init=encoder_init)
    tall = spatial_generator(48, 32, [5, 3], encoder_init=encoder_init)
    turn = {
        name: value.transpose(-1, -2) if value.ndim == 4 or name.endswith("const") else value
        for name, value in wide.state_dict().items()
    }
    turn["mapping.w_avg"] = wide.mapping.w_avg.reshape(-1, 3, 5).transpose(1, 2).flatten()
    tall.load_state_dict(turn)
    z = torch.randn(2, 6, 3, 5)
    want = wide(z, None, noise_mode="const").transpose(2, 3)
    got = tall(z.transpose(2, 3), None, noise_mode="const")
    assert (got - want).abs().max() <= 1e-4 * want.std()


def test_encoders_have_the_shape_of_their_block():
    G = spatial_generator(32, 48, [4, 6])  # max_resolution 8: the block of 8x12
    assert [G.synthesis.b4.encoder.shape, G.synthesis.b8.encoder.shape] == [[4, 6], [8, 12]]
    assert G.synthesis.b32.encoder.shape == [8, 12]
    assert G.synthesis.b8.encoder(torch.randn(1, 6, 4, 6)).shape == (1, 5, 8, 12)


@pytest.mark.parametrize("grid", [[4, 6], [3, 4], [2, 5]])
def test_resampling_all_blocks_is_a_fresh_sample(grid):
    G = spatial_generator(24, 32, grid)
    z, fresh = torch.randn(2, 1, G.z_dim)
    ws, fresh_ws = G.mapping(z, None), G.mapping(fresh, None)
    for block in torch.randperm(math.prod(grid)).tolist():
        z = blocks.replace_blocks(z, fresh, [block], grid)
        ws = blocks.replace_blocks(ws, fresh_ws, [block], grid)
    want = G(fresh, None, noise_mode="const")
    assert torch.equal(G(z, None, noise_mode="const"), want)
    assert torch.equal(G.synthesis(ws, noise_mode="const"), want)


def test_a_block_changes_mostly_its_own_pixels():
    """Of the transferred network; where it lies says the mask of the grid."""
    G = transfer.from_stylegan2(plain_generator(32, 48))
    masks = blocks.block_masks(G.latent_grid, G.img_shape)
    z, fresh = torch.randn(2, 8, G.z_dim)
    before = G(z, None, noise_mode="none")
    for block in [0, 5, 9, 23]:
        after = G(blocks.replace_blocks(z, fresh, [block], G.latent_grid), None, noise_mode="none")
        change = (after - before).square().mean(dim=(0, 1))
        each = torch.stack([change[mask].mean() for mask in masks])
        assert int(each.argmax()) == block


def by_hand(x, sizes):
    """resize, as it is documented: per axis the mean over the cells touched, then bilinear with clamped borders."""
    for axis, size in zip([2, 3], sizes, strict=True):
        n = x.shape[axis]
        if size < n:
            touched = [range(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
            x = torch.stack([x.index_select(axis, torch.tensor(r)).mean(dim=axis) for r in touched], dim=axis)
    for axis, size in zip([2, 3], sizes, strict=True):
        n = x.shape[axis]
        if size > n:
            place = ((torch.arange(size) + 0.5) * n / size - 0.5).clamp(0, n - 1)
            low = place.floor().long().clamp(max=n - 1)
            high, t = (low + 1).clamp(max=n - 1), (place - low)[:, None]
            t = t if axis == 2 else t[:, 0]
            x = x.index_select(axis, low) * (1 - t) + x.index_select(axis, high) * t
    return x


@pytest.mark.parametrize("grid", [(4, 6), (3, 4), (7, 5), (10, 9)])
@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (4, 4), (5, 12), (16, 24), (3, 20)])
def test_resize_by_hand(grid, sizes):
    """By the matrix of small grids and by the definition of larger ones (90 cells)."""
    x = torch.randn(2, 3, *grid)
    torch.testing.assert_close(resize(x, *sizes), by_hand(x, sizes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [[4, 6], [2, 5]])
def test_gradients_reach_every_parameter_and_the_latents(grid):
    G = spatial_generator(24, 32, grid).train().requires_grad_(True)
    z = torch.randn(3, G.z_dim, requires_grad=True)
    img = G(z, None)
    ws_gradient = torch.autograd.grad(img.square().sum(), z, create_graph=True)[0]
    (F.softplus(img).sum() + ws_gradient.square().sum()).backward()
    assert z.grad.isfinite().all() and (z.grad.reshape(3, 6, -1).abs().amax(dim=(0, 1)) > 0).all()
    for name, p in G.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_pickles_reopen_with_equal_pictures():
    G = spatial_generator(24, 32, [3, 4])
    H = pickle.loads(pickle.dumps(G, protocol=4))
    z = torch.randn(1, G.z_dim)
    assert torch.equal(H(z, None, noise_mode="const"), G(z, None, noise_mode="const"))
    assert H.img_shape == [24, 32] and H.init_kwargs.img_shape == [24, 32]
