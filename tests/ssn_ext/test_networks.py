# SPDX-License-Identifier: Apache-2.0
"""The spatial generator against StyleGAN2, brute force and its own invariances."""

import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssn_ext import blocks, networks, transfer
from ssn_ext.networks import (
    SpatialGenerator,
    expected_variance,
    local_scale,
    repeat_cells,
    resize,
    spatially_modulated_conv2d,
)
from torch_utils.ops import upfirdn2d
from training.networks import Generator

GRID = [4, 4]


def plain_generator(architecture="skip", c_dim=0, resolution=32, seed=0):
    """A small random StyleGAN2 whose noise, biases and w_avg are not zero."""
    torch.manual_seed(seed)
    G = Generator(
        z_dim=16, c_dim=c_dim, w_dim=24, img_resolution=resolution, img_channels=3, mapping_kwargs=dict(num_layers=3),
        synthesis_kwargs=dict(channel_base=512, channel_max=32, architecture=architecture),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.3)
            if name.endswith(".bias"):
                p.add_(torch.randn_like(p) * 0.1)
        G.mapping.w_avg.copy_(torch.randn_like(G.mapping.w_avg))
    return G.eval().requires_grad_(False)


def spatial_generator(encoder_init="exact", grid=GRID, resolution=16, active=True, c_dim=0, **styles):
    """A small random SSN; with `active` its encoder already acts."""
    torch.manual_seed(1)
    count = grid[0] * grid[1]
    G = SpatialGenerator(
        z_dim=8 * count, c_dim=c_dim, w_dim=12 * count, img_resolution=resolution, img_channels=3, latent_grid=grid,
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(
            channel_base=256, channel_max=16, encoder_init=encoder_init,
            encoder_kwargs=dict(channels=6, max_resolution=8), **styles,
        ),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if "encoder_style" in name and active:
                p.normal_()
            if name.endswith("noise_strength"):
                p.fill_(0.2)
    return G.eval().requires_grad_(False)


def spread(z, count=16):
    """One vector in all blocks, flat and channel-major."""
    return z.repeat_interleave(count, dim=1)


# --- the exact start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_transfer_gives_the_stylegan2_picture(architecture, noise_mode):
    G = plain_generator(architecture)
    S = transfer.from_stylegan2(G)
    z = torch.randn(3, G.z_dim)
    want = G(z, None, noise_mode=noise_mode)
    got = S(spread(z), None, noise_mode=noise_mode)
    assert (got - want).abs().max() <= 1e-4 * want.std()
    # the same through truncation, which must keep constant maps constant
    want = G(z, None, truncation_psi=0.6, truncation_cutoff=3, noise_mode=noise_mode)
    got = S(spread(z), None, truncation_psi=0.6, truncation_cutoff=3, noise_mode=noise_mode)
    assert (got - want).abs().max() <= 1e-4 * want.std()


@pytest.mark.parametrize("grid", [[1, 1], [2, 2], [2, 4], [8, 8]])
def test_exact_start_for_every_grid(grid):
    """Also where the grid is finer than the first layers."""
    G = plain_generator()
    S = transfer.from_stylegan2(G, latent_grid=grid)
    z = torch.randn(2, G.z_dim)
    want = G(z, None, noise_mode="const")
    got = S(spread(z, grid[0] * grid[1]), None, noise_mode="const")
    assert (got - want).abs().max() <= 1e-4 * want.std()


@pytest.mark.parametrize(
    "options", [dict(demodulation="local"), dict(style_sharpness=2), dict(style_sharpness=3)]
)
@pytest.mark.parametrize("grid", [[4, 4], [8, 8]])
def test_exact_start_of_other_styles(options, grid):
    G = plain_generator()
    S = transfer.from_stylegan2(G, latent_grid=grid, **options)
    z = torch.randn(2, G.z_dim)
    want = G(z, None, noise_mode="const")
    got = S(spread(z, grid[0] * grid[1]), None, noise_mode="const")
    assert (got - want).abs().max() <= 1e-4 * want.std()
    # and they are others than the default's, for blocks that differ
    z = torch.randn(2, S.z_dim)
    plain = transfer.from_stylegan2(G, latent_grid=grid)(z, None, noise_mode="const")
    assert (S(z, None, noise_mode="const") - plain).abs().max() > 1e-2 * want.std()


@pytest.mark.parametrize(
    "grid,shape,resolution,reach",
    [
        ([4, 4], [64, 64], 64, 4),
        ([8, 8], [64, 64], 64, 8),
        ([5, 3], [64, 64], 64, 8),
        ([[4, 4], [16, 16]], [64, 64], 64, 16),
        ([4, 6], [32, 48], 32, 4),
        ([64, 64], [32, 32], 32, 32),
    ],
)
def test_the_encoder_has_a_position_for_every_block(grid, shape, resolution, reach):
    """And no more: its maps at `reach`, h0 x w0 doubled, are the first that are as fine as the grid."""
    options = transfer.default_encoder(96, grid, shape, resolution)
    assert options == dict(channels=24, max_resolution=reach)
    G = plain_generator(resolution=32)
    S = transfer.from_stylegan2(G)
    assert {block.encoder.shape[0] for block in S.synthesis.children()} == {4}
    assert transfer.from_stylegan2(G, latent_grid=[8, 8]).synthesis.b32.encoder.shape == [8, 8]
    assert transfer.from_stylegan2(G, encoder_init="random").synthesis.b32.encoder.shape == [32, 32]


def test_zero_padded_demodulation_is_no_exact_start():
    """The paper's borders lower sigma near the edges, most at 4x4: the pictures must differ."""
    G = plain_generator()
    S = transfer.from_stylegan2(G, demodulation="zero_padded")
    z = torch.randn(2, G.z_dim)
    want, got = G(z, None, noise_mode="none"), S(spread(z), None, noise_mode="none")
    assert (got - want).abs().max() > 1e-2 * want.std()


def test_conditional_transfer():
    G = plain_generator(c_dim=3)
    S = transfer.from_stylegan2(G)
    z, c = torch.randn(3, G.z_dim), torch.eye(3)
    want, got = G(z, c, noise_mode="const"), S(spread(z), c, noise_mode="const")
    assert (got - want).abs().max() <= 1e-4 * want.std()


def test_1x1_grid_is_the_plain_generator_in_training_mode_too():
    """Pictures, w_avg tracking and gradients of all shared tensors."""
    G = plain_generator()
    S = transfer.from_stylegan2(G, latent_grid=[1, 1])
    z = torch.randn(4, G.z_dim)
    grads = {}
    for net in [G, S]:
        net.train().requires_grad_(True)
        torch.manual_seed(3)
        net(z, None, noise_mode="random").square().sum().backward()
        grads[net] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    torch.testing.assert_close(S.mapping.w_avg, G.mapping.w_avg)
    for name, grad in grads[G].items():
        torch.testing.assert_close(
            grads[S][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max() + 1e-6)
        )


def test_w_avg_is_the_mean_over_samples_and_blocks():
    S = spatial_generator().train()
    z = torch.randn(5, S.z_dim)
    ws = S.mapping(z, None, skip_w_avg_update=True)[:, 0].reshape(5, S.block_w_dim, 16)
    S.mapping(z, None)
    want = (ws.mean(dim=(0, 2)) * (1 - S.mapping.w_avg_beta)).repeat_interleave(16)
    torch.testing.assert_close(S.mapping.w_avg, want)


# --- demodulation against brute force -----------------------------------------------------------------------


def brute_force_variance(weight, styles, borders, flip_weight):
    """eq. (14) as it stands: mean over positions of a second convolution of the squares."""
    half = weight.shape[2] // 2
    w2 = weight.square() if flip_weight else weight.square().flip([2, 3])
    mode = dict(circular="circular", zero_padded="constant")[borders]
    padded = F.pad(styles.square(), [half] * 4, mode=mode)
    return F.conv2d(padded, w2).mean(dim=[2, 3])


@pytest.mark.parametrize("borders", ["circular", "zero_padded"])
@pytest.mark.parametrize("flip_weight", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_demodulation_equals_a_second_convolution(borders, flip_weight, kernel):
    torch.manual_seed(0)
    weight, styles = torch.randn(7, 5, kernel, kernel), torch.randn(3, 5, 6, 8)
    want = brute_force_variance(weight, styles, borders, flip_weight)
    torch.testing.assert_close(
        expected_variance(weight, styles, borders, flip_weight), want, rtol=1e-5, atol=1e-5
    )


def test_demodulation_by_position():
    """At every position, from the styles there alone; where they are constant it is the mean over positions."""
    torch.manual_seed(0)
    weight, styles = torch.randn(7, 5, 3, 3), torch.randn(3, 5, 4, 6)
    scale = local_scale(weight, styles)
    for y, x in [(0, 0), (2, 5), (3, 1)]:
        here = styles[:, :, y, x, None, None].expand(-1, -1, 4, 6)
        want = brute_force_variance(weight, here, "circular", True)
        torch.testing.assert_close(scale[:, :, y, x], want.rsqrt())
    edited = styles.clone()
    edited[:, :, 3, 5] += 1
    changed = (local_scale(weight, edited) != scale).any(dim=1)
    assert changed[:, 3, 5].all() and int(changed.sum()) == 3  # one position of each sample


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("cells", [None, [4, 4]])
def test_the_scale_by_position_is_that_of_cells_resized(up, cells):
    torch.manual_seed(0)
    x, weight, grids = (
        torch.randn(2, 5, 8, 12),
        torch.randn(7, 5, 3, 3),
        [torch.randn(2, 5, 2, 2), torch.ones(2, 5, 4, 3)],
    )
    styles = resize(grids[0], 8, 12) + resize(grids[1], 8, 12)
    options = dict(
        up=up, padding=1, resample_filter=upfirdn2d.setup_filter([1, 3, 3, 1]), flip_weight=up == 1
    )
    noise = torch.randn(8 * up, 12 * up)
    at_cells = styles if cells is None else resize(grids[0], 4, 4) + resize(grids[1], 4, 4)
    scale = resize(local_scale(weight, at_cells), 8 * up, 12 * up)
    want = spatially_modulated_conv2d(x, weight, styles, demodulation=None, **options) * scale + noise
    got = spatially_modulated_conv2d(x, weight, grids, noise, demodulation="local", cells=cells, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layers_demodulate_by_position_at_two_cells_a_block(monkeypatch):
    """At most one a pixel; steep styles have cells of their own."""
    seen = []
    monkeypatch.setattr(
        networks,
        "local_scale",
        lambda w, styles: seen.append(list(styles.shape[2:])) or local_scale(w, styles),
    )
    for sharpness, most in [(1, 8), (2, 16)]:
        G = spatial_generator(resolution=32, demodulation="local", style_sharpness=sharpness)
        seen.clear()
        G(torch.randn(1, G.z_dim), None)
        assert seen == [[min(side, most)] * 2 for side in [4, 4, 8, 8, 16, 16, 32]]


def test_sharp_styles_are_steeper_and_flat_between():
    """Twice as steep as bilinear interpolation midway between two cells, flat near their centres."""
    cells = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    plain, sharp = (resize(repeat_cells(cells, k), 1, 64).flatten() for k in (1, 2))
    place = (torch.arange(64) + 0.5) / 32 - 0.5  # in cells from the centre of the first
    torch.testing.assert_close(plain, place.clamp(0, 1))
    torch.testing.assert_close(sharp, (2 * place - 0.5).clamp(0, 1))


def test_modulated_convolution_has_unit_variance():
    """Independent unit-variance inputs come out with unit mean variance: what sigma_E is for (Monte
    Carlo)."""
    torch.manual_seed(0)
    styles = torch.randn(1, 4, 8, 8).expand(4096, -1, -1, -1)
    x = torch.randn(4096, 4, 8, 8)
    y = spatially_modulated_conv2d(x, torch.randn(6, 4, 3, 3), styles, padding=1, demodulation="zero_padded")
    variance = y.square().mean(dim=[0, 2, 3])
    assert (variance - 1).abs().max() < 0.03


def test_gradients_of_the_modulated_convolution():
    torch.manual_seed(0)
    x, w, s = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 2, 4, 4), (3, 2, 3, 3), (2, 2, 4, 4)]
    )
    for demodulation in [None, "circular", "zero_padded", "local"]:
        function = functools.partial(spatially_modulated_conv2d, padding=1, demodulation=demodulation)

        def call(x, w, s, function=function):
            return function(x, w, s)

        assert torch.autograd.gradcheck(call, (x, w, s))
        assert torch.autograd.gradgradcheck(call, (x, w, s))


def test_resize_keeps_constants_and_means():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6)
    ones = resize(torch.ones(1, 1, 4, 6), 16, 3)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    coarse = resize(x, 2, 3)
    torch.testing.assert_close(coarse, x.reshape(2, 3, 2, 2, 3, 2).mean(dim=(3, 5)))
    fine = resize(x, 8, 12)  # pixel centres lie a quarter of a cell from the coarse ones
    torch.testing.assert_close(
        fine[:, :, 1, 1], (9 * x[:, :, 0, 0] + 3 * x[:, :, 0, 1] + 3 * x[:, :, 1, 0] + x[:, :, 1, 1]) / 16
    )
    torch.testing.assert_close(fine[:, :, 0, 0], x[:, :, 0, 0])  # clamped border


# --- block-resampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_init", ["exact", "random", "none"])
def test_resampling_all_blocks_is_a_fresh_sample(encoder_init):
    """In any order, bit for bit; and the edit of z is the edit of ws."""
    G = spatial_generator(encoder_init)
    rnd = np.random.RandomState(0)
    z, fresh = torch.randn(2, 2, G.z_dim)
    want = G(fresh, None, noise_mode="const")
    for _ in range(3):
        edited, ws = z, G.mapping(z, None)
        for block in rnd.permutation(16).tolist():
            edited = blocks.replace_blocks(edited, fresh, [block], GRID)
            ws = blocks.replace_blocks(ws, G.mapping(fresh, None), [block], GRID)
            assert torch.equal(G.mapping(edited, None), ws)
        assert torch.equal(G(edited, None, noise_mode="const"), want)
        assert torch.equal(G.synthesis(ws, noise_mode="const"), want)


def test_resampling_with_the_same_values_changes_nothing():
    G = spatial_generator()
    z = torch.randn(2, G.z_dim)
    edited = blocks.replace_blocks(z, z.clone(), [3, 7], GRID)
    assert torch.equal(G(edited, None, noise_mode="const"), G(z, None, noise_mode="const"))


def test_a_block_changes_mostly_its_own_pixels():
    """A transferred, untrained network is already local: the block changes more inside than outside."""
    S = transfer.from_stylegan2(plain_generator())
    z, fresh = torch.randn(2, 8, S.z_dim)
    mask = blocks.block_masks(GRID, [32, 32])[5]
    change = (
        S(blocks.replace_blocks(z, fresh, [5], GRID), None, noise_mode="const")
        - S(z, None, noise_mode="const")
    ).square()
    assert change[..., mask].mean() > 4 * change[..., ~mask].mean()


# --- what scripts of the family do --------------------------------------------------------------------------


def test_z_may_be_flat_float64_or_spatial_but_not_of_one_block():
    G = spatial_generator()
    z = torch.from_numpy(np.random.RandomState(0).randn(1, G.z_dim))
    assert z.dtype == torch.float64
    flat = G(z, None, noise_mode="const")
    assert flat.dtype == torch.float32
    assert torch.equal(G(z.reshape(1, G.block_z_dim, 4, 4), None, noise_mode="const"), flat)
    with pytest.raises(ValueError, match=r"z has shape \[1, 8\], expected \[N, 128\] or \['N', 8, 4, 4\]"):
        G(z[:, : G.block_z_dim], None)


def test_ws_may_be_written_into_and_mixed():
    G = spatial_generator()
    ws = G.mapping(torch.randn(2, G.z_dim), None)
    ws[:, 3:] = G.mapping(torch.randn(2, G.z_dim), None)[:, 3:]
    assert G.synthesis(ws, noise_mode="const", force_fp32=True).shape == (2, 3, 16, 16)


def test_path_length_gradients_reach_every_parameter():
    """Second order through resizing, encoder and demodulation."""
    G = spatial_generator().train().requires_grad_(True)
    ws = G.mapping(torch.randn(2, G.z_dim), None)
    img = G.synthesis(ws)
    (jacobian,) = torch.autograd.grad((img * torch.randn_like(img)).sum(), ws, create_graph=True)
    jacobian.square().sum().backward()
    used = {name for name, p in G.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    # the gradient by ws does not depend on what is only added to the picture
    assert used == {name for name, _p in G.named_parameters() if not name.endswith("torgb.bias")}


def test_second_derivatives_of_a_whole_tiny_network():
    torch.manual_seed(0)
    G = SpatialGenerator(
        z_dim=8, c_dim=0, w_dim=8, img_resolution=4, img_channels=1, latent_grid=[2, 2],
        mapping_kwargs=dict(num_layers=1),
        synthesis_kwargs=dict(channel_base=8, channel_max=2, encoder_kwargs=dict(channels=2), activation="linear"),
    ).requires_grad_(False)  # fmt: skip
    ws = torch.randn(1, G.num_ws, G.w_dim, requires_grad=True)
    direction = torch.randn(1, 1, 4, 4)

    def slope(w):
        return torch.autograd.grad(
            (G.synthesis(w, noise_mode="none") * direction).sum(), w, create_graph=True
        )[0]

    (second,) = torch.autograd.grad(slope(ws).square().sum() / 2, ws)
    step = 1e-2 * torch.randn_like(ws)
    with torch.enable_grad():
        up, down = (
            slope((ws + sign * step).detach().requires_grad_()).square().sum() / 2 for sign in (1, -1)
        )
    assert float((second * step).sum().detach()) == pytest.approx(
        float((up - down).detach()) / 2, rel=2e-2, abs=1e-4
    )


def test_inference_mode_leaves_no_trace():
    """What is cached there must serve gradients later."""
    from ssn_ext import networks

    networks._matrices.clear()
    G = spatial_generator()
    z = torch.randn(1, G.z_dim)
    with torch.inference_mode():
        G(z, None)
    ws = G.mapping(z, None).requires_grad_(True)
    G.synthesis(ws, noise_mode="const").sum().backward()
    assert ws.grad.abs().max() > 0


def test_flat_options_of_stylegan3_are_understood():
    """Its StyleGAN2 takes the synthesis options flat, and clamps by default."""

    class Inner:
        def __init__(
            self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=None, **synthesis_kwargs
        ):
            pass

    class Decorated(Inner):
        def __init__(self):
            pass

        init_args = (8, 0)
        init_kwargs = dict(w_dim=8, channel_base=64, fused_modconv_default="inference_only", num_fp16_res=0)

    got = transfer.constructor_kwargs(Decorated())
    options = dict(conv_clamp=256, num_fp16_res=0, channel_base=64)
    assert got == dict(z_dim=8, c_dim=0, w_dim=8, synthesis_kwargs=options)


def test_pickles_reopen_with_equal_pictures():
    G = spatial_generator()
    again = pickle.loads(pickle.dumps(G, protocol=4))
    z = torch.randn(1, G.z_dim)
    assert torch.equal(again(z, None, noise_mode="const"), G(z, None, noise_mode="const"))
    assert again.latent_grid == [4, 4] and again.init_kwargs.latent_grid == [4, 4]


# --- transfer -----------------------------------------------------------------------------------------------


def test_transfer_refuses_what_does_not_match():
    G = plain_generator()
    wide = transfer.spatial_kwargs(dict(G.init_kwargs), GRID)
    wide["synthesis_kwargs"] = dict(wide["synthesis_kwargs"], channel_max=16)
    with pytest.raises(ValueError, match="tensors do not match, first: G.synthesis.b4.const"):
        transfer.spatial_from(G, SpatialGenerator(**wide))
    deep = transfer.spatial_kwargs(dict(G.init_kwargs), GRID)
    deep["mapping_kwargs"] = dict(num_layers=2)  # the source's third layer would be left behind
    with pytest.raises(ValueError, match="mapping.fc2.weight .* would be left behind"):
        transfer.spatial_from(G, SpatialGenerator(**deep))


def test_transfer_leaves_nothing_but_the_encoder_fresh():
    G = plain_generator()
    S = SpatialGenerator(**transfer.spatial_kwargs(dict(G.init_kwargs), GRID))
    rows = transfer.spatial_from(G, S)
    fresh = [row.name for row in rows if row.what == "re-initialised"]
    assert fresh and all("encoder" in name for name in fresh)
    copied = {row.name for row in rows if row.what == "copied"}
    theirs = {name for name, _tensor in itertools.chain(G.named_parameters(), G.named_buffers())}
    assert copied == theirs


def test_another_grid_resamples_w_avg_only():
    S = transfer.from_stylegan2(plain_generator())
    kwargs = dict(S.init_kwargs)
    kwargs.update(z_dim=16 * 4, w_dim=24 * 4, latent_grid=[2, 2])
    T = SpatialGenerator(**kwargs)
    transfer.spatial_from(S, T)
    torch.testing.assert_close(T.mapping.w_avg.reshape(24, 4)[:, 3], S.mapping.w_avg.reshape(24, 16)[:, 0])
    for name, p in T.named_parameters():
        assert torch.equal(p, dict(S.named_parameters())[name])


@pytest.mark.parametrize("sizes", [[(4, 4)], [(4, 4), (2, 6)], [(8, 8)], [(4, 4), (9, 9)]])
@pytest.mark.parametrize("shape", [(4, 4), (16, 12), (4, 16)])
def test_sums_of_maps_and_their_mean_squares(sizes, shape):
    """Against the maps themselves, gradients of both orders too; (9, 9) is too large for the short way."""
    torch.manual_seed(0)
    grids = [torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    whole = sum(networks._resize_map(grid, *shape) for grid in grids)
    torch.testing.assert_close(networks.sum_of_maps(grids, *shape), whole)
    torch.testing.assert_close(networks.mean_square(grids, *shape), whole.square().mean(dim=[2, 3]))
    if sizes[0] != (8, 8) and len(sizes) == 2 and shape == (4, 4):
        for function in (networks.sum_of_maps, networks.mean_square):
            small = [grid.detach()[:1, :1].requires_grad_() for grid in grids]
            run = lambda *grids, function=function: function(grids, *shape)  # noqa: E731
            assert torch.autograd.gradcheck(run, small) and torch.autograd.gradgradcheck(run, small)


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (16, 16)])
def test_a_layer_is_the_convolution_with_its_whole_map(shape):
    """The layer knows the mean of its styles' squares from the grids: against the reference, gradients too."""
    torch.manual_seed(0)
    layer = networks.SpatialSynthesisLayer(5, 6, 4, resolution=16, encoder_channels=3, use_noise=False)
    layer.encoder_style.weight.data.normal_()
    x, w, e = torch.randn(2, 5, 16, 16), torch.randn(2, 4, 4, 4), torch.randn(2, 3, *shape)
    inputs = [x, w, e, *layer.parameters()]
    for tensor in inputs:
        tensor.requires_grad_()

    def reference():
        direct, corrected = layer.affine(w), layer.encoder_style(e)
        styles = sum(F.interpolate(each, [16, 16], mode="bilinear") for each in (direct, corrected))
        sigma = F.conv2d(
            styles.square().mean(dim=[2, 3], keepdim=True), layer.weight.square().sum([2, 3], True)
        )
        y = F.conv2d(x * styles, layer.weight, padding=1) * (sigma + 1e-8).rsqrt()
        return F.leaky_relu(y + layer.bias[:, None, None], 0.2) * 2**0.5

    def first_and_second(y):
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    got, want = layer(x, w, e), reference()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(first_and_second(got), first_and_second(want), strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-4 * float(b.detach().abs().max())
