# SPDX-License-Identifier: Apache-2.0
"""Networks of pictures that are not square, or no power of two: invariances, and equality with square networks."""

import pytest
import torch

from training.networks import Discriminator, Generator

ARCHITECTURES = ["skip", "resnet", "orig"]
WIDTHS = dict(channel_base=256, channel_max=12)


def generator(height, width, architecture="skip", img_shape=True):
    """A small random one whose noise and biases act."""
    torch.manual_seed(0)
    shape = dict(img_shape=[height, width]) if img_shape else {}
    G = Generator(
        z_dim=6, c_dim=0, w_dim=6, img_resolution=max(height, width), img_channels=3, mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(WIDTHS, architecture=architecture), **shape,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith((".bias", "noise_strength")):
                p.add_(torch.randn_like(p) * 0.3)
    return G.eval().requires_grad_(False)


def discriminator(height, width, architecture="resnet"):
    torch.manual_seed(1)
    D = Discriminator(
        c_dim=0, img_resolution=max(height, width), img_channels=3, img_shape=[height, width],
        architecture=architecture, **WIDTHS,
    )  # fmt: skip
    return D.eval().requires_grad_(False)


def turned(state, fc_shape=None):
    """A state dict with height and width exchanged everywhere."""
    result = {}
    for name, value in state.items():
        if name == "b4.fc.weight":
            result[name] = value.reshape(len(value), -1, *fc_shape).transpose(2, 3).flatten(1)
        elif name.endswith(("const", "noise_const")) or value.ndim == 4:
            result[name] = value.transpose(-1, -2)
        else:
            result[name] = value
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(24, 32), (16, 48), (40, 40)])
def test_pictures_have_the_shape_and_logits_read_it(shape, architecture):
    G, D = generator(*shape, architecture), discriminator(*shape, architecture)
    for noise_mode in ["const", "random", "none"]:
        img = G(torch.randn(4, 6), None, noise_mode=noise_mode)
        assert img.shape == (4, 3, *shape)
    assert G.img_shape == G.synthesis.img_shape == D.img_shape == list(shape)
    assert G.img_resolution == D.img_resolution == max(shape)
    assert D(img, None).shape == (4, 1)
    with pytest.raises(AssertionError, match="Wrong size"):
        D(img[:, :, :-8], None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_height_and_width_are_exchanged_by_turning_all_weights(architecture):
    tall, wide = generator(48, 32, architecture), generator(32, 48, architecture)
    tall.load_state_dict(turned(wide.state_dict()))
    z = torch.randn(3, 6)
    img = wide(z, None, noise_mode="const")
    torch.testing.assert_close(tall(z, None, noise_mode="const"), img.transpose(2, 3), rtol=1e-4, atol=1e-4)
    D, E = discriminator(32, 48, architecture), discriminator(48, 32, architecture)
    E.load_state_dict(turned(D.state_dict(), fc_shape=[4, 6]))
    torch.testing.assert_close(E(img.transpose(2, 3), None), D(img, None), rtol=1e-4, atol=1e-4)


def test_weights_are_those_of_the_square_network_of_the_same_blocks():
    G, D = generator(32, 48), discriminator(32, 48)
    different = []
    for wide, square in [(G, generator(32, 32)), (D, discriminator(32, 32))]:
        ours, theirs = wide.state_dict(), square.state_dict()
        assert list(ours) == list(theirs)
        different += [name for name in ours if ours[name].shape != theirs[name].shape]
    noise = [name for name in G.state_dict() if name.endswith("noise_const")]
    assert sorted(different) == sorted(["synthesis.b4.const", *noise, "b4.fc.weight"])
    assert G.synthesis.block_resolutions == [4, 8, 16, 32] and D.block_resolutions == [32, 16, 8]
    assert G.num_ws == 8 and G.synthesis.b16.conv1.noise_const.shape == (16, 24)


def test_a_far_border_does_not_matter():
    """With the beginning of a larger network's constant and noise, a smaller one paints the beginning of its
    picture: a border reaches no further than eight pixels into a picture that is doubled once."""
    large, small = generator(62, 62), generator(62, 46)  # 31x31 and 31x23
    state = {
        name: value[..., : small.state_dict()[name].shape[-1]] if name.endswith("const") else value
        for name, value in large.state_dict().items()
    }
    small.load_state_dict(state)
    z = torch.randn(2, 6)
    wide, narrow = (G(z, None, noise_mode="const") for G in (large, small))
    torch.testing.assert_close(narrow[..., :38], wide[..., :38], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(narrow[..., 45], wide[..., 45], rtol=1e-2, atol=1e-2)


def test_squares_are_the_family_s_own():
    """The shape given or not: the same draws, names and pictures; and no argument the family lacks."""
    plain, given = generator(32, 32, img_shape=False), generator(32, 32)
    assert plain.init_kwargs.keys().isdisjoint(["img_shape"]) and plain.img_shape == given.img_shape == [
        32,
        32,
    ]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, given.state_dict()[name])
    for module in plain.synthesis.modules():
        if hasattr(module, "init_kwargs"):
            assert module.init_kwargs.keys().isdisjoint(["shape", "img_shape", "half_dtype"])
    five = generator(40, 40, img_shape=False)  # 5 * 8
    assert five.img_shape == [40, 40] and five.synthesis.b4.const.shape[1:] == (5, 5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(architecture):
    G, D = generator(24, 32, architecture).train(), discriminator(24, 32, architecture).train()
    for net in [G, D]:
        net.requires_grad_(True)
    D(G(torch.randn(4, 6), None), None).sum().backward()
    for net in [G, D]:
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError, match="longer side"):
        Generator(4, 0, 4, 64, 3, img_shape=[48, 32])
    with pytest.raises(AssertionError, match="h0 x w0 doubled n times"):
        Generator(4, 0, 4, 66, 3, img_shape=[66, 64])


def test_frozen_layers_and_class_labels():
    torch.manual_seed(0)
    D = Discriminator(
        c_dim=3,
        img_resolution=32,
        img_channels=1,
        img_shape=[32, 24],
        block_kwargs=dict(freeze_layers=2),
        **WIDTHS,
    )
    assert D(torch.randn(4, 1, 32, 24), torch.eye(3)[[0, 1, 2, 0]]).shape == (4, 1)
    assert {name for name, _ in D.b16.named_parameters()} == {"conv1.weight", "conv1.bias", "skip.weight"}
