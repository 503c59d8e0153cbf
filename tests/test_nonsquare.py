# SPDX-License-Identifier: Apache-2.0
"""Pictures of 32x24 pixels from end to end: train.py, calc_metrics.py and resample.py as a user calls them."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import resample
import train
from dnnlib.plugins import load_plugins
from metrics import metric_main
from ssn_ext import floor_metric, metric
from torch_utils import training_stats
from torch_utils.images import read_image, write_png
from training import snapshot

ROOT = pathlib.Path(train.__file__).parent
spec = importlib.util.spec_from_file_location("calc_metrics", ROOT / "calc_metrics.py")
calc_metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calc_metrics)
load_plugins()

HEIGHT, WIDTH = 24, 32
SMALL = [f"--set={name}={value}" for name, value in {
    "G_kwargs.synthesis_kwargs.channel_max": 8, "G_kwargs.synthesis_kwargs.encoder_kwargs.channels": 4,
    "D_kwargs.channel_max": 8, "kimg_per_tick": 0.008, "image_snapshot_ticks": 2, "network_snapshot_ticks": 2,
    "total_kimg": 0.012,
}.items()]  # fmt: skip


def call(command, *args):
    """Output of a command that succeeds."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def picture_folder(path, width, height, count=8):
    path.mkdir()
    rnd = np.random.RandomState(0)
    for i in range(count):
        write_png(path / f"{i}.png", rnd.randint(256, size=[height, width, 3], dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of three steps with all augmentations but the filters."""
    folder = tmp_path_factory.mktemp("wide")
    data = picture_folder(folder / "pictures", WIDTH, HEIGHT)
    training_stats.load_state_dict({})
    call(
        train.build_command(), f"--outdir={folder / 'runs'}", "--cfg=ssn", "--gpus=0", f"--data={data}",
        "--batch=4", "--workers=0", "--aug=fixed", "--p=0.5", "--seed=1", "--lambda-d=5", "--mirror=1", *SMALL,
    )  # fmt: skip
    return next((folder / "runs").iterdir())


@pytest.fixture(scope="module")
def network(run_dir):
    return str(sorted(run_dir.glob("network-snapshot-*.pkl"))[-1])


def test_training_writes_grids_and_snapshots_of_that_shape(run_dir, network):
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert len(lines) >= 2 and all(np.isfinite(line["Loss/D/loss"]["mean"]) for line in lines)
    for name in ["reals.png", "fakes_init.png", "fakes000000.png"]:
        assert read_image(run_dir / name).shape == (HEIGHT * 32, WIDTH * 32, 3)
    assert len(list(run_dir.glob("changes*.png"))) >= 1
    data = snapshot.load_network_pkl(network)
    G = data["G_ema"]
    assert G.img_shape == data["D"].img_shape == [HEIGHT, WIDTH] and G.init_kwargs.img_shape == [
        HEIGHT,
        WIDTH,
    ]
    assert G.img_resolution == data["training_set_kwargs"]["resolution"] == WIDTH
    assert G.latent_grid == [3, 4]
    z = torch.randn(2, G.z_dim)
    assert G(z, None).shape == (2, 3, HEIGHT, WIDTH)


def test_a_plain_network_of_a_square_data_set_keeps_the_family_s_arguments(tmp_path):
    data = picture_folder(tmp_path / "pictures", 16, 16)
    small = [each for each in SMALL if "encoder" not in each]
    training_stats.load_state_dict({})
    call(
        train.build_command(), f"--outdir={tmp_path / 'runs'}", "--cfg=laptop", "--gpus=0", f"--data={data}",
        "--batch=4", "--workers=0", "--aug=noaug", *small, "--set=total_kimg=0.004",
    )  # fmt: skip
    (pkl,) = (tmp_path / "runs").rglob("network-snapshot-*.pkl")
    nets = snapshot.load_network_pkl(pkl)
    for name in ["G", "D", "G_ema"]:
        assert "img_shape" not in nets[name].init_kwargs and nets[name].img_shape == [16, 16]


def test_metrics_count_its_own_blocks(run_dir, network, monkeypatch, tmp_path, own_cache):
    monkeypatch.setattr(metric, "NUM_LATENTS", 6)
    monkeypatch.setattr(floor_metric, "NUM_PICTURES", 40)
    output = call(
        calc_metrics.calc_metrics, f"--network={network}", "--metrics=ldbr_dist,ldbr_floor", "--gpus=0"
    )
    lines = [json.loads(line)["results"] for line in output.splitlines() if line.startswith('{"results"')]
    influence = np.array(lines[0]["ldbr_dist_influence"])
    assert influence.shape == (12, 12) and lines[0]["ldbr_dist"] > 0
    # equal blocks: the mean over the pixels outside is that over the other blocks
    outside = (influence.sum(axis=1) - np.diag(influence)) / 11
    assert lines[0]["ldbr_dist"] == pytest.approx(outside.mean(), rel=1e-3)
    assert lines[1]["ldbr_floor"] >= 0 and (run_dir / "influence.png").is_file()


def test_a_data_set_of_another_shape_is_refused(network, tmp_path):
    data = picture_folder(tmp_path / "flat", WIDTH, 16)
    G = snapshot.load_network_pkl(network)["G_ema"]
    kwargs = dict(class_name="training.dataset.ImageFolderDataset", path=str(data), resolution=WIDTH)
    with pytest.raises(ValueError, match="Pictures of flat are 32x16 pixels, those of the network 32x24"):
        metric_main.calc_metric("ldbr_floor", G=G, dataset_kwargs=kwargs, device="cpu")


def test_a_painted_mask_of_that_shape(network, tmp_path):
    mask = np.zeros([HEIGHT, WIDTH], dtype=np.uint8)
    mask[1:7, 17:23] = 255  # inside block 2: rows 0-7, columns 16-23
    write_png(tmp_path / "eye.png", mask)
    options = [
        f"--network={network}",
        f"--outdir={tmp_path / 'out'}",
        "--device=cpu",
        "--candidates=1",
        "--numbering",
    ]
    output = call(resample.main, *options, f"--mask={tmp_path / 'eye.png'}")
    assert "32x24 pixels, 3x4 blocks" in output
    (folder,) = (tmp_path / "out").iterdir()
    record = json.loads((folder / "seed0000.json").read_text())
    assert record["settings"]["blocks"] == [2] and len(record["candidates"][0]["blocks"]) == 12
    before, after = (
        read_image(folder / name).astype(float) for name in ["seed0000-original.png", "seed0000-1.png"]
    )
    assert before.shape == (HEIGHT, WIDTH, 3)
    square = np.square((after - before) / 127.5).mean(axis=2)
    candidate = record["candidates"][0]
    assert candidate["inside"] == pytest.approx(square[mask > 0].mean(), rel=0.2, abs=1e-3)
    assert candidate["outside"] == pytest.approx(square[mask == 0].mean(), rel=0.2, abs=1e-3)

    write_png(tmp_path / "turned.png", np.ascontiguousarray(mask.T))
    result = CliRunner().invoke(resample.main, [*options, f"--mask={tmp_path / 'turned.png'}"])
    assert result.exit_code != 0
    assert "has 24x32 pixels, the network's pictures have 32x24" in result.output
    height, width = read_image(folder / "seed0000-numbering.png").shape[:2]
    assert height * 4 == width * 3
