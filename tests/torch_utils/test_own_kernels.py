# SPDX-License-Identifier: Apache-2.0
"""The layer in few passes against the plain composition of the same operations."""

import pytest
import torch

from ssn_ext.networks import SpatialGenerator, local_scale, resize, spatially_modulated_conv2d
from torch_utils.ops import bias_act, own_kernels, upfirdn2d, winograd
from training.networks import SynthesisLayer, modulated_conv2d

FILTER = upfirdn2d.setup_filter([1, 3, 3, 1])


@pytest.fixture(params=["whole", "by tiles"])
def tiled(request, monkeypatch):
    """Layers as they are, and so that even the small ones here are convolved by tiles, where they can be."""
    if request.param == "by tiles":
        monkeypatch.setattr(winograd, "_CHANNELS", 1)
        monkeypatch.setattr(winograd, "_TILES", 1)
        monkeypatch.setattr(winograd, "_chunks", lambda num, counts, _: real_chunks(num, counts, 2))
    return request.param == "by tiles"


real_chunks = winograd._chunks


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("act,clamp", [("lrelu", None), ("lrelu", 0.7), ("relu", None), ("linear", 0.5)])
@pytest.mark.parametrize("noisy", ["per sample", "shared", "none"])
def test_equals_the_composition(num, up, act, clamp, noisy, tiled):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(num, 6, 10, 12), torch.randn(5, 6, 3, 3), torch.randn(5)
    styles, scale = torch.randn(num, 6), torch.rand(num, 5) + 0.5
    shape = {"per sample": [num, 1, 10 * up, 12 * up], "shared": [10 * up, 12 * up]}.get(noisy)
    noise = None if shape is None else torch.randn(shape)
    options = dict(up=up, padding=1, resample_filter=FILTER, flip_weight=up == 1)
    with torch.no_grad():
        got = own_kernels.layer(
            x, weight, styles, scale, noise, bias, **options, act=act, gain=1.3, clamp=clamp
        )
        want = modulated_conv2d(x, weight, styles, demodulate=False, fused_modconv=False, **options)
        want = want * scale[:, :, None, None] + (0 if noise is None else noise)
        want = bias_act.bias_act(want, bias, act=act, gain=1.3, clamp=clamp, impl="ref")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_without_styles_and_scale_it_is_one_convolution():
    x, weight, bias = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3), torch.randn(4)
    options = dict(up=1, padding=1, resample_filter=FILTER, flip_weight=True, act="linear", gain=1)
    got = own_kernels.layer(x, weight, None, None, None, bias, **options)
    torch.testing.assert_close(got, torch.nn.functional.conv2d(x, weight, bias, padding=1))


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_a_layer_takes_it_without_gradients_only_and_gives_the_same(noise_mode, monkeypatch):
    layer = SynthesisLayer(4, 4, w_dim=8, resolution=32, up=2, conv_clamp=2.0)
    layer.noise_strength.data.fill_(0.5)
    x, w = torch.randn(2, 4, 16, 16), torch.randn(2, 8)
    calls = []
    real = own_kernels.layer
    monkeypatch.setattr(own_kernels, "layer", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    torch.manual_seed(1)
    want = layer(x, w, noise_mode=noise_mode, fused_modconv=False)
    assert not calls
    torch.manual_seed(1)
    with torch.no_grad():
        got = layer(x, w, noise_mode=noise_mode)
    assert calls
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_small_pictures_of_wide_layers_do_not_pay():
    with torch.no_grad():
        assert not own_kernels.pays(torch.zeros(1, 512, 4, 4), torch.zeros(512, 512, 3, 3), 1, "lrelu")
        assert own_kernels.pays(torch.zeros(1, 64, 128, 128), torch.zeros(64, 64, 3, 3), 1, "lrelu")
        assert not own_kernels.pays(torch.zeros(1, 64, 128, 128), torch.zeros(64, 64, 3, 3), 1, "swish")


@pytest.mark.parametrize("shape", [(10, 12), (300, 40)])  # one strip, several
@pytest.mark.parametrize("grids", [[(4, 4)], [(2, 3), (10, 6)]])
@pytest.mark.parametrize("demodulation", ["circular", None, "local"])
def test_spatial_layers_equal_the_composition_over_whole_maps(shape, grids, demodulation, tiled):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 24, *shape), torch.randn(8, 24, 3, 3), torch.randn(8)
    grids = [torch.randn(2, 24, *each) for each in grids]
    styles = sum(resize(grid, *shape) for grid in grids)
    noise = torch.randn(shape)
    want = spatially_modulated_conv2d(
        x,
        weight,
        styles,
        noise=noise,
        padding=1,
        resample_filter=FILTER,
        demodulation=demodulation,
        cells=[6, 5],
    )
    scale = demodulation is not None
    if demodulation == "local":
        scale = local_scale(weight, resize(styles, 6, 5))
    want = bias_act.bias_act(want, bias, act="lrelu")
    with torch.no_grad():
        got = own_kernels.spatial_layer(
            x, weight, grids, scale, noise, bias, up=1, padding=1, resample_filter=FILTER,
            flip_weight=True, act="lrelu", gain=2**0.5,
        )  # fmt: skip
        rgb = own_kernels.spatial_to_rgb(x, weight[:3, :, 1, 1], grids, bias[:3])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3 if demodulation is None else 1e-4)
    matrix = weight[:3, :, 1:2, 1:2]
    torch.testing.assert_close(
        rgb, torch.nn.functional.conv2d(x * styles, matrix, bias[:3]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("demodulation", ["circular", "local"])
@pytest.mark.parametrize("clamp", [None, 0.6])
def test_a_whole_spatial_generator_draws_the_same_picture_either_way(
    half, demodulation, clamp, tiled, monkeypatch
):
    options = dict(num_fp16_res=4, half_dtype="bfloat16") if half else {}
    options.update(demodulation=demodulation, conv_clamp=clamp)
    torch.manual_seed(0)  # in bfloat16 single pixels may be far off
    G = SpatialGenerator(
        32, 0, 32, 64, 3, [2, 2], synthesis_kwargs=dict(channel_base=512, channel_max=16, **options)
    ).eval()
    for name, parameter in G.named_parameters():
        if "encoder_style" in name or "noise_strength" in name:
            parameter.data.normal_(0, 0.3)
    z = torch.randn(2, 32)
    with torch.no_grad():
        got = G(z, None, noise_mode="const")
        monkeypatch.setattr(own_kernels, "pays", lambda *_: False)
        want = G(z, None, noise_mode="const")
    error = (got - want) / want.std()
    assert error.abs().max() < (0.2 if half else 1e-4) and error.square().mean().sqrt() < 0.04
