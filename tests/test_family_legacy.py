# SPDX-License-Identifier: Apache-2.0
"""Scripts that open snapshots by `legacy.load_network_pkl`, on an SSN and on a StyleGAN2."""

import pickle

import numpy as np
import pytest
import torch

import dnnlib
import legacy
from ssn_ext.networks import SpatialGenerator
from training.augment import AugmentPipe
from training.networks import Discriminator, Generator
from training.snapshot import save_network_pkl

SIZE = dict(c_dim=0, img_resolution=16, img_channels=3)
WIDTHS = dict(channel_base=128, channel_max=16)
MAKERS = {
    "plain": lambda: Generator(z_dim=8, w_dim=8, **SIZE, synthesis_kwargs=WIDTHS),
    "SSN": lambda: SpatialGenerator(
        z_dim=32, w_dim=32, latent_grid=[2, 2], **SIZE, synthesis_kwargs=dict(WIDTHS, encoder_init="none")
    ),
}


@pytest.fixture(params=MAKERS)
def network_pkl(request, tmp_path):
    """A snapshot as training writes it."""
    torch.manual_seed(0)
    G = MAKERS[request.param]()
    save_network_pkl(
        tmp_path / "net.pkl",
        G=G,
        D=Discriminator(**SIZE, **WIDTHS),
        G_ema=G,
        augment_pipe=AugmentPipe(xflip=1),
    )
    return str(tmp_path / "net.pkl")


def test_the_lines_of_every_script(network_pkl):
    with dnnlib.util.open_url(network_pkl) as f:
        G = legacy.load_network_pkl(f)["G_ema"].to("cpu")
    with open(network_pkl, "rb") as f:
        same = pickle.load(f)["G_ema"]
    z = torch.from_numpy(np.random.RandomState(5).randn(1, G.z_dim))
    label = torch.zeros([1, G.c_dim])
    img = G(z, label, truncation_psi=0.7, noise_mode="const")
    assert list(img.shape) == [1, 3, 16, 16]
    assert torch.equal(img, same(z, label, truncation_psi=0.7, noise_mode="const"))


def test_all_parts_are_there(network_pkl):
    with dnnlib.util.open_url(network_pkl) as f:
        data = legacy.load_network_pkl(f)
    assert set(data) >= {"G", "D", "G_ema", "training_set_kwargs", "augment_pipe"}
    assert data["training_set_kwargs"] is None and data["augment_pipe"].xflip == 1
    assert list(data["D"](torch.randn(4, 3, 16, 16), None).shape) == [4, 1]


def test_missing_parts_are_none(network_pkl, tmp_path):
    with open(network_pkl, "rb") as f:
        data = pickle.load(f)
    with open(tmp_path / "less.pkl", "wb") as f:
        pickle.dump({name: data[name] for name in ["G", "D", "G_ema"]}, f)
    with open(tmp_path / "less.pkl", "rb") as f:
        data = legacy.load_network_pkl(f)
    assert data["training_set_kwargs"] is None and data["augment_pipe"] is None


@pytest.mark.parametrize("force_fp16", [False, True])
def test_half_precision(network_pkl, force_fp16):
    """Asked for by the blocks above 4x4; on a CPU the pictures stay."""
    with open(network_pkl, "rb") as f:
        before = pickle.load(f)
    with dnnlib.util.open_url(network_pkl) as f:
        data = legacy.load_network_pkl(f, force_fp16=force_fp16)
    for name in ["G", "G_ema"]:
        G = data[name]
        assert G.synthesis.b16.use_fp16 == G.synthesis.b8.use_fp16 == force_fp16
        assert G.synthesis.b8.conv0.conv_clamp == (256 if force_fp16 else None)
        assert G.init_kwargs.synthesis_kwargs.get("num_fp16_res") == (4 if force_fp16 else None)
        assert not G.training and not any(p.requires_grad for p in G.parameters())
        z = torch.randn(2, G.z_dim)
        assert torch.equal(G(z, None, noise_mode="const"), before[name](z, None, noise_mode="const"))
    assert data["D"].b16.use_fp16 == force_fp16
    img = torch.randn(4, 3, 16, 16)
    assert torch.equal(data["D"](img, None), before["D"](img, None))


def test_what_is_no_snapshot(tmp_path):
    (tmp_path / "net.pkl").write_bytes(b"no pickle")
    with dnnlib.util.open_url(str(tmp_path / "net.pkl")) as f, pytest.raises(ValueError, match="net.pkl"):
        legacy.load_network_pkl(f)
