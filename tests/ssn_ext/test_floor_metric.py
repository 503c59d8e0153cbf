# SPDX-License-Identifier: Apache-2.0
"""The floors of colours and features as metrics, and the cache of the floor of the data."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.plugins import load_plugins
from metrics import metric_main
from ssn_ext import floor_metric, metric, spaces
from ssn_ext.blocks import block_masks
from ssn_ext.distortion import block_change
from ssn_ext.floor import ldbr_floor
from tests.ssn_ext.test_grids import TwoScales
from tests.ssn_ext.test_loss import Polynomial
from tests.ssn_ext.test_metric import LinearGenerator

load_plugins()


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "grey", 40)


def write_pictures(folder, count, seed=0):
    """8x8 grey pictures of 2x2 blocks that are alike in part."""
    folder.mkdir(exist_ok=True)
    rnd = np.random.RandomState(seed)
    for i in range(count):
        levels = 128 + 12 * rnd.randn(2, 2) + 12 * rnd.randn()
        blocks = np.kron(np.clip(levels, 0, 255).astype(np.uint8), np.ones([4, 4], dtype=np.uint8))
        PIL.Image.fromarray(blocks).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def solved(monkeypatch):
    """The sizes of the problems that were solved: [pictures, values]."""
    calls = []

    def counting(**kwargs):
        calls.append(list(kwargs["samples"].shape))
        return ldbr_floor(**kwargs)

    monkeypatch.setattr(spaces, "ldbr_floor", counting)
    return calls


def calc(name, G, folder, **kwargs):
    data = dict(class_name="training.dataset.ImageFolderDataset", path=str(folder))
    return metric_main.calc_metric(name, G=G, dataset_kwargs=data, device="cpu", **kwargs)


def read(folder):
    files = sorted(folder.glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(PIL.Image.open(file))) for file in files]) / 127.5 - 1


def test_the_floor_of_the_data_is_computed_once(folder, own_cache, solved):
    """A second call with another network takes it from a file, with the same numbers."""
    first = calc("ldbr_floor", LinearGenerator(0.1, 0.05), folder).results
    expected = ldbr_floor(samples=read(folder), masks=block_masks([2, 2], [8, 8]))
    assert first.ldbr_floor == pytest.approx(expected.floor, rel=1e-5)
    assert first.ldbr_floor_lower == pytest.approx(expected.lower_bound, rel=1e-5)
    assert solved == [[40, 64], [4096, 64]] and len(list(own_cache.glob("grey-floor-mse-*.json"))) == 1
    second = calc("ldbr_floor", LinearGenerator(0.2, 0.05), folder).results
    assert solved == [[40, 64], [4096, 64], [4096, 64]]
    assert (second.ldbr_floor, second.ldbr_floor_lower) == (first.ldbr_floor, first.ldbr_floor_lower)
    assert second.ldbr_floor_own != first.ldbr_floor_own and second.ldbr_floor_kept != first.ldbr_floor_kept


def test_without_the_cache_nothing_is_written_or_read(folder, own_cache, solved):
    for _ in range(2):
        calc("ldbr_floor", LinearGenerator(0.1, 0.05), folder, cache=False)
    assert solved.count([40, 64]) == 2 and not own_cache.exists()


def test_metrics_of_one_call_share_it_even_so(folder, solved):
    shared = {}
    for _ in range(2):
        calc("ldbr_floor", LinearGenerator(0.1, 0.05), folder, cache=False, shared=shared)
    assert solved.count([40, 64]) == 1


@pytest.mark.parametrize("change", ["more", "other", "grid", "count", "code"])
def test_what_the_floor_depends_on_names_another_file(folder, own_cache, solved, change, monkeypatch):
    G = LinearGenerator(0.1, 0.05)
    before = calc("ldbr_floor", G, folder).results.ldbr_floor
    size = [40, 64]
    if change == "more":
        write_pictures(folder, 50)
        size = [50, 64]
    elif change == "other":
        write_pictures(folder, 40, seed=1)
    elif change == "grid":
        G.latent_grid = G.mapping.latent_grid = [1, 4]
    elif change == "count":
        monkeypatch.setattr(floor_metric, "NUM_REAL", 30)
        size = [30, 64]
    else:
        monkeypatch.setattr(floor_metric, "code_hash", lambda: "another")
    after = calc("ldbr_floor", G, folder).results.ldbr_floor
    assert solved[2] == size and len(list(own_cache.iterdir())) == 2
    assert (after == before) == (change == "code")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"floor": 1}', '{"floor": "x", "lower_bound": 0, "covered": 1}', ""]
)
def test_a_broken_file_is_written_again(folder, own_cache, solved, text):
    G = LinearGenerator(0.1, 0.05)
    expected = calc("ldbr_floor", G, folder).results
    (file,) = own_cache.iterdir()
    whole = file.read_text()
    file.write_text(text)
    with pytest.warns(UserWarning, match="is broken and will be written again"):
        assert calc("ldbr_floor", G, folder).results == expected
    assert file.read_text() == whole and json.loads(whole)["floor"] == expected.ldbr_floor


def test_emd_of_blocks_of_one_grey_is_the_mse(folder):
    """So all floors and distortions agree, but for the number of edits."""
    G, shared = LinearGenerator(0.1, 0.05), {}
    mse = calc("ldbr_floor", G, folder, shared=shared).results
    emd = calc("ldbr_floor_emd", G, folder, shared=shared).results
    for key in ["", "_own"]:
        assert emd[f"ldbr_floor_emd{key}"] == pytest.approx(mse[f"ldbr_floor{key}"], rel=2e-3)
    assert emd.ldbr_floor_emd_distortion == pytest.approx(
        mse.ldbr_floor_distortion, abs=4 * emd.ldbr_floor_emd_distortion_stderr
    )
    assert emd.ldbr_floor_emd_inside == pytest.approx(
        mse.ldbr_floor_inside, abs=4 * emd.ldbr_floor_emd_inside_stderr
    )
    assert emd.ldbr_floor_emd_efficiency == pytest.approx(1, rel=0.1)  # the symmetric leak is the optimum
    assert emd.ldbr_floor_emd_efficiency == emd.ldbr_floor_emd_own / emd.ldbr_floor_emd_distortion
    assert emd.ldbr_floor_emd_covered == 1


def test_components_of_the_colours(folder, monkeypatch):
    """One component a block holds all there is of blocks of one grey."""
    monkeypatch.setattr(spaces, "MOST_VALUES", 4)
    monkeypatch.setattr(spaces.gather, "__defaults__", (4,))
    monkeypatch.setattr(spaces.floor_of, "__defaults__", (4,))
    got = calc("ldbr_floor_emd", LinearGenerator(0.1, 0.05), folder).results
    assert got.ldbr_floor_emd_covered == pytest.approx(1, abs=1e-5)
    assert got.ldbr_floor_emd_efficiency == pytest.approx(1, rel=0.1)


class Pixels(torch.nn.Module):
    """A detector whose features are those of the pixels."""

    def forward(self, images, resize_images, return_lpips):
        return (images / 127.5 - 1) / 8


def test_features_that_are_pixels_have_the_floor_of_pixels(folder, monkeypatch):
    """Three channels, summed: three times the MSE. Results are named after the detector."""

    def open_detector(opts, source):
        opts.details.update(detector=source, detector_sha256="0")
        return Pixels()

    monkeypatch.setattr(floor_metric.metric_utils, "open_detector", open_detector)
    monkeypatch.setattr(spaces.detectors, "feature_shapes", lambda detector: [(3, 8, 8)])
    G = LinearGenerator(0.1, 0.05)
    mse = calc("ldbr_floor", G, folder).results
    result = calc("ldbr_floor_features", G, folder, detector="efficientnet-lite0-128")
    got = {key.removesuffix("_efficientnet_lite0_128"): value for key, value in result.results.items()}
    assert len(got) == 9 and not set(got) & set(result.results)
    for key in ["", "_own", "_lower"]:
        assert got[f"ldbr_floor_features{key}"] == pytest.approx(3 * mse[f"ldbr_floor{key}"], rel=2e-3)
    assert got["ldbr_floor_features_distortion"] == pytest.approx(3 * mse.ldbr_floor_distortion, rel=0.2)
    assert result.details.num_latents == floor_metric.NUM_EDITED and result.details.num_real == 40


def test_features_say_which_detectors_will_do():
    line = metric_main.why_unavailable(["ldbr_floor_features"])
    assert "does not say where" in line and "--detector=efficientnet-lite0" in line
    assert metric_main.why_unavailable(["ldbr_floor_emd"]) is None


def test_large_pictures_have_floors_of_components(tmp_path):
    """Where pixels are refused, colours are not: the network says 128 pixels, and nothing asks for them all."""
    G = LinearGenerator(0.1, 0.05)
    G.img_resolution = 128
    with pytest.raises(ValueError, match="ldbr_floor_emd and ldbr_floor_features do with components"):
        calc("ldbr_floor", G, write_pictures(tmp_path / "grey", 20))
    assert calc("ldbr_floor_emd", G, tmp_path / "grey").results.ldbr_floor_emd > 0


def test_colours_of_two_grids(folder, monkeypatch):
    """Each grid compares the colours of its own blocks: one grey each for the fine ones, so that all is as in
    pixels; and for the coarse ones too where there is no fine detail."""
    monkeypatch.setattr(metric, "NUM_LATENTS", floor_metric.NUM_EDITED)
    for fine, grids in [(0.05, ["4x4"]), (0.0, ["2x2", "4x4"])]:
        G, shared = TwoScales(0.08, fine, 0.04), {}
        mse = calc("ldbr_floor", G, folder, shared=shared).results
        emd = calc("ldbr_floor_emd", G, folder, shared=shared).results
        assert not any(key.startswith("ldbr_floor_emd_kept") for key in emd)
        for grid in grids:
            for key in ["", "_own", "_distortion", "_inside"]:
                expected = mse[f"ldbr_floor{key}_{grid}"]
                assert emd[f"ldbr_floor_emd{key}_{grid}"] == pytest.approx(expected, rel=2e-3, abs=1e-7)


def test_mean_order_of_a_polynomial():
    """sum |S| tr C_S / tr C of Hoeffding parts that are known, from the influence of each block."""
    G = Polynomial()
    torch.manual_seed(0)
    z, fresh = torch.randn([2, 40000, 4])
    masks = block_masks([2, 2], [4, 4])
    before, rows = G(z[:, None]), []
    for a in range(4):
        edited = torch.where(torch.arange(4) == a, fresh, z)
        rows.append(block_change(before, G(edited[:, None]), masks))
    found = floor_metric.mean_order(
        torch.stack(rows, dim=1), [0.25] * 4, float(before.var(dim=0, correction=0).mean())
    )
    sizes = {1: float(G.A.square().sum()), 2: float(G.P.square().sum()), 3: float(G.Q.square().sum())}
    want = sum(order * size for order, size in sizes.items()) / sum(sizes.values())
    assert 1.2 < want and found == pytest.approx(want, rel=0.02)
    G.P, G.Q = torch.zeros(2, 4, 4)
    linear = [
        block_change(G(z[:, None]), G(torch.where(torch.arange(4) == a, fresh, z)[:, None]), masks)
        for a in range(4)
    ]
    trace = float(G(z[:, None]).var(dim=0, correction=0).mean())
    assert floor_metric.mean_order(torch.stack(linear, dim=1), [0.25] * 4, trace) == pytest.approx(
        1, rel=0.02
    )
