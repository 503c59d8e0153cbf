# SPDX-License-Identifier: Apache-2.0
"""The layer in few passes against the plain composition of the same operations."""

import pytest
import torch

from torch_utils.ops import bias_act, own_kernels, upfirdn2d
from training.networks import SynthesisLayer, modulated_conv2d

FILTER = upfirdn2d.setup_filter([1, 3, 3, 1])


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("act,clamp", [("lrelu", None), ("lrelu", 0.7), ("relu", None), ("linear", 0.5)])
@pytest.mark.parametrize("noisy", ["per sample", "shared", "none"])
def test_equals_the_composition(num, up, act, clamp, noisy):
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
