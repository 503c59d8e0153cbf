# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from metrics import metric_main, metric_utils
from metrics.perceptual_path_length import PPLSampler, slerp, trimmed_mean


class LinearGenerator(torch.nn.Module):
    """w = z; picture = A w + noise input."""

    def __init__(self, z_dim=6, resolution=8):
        super().__init__()
        self.z_dim = self.w_dim = z_dim
        self.c_dim, self.num_ws, self.img_resolution, self.img_channels = 0, 3, resolution, 1
        rnd = torch.Generator().manual_seed(2)
        self.A = torch.nn.Parameter(torch.randn([resolution**2, z_dim], generator=rnd) * 0.1)
        self.layer = torch.nn.Module()
        self.layer.register_buffer("noise_const", torch.zeros([resolution, resolution]))
        self.seen = []

    def mapping(self, z, c):
        assert c.shape == (len(z), 0)
        return z[:, None].repeat(1, self.num_ws, 1)

    def synthesis(self, ws, noise_mode, force_fp32):
        assert noise_mode == "const" and force_fp32
        image = (ws[:, 0] @ self.A.t()).reshape(-1, 1, self.img_resolution, self.img_resolution)
        self.seen.append(self.layer.noise_const.clone())
        return image + self.layer.noise_const


class PixelDistance(torch.nn.Module):
    """Perceptual features are the values of the first channel in [-1, 1]."""

    def forward(self, images, resize_images, return_lpips):
        self.shape = list(images.shape)
        assert return_lpips and not resize_images and images.shape[1] == 3
        return (images[:, :1] / 127.5 - 1).flatten(1)


def sample(G, space="w", sampling="end", crop=False, epsilon=1e-2, count=50):
    opts = metric_utils.MetricOptions(G=G, device="cpu")
    z, t, _ = metric_utils.latents(opts, range(count), count=2)
    sampler = PPLSampler(G, {}, epsilon, space, sampling, crop, PixelDistance())
    with torch.no_grad():
        return sampler(z, t, torch.zeros([count, 0])).numpy(), z, t, sampler


@pytest.mark.parametrize("sampling", ["end", "full"])
def test_a_linear_generator_in_w(sampling):
    """|A (w1 - w0) eps|^2 / eps^2, wherever on the path."""
    G = LinearGenerator()
    distances, z, _, _ = sample(G, sampling=sampling)
    expected = ((z[:, 1] - z[:, 0]) @ G.A.t().detach()).square().sum(dim=1).numpy()
    assert distances == pytest.approx(expected, rel=1e-3)
    # E |A (z1 - z0)|^2 = 2 tr A A'
    assert distances.mean() == pytest.approx(2 * float(G.A.detach().square().sum()), rel=0.3)
    assert not torch.equal(G.seen[0], torch.zeros(8, 8))  # the noise was drawn anew


def test_a_linear_generator_in_z():
    """On the sphere: |A (p(eps) - p(0))|^2 / eps^2 with p(0) = z0 / |z0|, p moving towards z1."""
    G = LinearGenerator()
    distances, z, _, _ = sample(G, space="z", epsilon=1e-3)
    a, b = (v.double().numpy() for v in (z[:, 0], z[:, 1]))
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    cosine = (a * b).sum(axis=1, keepdims=True)
    tangent = (b - cosine * a) / np.sqrt(1 - cosine**2) * np.arccos(cosine)
    expected = ((tangent @ G.A.detach().double().numpy().T) ** 2).sum(axis=1)
    assert distances == pytest.approx(expected, rel=0.02)


def test_slerp():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    angle = math.pi / 2 * 0.3
    assert slerp(a, b, 0.3).tolist()[0] == pytest.approx([math.cos(angle), math.sin(angle)])
    assert slerp(a, b, 0.0).tolist()[0] == pytest.approx([1, 0])
    same = slerp(a, a, torch.tensor([[0.7]]))
    assert same.tolist()[0] == pytest.approx([1, 0]) and bool(torch.isfinite(same).all())


def test_a_grid_of_latents_moves_cell_by_cell():
    """Every cell goes 0.3 of its own angle; a slerp over all values at once would not."""
    G = LinearGenerator(z_dim=6)
    G.latent_grid = [1, 2]
    sampler = PPLSampler(G, {}, 1e-4, "z", "full", False, PixelDistance())
    z = torch.randn([4, 2, 6], generator=torch.Generator().manual_seed(0))
    found = sampler._point(z, torch.full([4], 0.3), torch.zeros(4, 0))[:, 0].reshape(4, 3, 2)
    for n in range(4):
        for cell in range(2):
            a, b = (v.reshape(3, 2)[:, cell] / v.reshape(3, 2)[:, cell].norm() for v in z[n])
            p = found[n, :, cell]
            assert float(p.norm()) == pytest.approx(1, rel=1e-5)
            assert float(torch.acos(a @ p)) == pytest.approx(0.3 * float(torch.acos(a @ b)), rel=1e-3)


def test_crop_and_size():
    G = LinearGenerator(resolution=16)
    *_, sampler = sample(G, crop=True, count=2)
    assert sampler.vgg16.shape == [4, 3, 8, 8]
    picture = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert torch.equal(sampler._prepare(picture), picture[:, :, 6:14, 4:12])
    wide = torch.arange(384.0).reshape(1, 1, 16, 24)
    assert torch.equal(sampler._prepare(wide), wide[:, :, 6:14, 6:18])
    G.img_resolution = 512  # what counts is the whole picture, also after a crop
    assert torch.equal(sampler._prepare(picture)[0, 0, 0, 0], picture[0, 0, 6:8, 4:6].mean())


def test_trimmed_mean():
    values = np.arange(1000.0)
    values[0], values[-1] = -1e9, 1e9
    # Ranks 9 ('lower' of 9.99) to 990 ('higher' of 989.01) stay, both included.
    assert trimmed_mean(values[::-1]) == pytest.approx((9 + 990) / 2)
    assert trimmed_mean([7.0]) == 7


def test_wrong_space():
    with pytest.raises(ValueError, match="'z' or 'w'"):
        PPLSampler(LinearGenerator(), {}, 1e-4, "x", "end", False, None)


def test_metric(detector_file, detector_folder, monkeypatch):
    row = metric_main.METRICS.resolve("ppl")
    monkeypatch.setattr(row, "settings", dict(row.settings, num_samples=9, epsilon=1e-2))
    G = LinearGenerator()
    args = dict(G=G, device="cpu")
    state = torch.get_rng_state()
    result = metric_main.calc_metric("ppl", detector=detector_folder, **args)
    assert torch.equal(torch.get_rng_state(), state) and not G.seen  # neither disturbed
    opts = metric_utils.MetricOptions(G=G, device="cpu")
    z, _, _ = metric_utils.latents(opts, range(9), count=2)
    expected = 3 * ((z[:, 1] - z[:, 0]) @ G.A.t().detach()).square().sum(dim=1)  # grey: three equal channels
    assert result.results == {"ppl": pytest.approx(trimmed_mean(expected.numpy()), rel=1e-2)}
    assert result.details.num_gen == 9 and result.details.detector == "vgg16"
    other = metric_main.calc_metric("ppl", detector=detector_file, **args)
    assert other.results == {"ppd_tiny_net": result.results.ppl}
