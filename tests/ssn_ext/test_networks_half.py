# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in a spatial generator on a CPU, against float32; bounds are about twice what was measured."""

import pytest
import torch

from ssn_ext.blocks import replace_blocks
from ssn_ext.networks import SpatialGenerator, SpatialSynthesisBlock


def generator(architecture="skip", **options):
    """Noise and encoder act."""
    torch.manual_seed(0)
    synthesis = dict(
        channel_base=512, channel_max=32, architecture=architecture, encoder_kwargs=dict(channels=8)
    )
    G = SpatialGenerator(
        z_dim=64, c_dim=0, w_dim=64, img_resolution=32, img_channels=3, latent_grid=[2, 2],
        mapping_kwargs=dict(num_layers=2), synthesis_kwargs=dict(synthesis, **options),
    )  # fmt: skip
    for name, p in G.named_parameters():
        if "encoder_style" in name:
            p.data.normal_()
        if name.endswith("noise_strength"):
            p.data.fill_(0.1)
    return G


def dtypes_seen(G, blocks):
    seen = set()
    for block in blocks:
        layer = getattr(G.synthesis, block).conv1
        layer.register_forward_hook(lambda _module, _inputs, result: seen.add(result.dtype))
    return seen


def relative_error(value, reference):
    return float((value.detach() - reference.detach()).norm() / reference.detach().norm())


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("demodulation", ["circular", "zero_padded"])
def test_bfloat16_is_close(architecture, demodulation):
    half = dict(num_fp16_res=2, half_dtype="bfloat16", conv_clamp=256)
    G = generator(architecture, demodulation=demodulation)
    H = generator(architecture, demodulation=demodulation, **half)
    low, high = dtypes_seen(H, ["b4", "b8"]), dtypes_seen(H, ["b16", "b32"])
    z = torch.randn(4, 64)
    img, want = (net(z, None, noise_mode="const") for net in (H, G))
    assert img.dtype == torch.float32 and 0 < relative_error(img, want) < 0.03
    assert (low, high) == ({torch.float32}, {torch.bfloat16})
    gradients = []
    for net, picture in [(H, img), (G, want)]:
        picture.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert gradients[0].isfinite().all() and relative_error(*gradients) < 0.06
    high.clear()
    assert relative_error(H(z, None, noise_mode="const", force_fp32=True), want) < 1e-5
    assert high == {torch.float32}


def test_resampling_all_blocks_is_a_fresh_sample():
    H = generator(num_fp16_res=3, half_dtype="bfloat16", conv_clamp=256)
    z, fresh = torch.randn(2, 1, 64)
    for block in [2, 0, 3, 1]:
        z = replace_blocks(z, fresh, [block], [2, 2])
    assert torch.equal(H(z, None, noise_mode="const"), H(fresh, None, noise_mode="const"))


def test_float16_stays_float32_on_a_cpu():
    z = torch.randn(2, 64)
    want = generator()(z, None, noise_mode="const")
    for options in [dict(num_fp16_res=2), dict(num_fp16_res=2, half_dtype="float16")]:
        H = generator(**options)
        seen = dtypes_seen(H, ["b16", "b32"])
        assert torch.equal(H(z, None, noise_mode="const"), want) and seen == {torch.float32}


def test_other_types_are_refused():
    with pytest.raises(AssertionError, match="float8"):
        SpatialSynthesisBlock(4, 4, 4, 8, 3, True, half_dtype="float8")
