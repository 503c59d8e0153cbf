# SPDX-License-Identifier: Apache-2.0
"""ldbr_dist and ldbr_floor on generators whose distortion is known in closed form."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.plugins import load_plugins
from metrics import metric_main
from ssn_ext import metric

load_plugins()
pytestmark = pytest.mark.usefixtures("own_cache")


class LinearMapping(torch.nn.Module):
    """The identity, per block."""

    latent_grid = [2, 2]

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False):
        return z.to(torch.float32)[:, None]


class LinearSynthesis(torch.nn.Module):
    """One latent value per block; a block's pixels are own * z_a + leak * (sum of the others)."""

    def __init__(self, own, leak):
        super().__init__()
        self.matrix = leak * torch.ones(4, 4) + (own - leak) * torch.eye(4)

    def forward(self, ws, noise_mode="const", force_fp32=False):
        values = ws[:, 0] @ self.matrix  # [N, 4]
        return values.reshape(-1, 1, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


class LinearGenerator(torch.nn.Module):
    """8x8 grey pictures of a 2x2 grid whose influence matrix is known: 2 own^2 on the diagonal, else 2 leak^2."""

    def __init__(self, own, leak):
        super().__init__()
        self.mapping, self.synthesis = LinearMapping(), LinearSynthesis(own, leak)
        self.z_dim = self.w_dim = 4
        self.c_dim, self.img_resolution, self.img_channels, self.num_ws = 0, 8, 1, 1
        self.latent_grid = [2, 2]

    def forward(self, z, c, noise_mode="const"):
        return self.synthesis(self.mapping(z, c), noise_mode)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 8x8 grey pictures and the options that open it."""
    folder = tmp_path_factory.mktemp("grey")
    rnd = np.random.RandomState(0)
    for i in range(40):
        levels = np.clip(128 + 12 * rnd.randn(2, 2), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(np.kron(levels, np.ones([4, 4], dtype=np.uint8))).save(folder / f"{i:03d}.png")
    return dict(class_name="training.dataset.ImageFolderDataset", path=str(folder))


def run(name, G, **kwargs):
    return metric_main.calc_metric(name, G=G, device="cpu", **kwargs)


def test_ldbr_dist_of_a_linear_generator(tmp_path):
    own, leak = 0.1, 0.02  # small enough that clamping never acts
    G = LinearGenerator(own, leak)
    result = run("ldbr_dist", G, run_dir=str(tmp_path))
    got = result.results
    assert got.ldbr_dist == pytest.approx(2 * leak**2, abs=4 * got.ldbr_dist_stderr)
    assert got.ldbr_dist_inside == pytest.approx(2 * own**2, abs=4 * got.ldbr_dist_inside_stderr)
    assert 0 < got.ldbr_dist_stderr < 0.1 * got.ldbr_dist
    assert got.ldbr_dist_locality == pytest.approx((own / leak) ** 2, rel=1e-3)
    assert "ldbr_dist_nohalo" not in got  # nothing of a 2x2 grid lies beyond the neighbours
    influence = np.array(got.ldbr_dist_influence)
    assert influence.shape == (4, 4)
    np.testing.assert_allclose(influence, 2 * (leak**2 + (own**2 - leak**2) * np.eye(4)), rtol=0.25)
    assert (tmp_path / "influence.png").stat().st_size > 0
    metric_main.report_metric(
        result, run_dir=str(tmp_path), snapshot_pkl=str(tmp_path / "network-snapshot-000001.pkl")
    )
    line = json.loads((tmp_path / "metric-ldbr_dist.jsonl").read_text())
    assert line["snapshot_pkl"] == "network-snapshot-000001.pkl" and line["details"]["num_latents"] == 1024


def test_ldbr_emd_of_a_linear_generator():
    """Blocks of one grey each: what moves is the colour, so it equals the MSE."""
    own, leak = 0.1, 0.02
    emd = run("ldbr_emd", LinearGenerator(own, leak)).results
    mse = run("ldbr_dist", LinearGenerator(own, leak)).results
    for key in ["", "_stderr", "_inside", "_inside_stderr", "_locality"]:
        assert emd[f"ldbr_emd{key}"] == pytest.approx(mse[f"ldbr_dist{key}"], rel=1e-4), key


def test_ldbr_features_is_the_perceptual_change_per_area(monkeypatch):
    """With a detector whose features are the pixels, three channels of them: three times the MSE."""
    own, leak = 0.1, 0.02

    def detector(pictures, resize_images, return_lpips):
        return (pictures / 127.5 - 1) / 8  # squared distances are means over the 64 pixels

    monkeypatch.setattr(metric.metric_utils, "open_detector", lambda opts, source: detector)
    result = run("ldbr_features", LinearGenerator(own, leak), detector="efficientnet-lite0-128")
    got = {key.removesuffix("_efficientnet_lite0_128"): value for key, value in result.results.items()}
    assert sorted(got) == sorted(
        f"ldbr_features{key}" for key in ["", "_stderr", "_inside", "_inside_stderr", "_locality"]
    )
    assert got["ldbr_features"] == pytest.approx(3 * 2 * leak**2, abs=4 * got["ldbr_features_stderr"])
    assert got["ldbr_features_inside"] == pytest.approx(
        3 * 2 * own**2, abs=4 * got["ldbr_features_inside_stderr"]
    )
    assert got["ldbr_features_locality"] == pytest.approx((own / leak) ** 2, rel=1e-3)
    assert result.details.num_latents == metric.NUM_PERCEPTUAL
    shared = run("ldbr_dist", LinearGenerator(own, leak), detector="efficientnet-lite0-128").results
    outside = shared["ldbr_dist_perceptual_outside_efficientnet_lite0_128"]
    assert outside == pytest.approx(got["ldbr_features"] * 3 / 4, rel=1e-4)  # of the whole picture


def test_ldbr_features_says_that_it_needs_a_detector():
    assert "vgg16.pt" in metric_main.why_unavailable(["ldbr_features"], detector="/nowhere/vgg16.pt")
    assert metric_main.why_unavailable(["ldbr_emd"]) is None


def test_standard_error_is_clustered_by_latent():
    """Blocks that change alike within a latent must not shrink the error: it is that of N values, not of N*B."""
    rnd = np.random.RandomState(0)
    level = rnd.rand(200)
    matrices = np.ones([200, 4, 4]) * level[:, None, None]
    got = metric.summarise_influence(matrices, [2, 2], [8, 8])
    assert got["ldbr_dist"] == pytest.approx(level.mean())
    assert got["ldbr_dist_stderr"] == pytest.approx(level.std(ddof=1) / 200**0.5)


def test_halo_leaves_the_neighbours_out():
    """On 4x4 blocks: change 1 in the neighbours and 0 beyond."""
    from ssn_ext.blocks import neighbours

    matrices = neighbours([4, 4], cells=1).double()[None].repeat(2, 1, 1)
    got = metric.summarise_influence(matrices, [4, 4], [16, 16])
    assert got["ldbr_dist_nohalo"] == 0
    assert got["ldbr_dist"] == pytest.approx(float((neighbours([4, 4]).sum(dim=1) - 1).double().mean()) / 15)


def test_floor_of_a_linear_generator(data):
    """The symmetric leak is the root of its covariance and, by symmetry, the optimum: it attains its floor."""
    leaky = run("ldbr_floor", LinearGenerator(0.1, 0.05), dataset_kwargs=data).results
    assert leaky.ldbr_floor_distortion == pytest.approx(2 * 0.05**2, rel=0.1)
    assert leaky.ldbr_floor_efficiency == pytest.approx(1, rel=0.1)
    # The same pictures with every block drawn by another block's latent: the same floor, missed by far.
    shifted = LinearGenerator(0.1, 0.0)
    shifted.synthesis.matrix = shifted.synthesis.matrix.roll(1, dims=0)
    got = run("ldbr_floor", shifted, dataset_kwargs=data).results
    assert got.ldbr_floor_distortion == pytest.approx(2 * 0.1**2 / 3, rel=0.1)
    assert got.ldbr_floor_efficiency < 0.05
    local = run("ldbr_floor", LinearGenerator(0.1, 0.0), dataset_kwargs=data).results
    assert local.ldbr_floor_distortion == 0
    assert local.ldbr_floor_own < 1e-3 * 2 * 0.1**2 * 4
    assert local.ldbr_floor_lower <= local.ldbr_floor
    assert 0.5 < local.ldbr_floor_kept <= 1


def test_metrics_of_one_call_share_the_influence(data, monkeypatch):
    """Rendered once, and the same numbers as apart."""
    G = LinearGenerator(0.1, 0.02)
    apart = run("ldbr_floor", G, dataset_kwargs=data).results
    calls = []
    original = metric.resampling.influence
    monkeypatch.setattr(
        metric.resampling, "influence", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    shared = {}
    first = run("ldbr_dist", G, shared=shared).results
    count = len(calls)
    together = run("ldbr_floor", G, dataset_kwargs=data, shared=shared).results
    assert count == len(calls) > 0
    assert together == apart and together.ldbr_floor_distortion == first.ldbr_dist


def test_a_generator_without_blocks_is_refused():
    G = LinearGenerator(1, 1)
    del G.latent_grid
    with pytest.raises(ValueError, match="no latent_grid"):
        run("ldbr_dist", G)


def test_large_pictures_are_refused_by_the_floor(data):
    G = LinearGenerator(1, 1)
    G.img_resolution = 128
    with pytest.raises(ValueError, match="up to 64 pixels a side, not 128"):
        run("ldbr_floor", G, dataset_kwargs=data)
