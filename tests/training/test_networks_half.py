# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in the blocks that num_fp16_res selects, against float32. Its numbers have 8 bits; bounds are about twice
what was measured on three seeds."""

import pytest
import torch

from training.networks import Discriminator, DiscriminatorBlock, Generator, SynthesisBlock

ARCHITECTURES = ["skip", "resnet", "orig"]
WIDTHS = dict(channel_base=512, channel_max=32)


def generator(architecture, **options):
    torch.manual_seed(0)
    synthesis = dict(WIDTHS, architecture=architecture, **options)
    G = Generator(16, 0, 16, 32, 3, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=synthesis)
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.1)
    return G


def discriminator(architecture, half_dtype=None, **options):
    torch.manual_seed(0)
    block = {} if half_dtype is None else dict(half_dtype=half_dtype)
    return Discriminator(0, 32, 3, architecture=architecture, block_kwargs=block, **WIDTHS, **options)


def relative_error(value, reference):
    return float((value.detach() - reference.detach()).norm() / reference.detach().norm())


def dtypes_seen(blocks):
    """A set that fills with the types of the results of conv1 of each block."""
    seen = set()
    for block in blocks:
        block.conv1.register_forward_hook(lambda _module, _inputs, result: seen.add(result.dtype))
    return seen


def flat_gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


HALF = dict(num_fp16_res=2, half_dtype="bfloat16", conv_clamp=256)  # b16 and b32


@pytest.mark.parametrize("fused_modconv", [None, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator(architecture, fused_modconv):
    G, H = generator(architecture), generator(architecture, **HALF)
    assert [H.synthesis.b8.use_fp16, H.synthesis.b16.use_fp16] == [False, True]
    low, high = dtypes_seen([H.synthesis.b4, H.synthesis.b8]), dtypes_seen([H.synthesis.b16, H.synthesis.b32])
    z = torch.randn(4, 16)
    img, want = (net(z, None, noise_mode="const", fused_modconv=fused_modconv) for net in (H, G))
    assert img.dtype == torch.float32 and 0 < relative_error(img, want) < 0.03
    assert (low, high) == ({torch.float32}, {torch.bfloat16})
    img.square().sum().backward()
    want.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in H.parameters())
    assert relative_error(flat_gradient(H), flat_gradient(G)) < 0.06
    high.clear()
    same = H(z, None, noise_mode="const", force_fp32=True, fused_modconv=fused_modconv)
    assert high == {torch.float32} and relative_error(same, want) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_and_its_r1_gradients(architecture):
    D, E = (
        discriminator(architecture),
        discriminator(architecture, "bfloat16", num_fp16_res=2, conv_clamp=256),
    )
    seen = dtypes_seen([E.b32, E.b16])
    x, results = torch.randn(4, 3, 32, 32, requires_grad=True), []
    for net in [D, E]:
        logits = net(x, None)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append((logits, gradient))
    assert seen == {torch.bfloat16} and results[1][0].dtype == torch.float32
    assert 0 < relative_error(results[1][0], results[0][0]) < 0.03
    assert relative_error(results[1][1], results[0][1]) < 0.3  # a slope changes where a sign does
    assert torch.cosine_similarity(flat_gradient(D), flat_gradient(E), dim=0) > 0.8
    assert flat_gradient(E).isfinite().all()
    seen.clear()
    assert relative_error(E(x, None, force_fp32=True), results[0][0]) < 1e-5 and seen == {torch.float32}


def test_float32_range_needs_no_scaling():
    """Styles that float16 would overflow with: bfloat16 has float32's exponents."""
    G, H = generator("skip"), generator("skip", num_fp16_res=2, half_dtype="bfloat16")
    for net in [G, H]:
        net.synthesis.b32.conv1.affine.bias.data.fill_(1e6)
    z = torch.randn(2, 16)
    img = H(z, None, noise_mode="const")
    assert img.isfinite().all() and relative_error(img, G(z, None, noise_mode="const")) < 0.03


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float16_stays_float32_on_a_cpu(architecture):
    for options in [dict(num_fp16_res=2), dict(num_fp16_res=2, half_dtype="float16")]:
        H, E = generator(architecture, **options), discriminator(architecture, **options)
        seen = dtypes_seen([H.synthesis.b32, E.b32])
        z = torch.randn(2, 16)
        img = H(z, None, noise_mode="const")
        assert torch.equal(img, generator(architecture)(z, None, noise_mode="const"))
        assert torch.equal(E(img, None), discriminator(architecture)(img, None))
        assert seen == {torch.float32}


def test_other_types_are_refused():
    with pytest.raises(AssertionError, match="float8"):
        SynthesisBlock(4, 4, 4, 8, 3, True, half_dtype="float8")
    with pytest.raises(AssertionError, match="float8"):
        DiscriminatorBlock(0, 4, 4, 8, 3, 0, half_dtype="float8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_on_cuda(channels_last):
    G = generator("skip").cuda()
    H = generator("skip", **HALF, fp16_channels_last=channels_last).cuda()
    seen = dtypes_seen([H.synthesis.b16, H.synthesis.b32])
    z = torch.randn(2, 16, device="cuda")
    img = H(z, None, noise_mode="const")
    assert seen == {torch.bfloat16} and relative_error(img, G(z, None, noise_mode="const")) < 0.03
