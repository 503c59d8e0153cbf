# SPDX-License-Identifier: Apache-2.0
"""Feature norms: known maps, layers that are found, the metric on a generator with a planted droplet."""

import json

import pytest
import torch

from dnnlib.plugins import load_plugins
from metrics import metric_main
from ssn_ext import droplets
from ssn_ext.networks import SpatialGenerator
from ssn_ext.spade_networks import SpadeGenerator
from training.networks import Generator

load_plugins()


def test_peak_to_mean():
    flat, spike, nothing = torch.full([4, 8], 3.0), torch.zeros(4, 8), torch.zeros(4, 8)
    spike[1, 2] = 5
    ratios = droplets.peak_to_mean(torch.stack([flat, spike, nothing]))
    torch.testing.assert_close(ratios, torch.tensor([1.0, 32.0, 1.0]))


class Layer(torch.nn.Module):
    """Two channels of a constant 3 and 4, times `peak` at one position."""

    def __init__(self, peak):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros([2, 1, 3, 3]))
        self.peak = peak

    def forward(self, x):
        """[N, 1, H, W] -> [N, 2, H, W]."""
        x = torch.cat([0 * x + 3, 0 * x + 4], dim=1)
        x[:, :, 1, 1] *= self.peak
        return x


class Synthesis(torch.nn.Module):
    """Layers a and b, the latter on a larger map, and a 1x1 projection, which is no layer to look at."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.encoder = Layer(2), Layer(9), Layer(100)
        self.last = torch.nn.Conv2d(2, 3, 1)

    def forward(self, ws, noise_mode="random"):
        """ws [N, 1, 4] -> [N, 3, 8, 8]."""
        assert noise_mode == "const"
        x = ws.reshape(-1, 1, 2, 2)
        self.encoder(x)
        self.a(x)
        return self.last(self.b(x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)))


class Planted(torch.nn.Module):
    """A generator whose ratios are known: 2 * 4 / (3 + 2) and 9 * 64 / (63 + 9)."""

    def __init__(self):
        super().__init__()
        self.synthesis, self.z_dim, self.c_dim, self.img_resolution = Synthesis(), 4, 0, 8

    def mapping(self, z, c, **_kwargs):
        """z as it is."""
        return z[:, None].to(torch.float32)


def test_norms_are_those_of_the_layers_and_hooks_are_gone():
    G = Planted()
    picture, norms = droplets.feature_norms(G, torch.randn(3, 1, 4))
    assert picture.shape == (3, 3, 8, 8) and list(norms) == ["a", "b"]
    expected = torch.full([3, 8, 8], 5.0)
    expected[:, 1, 1] = 45
    torch.testing.assert_close(norms["b"], expected)
    with pytest.raises(RuntimeError):
        droplets.feature_norms(G, torch.randn(3, 1, 5))
    assert not any(module._forward_hooks for module in G.modules())


def test_metric(tmp_path):
    result = metric_main.calc_metric("droplet", G=Planted(), device="cpu", run_dir=str(tmp_path))
    got = result.results
    assert got["droplet_a"] == pytest.approx(8 / 5) and got["droplet_b"] == pytest.approx(8)
    assert got["droplet"] == pytest.approx(4.8) and got["droplet_worst"] == pytest.approx(8)
    assert got["droplet_stderr"] == pytest.approx(0, abs=1e-6)  # all latents alike
    metric_main.report_metric(result, run_dir=str(tmp_path), snapshot_pkl=str(tmp_path / "a.pkl"))
    line = json.loads((tmp_path / "metric-droplet.jsonl").read_text())
    assert line["details"]["num_latents"] == 256 and line["results"]["droplet_b"] == pytest.approx(8)
    assert metric_main.METRICS.resolve("droplet").better == "lower"


@pytest.mark.parametrize("spatial", [SpatialGenerator, SpadeGenerator])
def test_same_layers_in_all_generators(spatial):
    """The encoder's convolutions are left out, and the projections to pictures."""
    options = dict(c_dim=0, img_resolution=16, img_channels=3)
    widths = dict(synthesis_kwargs=dict(channel_base=64, channel_max=8))
    plain = Generator(z_dim=8, w_dim=8, **options, **widths)
    G = spatial(z_dim=32, w_dim=32, latent_grid=[2, 2], **options, **widths)
    names = ["b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1"]
    assert list(droplets.conv_layers(plain)) == list(droplets.conv_layers(G)) == names
    _picture, norms = droplets.feature_norms(G.eval(), G.mapping(torch.randn(2, 32), None))
    assert [list(each.shape) for each in norms.values()] == [[2, s, s] for s in (4, 8, 8, 16, 16)]


def test_a_generator_without_convolutions():
    G = Planted()
    G.synthesis = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Planted has no convolutions larger than 1x1"):
        droplets.conv_layers(G)
