# SPDX-License-Identifier: Apache-2.0
"""Grids of latents from end to end, other than 4x4 and several at once: train.py, resample.py, calc_metrics.py."""

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
from ssn_ext import floor_metric, metric
from ssn_ext.blocks import block_masks, parse_grids, replace_blocks, union_mask
from torch_utils import training_stats
from torch_utils.images import read_image, to_uint8, write_png
from training import snapshot
from training.generating import seed_latent

ROOT = pathlib.Path(train.__file__).parent
spec = importlib.util.spec_from_file_location("calc_metrics", ROOT / "calc_metrics.py")
calc_metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calc_metrics)
load_plugins()

RES = 16
SMALL = [f"--set={name}={value}" for name, value in {
    "G_kwargs.synthesis_kwargs.channel_max": 4, "D_kwargs.channel_max": 4, "kimg_per_tick": 0.004,
    "total_kimg": 0.008, "image_snapshot_ticks": 2, "network_snapshot_ticks": 2, "loss_kwargs.dist_interval": 1,
}.items()]  # fmt: skip
GRIDS = [[2, 2], [4, 4]]


def invoke(command, *args):
    return CliRunner().invoke(command, [str(arg) for arg in args])


def call(command, *args):
    """Output of a command that succeeds."""
    result = invoke(command, *args)
    assert result.exit_code == 0, result.output
    return result.output


def trained(folder, *args, width=RES, height=RES):
    """(newest snapshot, run directory) of a run of two steps."""
    data = folder / "pictures"
    data.mkdir(exist_ok=True)
    rnd = np.random.RandomState(0)
    for i in range(8):
        write_png(data / f"{i}.png", rnd.randint(256, size=[height, width, 3], dtype=np.uint8))
    training_stats.load_state_dict({})
    call(
        train.build_command(), f"--outdir={folder / 'runs'}", "--cfg=ssn", "--gpus=0", f"--data={data}",
        "--batch=4", "--workers=0", "--aug=noaug", "--lambda-d=5", "--seed=2", *SMALL, *args,
    )  # fmt: skip
    run_dir = sorted((folder / "runs").iterdir())[-1]
    return sorted(run_dir.glob("network-snapshot-*.pkl"))[-1], run_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(snapshot, run directory) of a network of two grids."""
    return trained(tmp_path_factory.mktemp("two"), "--latent-grids=2x2,4x4", "--metrics=none")


def record(folder, name="seed0000"):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(("grid", "width", "height"), [
    ("2x2", 16, 16), ("8x8", 16, 16), ("16x16", 16, 16), ("4x6", 24, 16), ("1x1,8x8", 16, 16),
])  # fmt: skip
def test_every_grid_trains_and_resamples(grid, width, height, tmp_path):
    """The regulariser has a value, the snapshot has the grid, and a re-drawn block changes what it should."""
    grids = parse_grids(grid)
    option = f"--latent-grids={grid}" if len(grids) > 1 else f"--latent-grid={grid}"
    pkl, run_dir = trained(tmp_path, option, width=width, height=height)
    last = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    assert last["Loss/distortion"]["mean"] > 0 and np.isfinite(last["Loss/G/loss"]["mean"])
    G = snapshot.load_network_pkl(pkl)["G_ema"]
    assert G.latent_grids == grids and G.z_dim == 64 * sum(h * w for h, w in grids)
    assert len(list(run_dir.glob("changes*.png"))) >= 1
    blocks = f"{len(grids) - 1}:row0,1"
    call(resample.main, f"--network={pkl}", f"--outdir={tmp_path / 'out'}", "--device=cpu", "--candidates=1",
         f"--blocks={blocks}", "--numbering")  # fmt: skip
    (folder,) = (tmp_path / "out").iterdir()
    result, (rows, columns) = record(folder), grids[-1]
    first = sum(h * w for h, w in grids[:-1])
    assert result["settings"]["blocks"] == [first + i for i in range(max(columns, 2))]
    z = replace_blocks(seed_latent(0, G.z_dim), seed_latent(result["candidates"][0]["donor"], G.z_dim),
                       result["settings"]["blocks"], grids)  # fmt: skip
    want = to_uint8(G(z, None, noise_mode="const"))[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(read_image(folder / "seed0000-1.png") - want).max() <= 1
    assert len(result["candidates"][0]["blocks"]) == first + rows * columns


def test_options_reach_the_networks(two):
    pkl, run_dir = two
    assert run_dir.name == "00000-pictures-ssn-batch4-noaug-lambda5-grids2x2,4x4"
    kwargs = json.loads((run_dir / "training_options.json").read_text())["G_kwargs"]
    assert (kwargs["latent_grids"], kwargs["grid_splits"]) == (GRIDS, [8])
    assert "latent_grid" not in kwargs and kwargs["z_dim"] == kwargs["w_dim"] == 64 * 20
    G = snapshot.load_network_pkl(pkl)["G_ema"]
    assert (G.latent_grids, G.grid_splits, G.latent_grid) == (GRIDS, [8], [1, 20])


def test_a_new_run_keeps_or_changes_the_grids_of_its_source(two, tmp_path):
    pkl, run_dir = two
    data = f"--data={run_dir.parents[1] / 'pictures'}"

    def planned(*args):
        text = call(train.build_command(), "--outdir=/nowhere", "--cfg=ssn", "--gpus=0", data, "--dry-run",
                    f"--resume={pkl}", *args).split("Training options:\n")[1]  # fmt: skip
        kwargs = json.loads(text[: text.index("\n}\n") + 2])["G_kwargs"]
        return (
            kwargs.get("latent_grid"),
            kwargs.get("latent_grids"),
            kwargs.get("grid_splits"),
            kwargs["z_dim"],
        )

    assert planned() == (None, GRIDS, [8], 64 * 20)
    assert planned("--grid-split=16") == (None, GRIDS, [16], 64 * 20)
    assert planned("--latent-grids=1x1,2x2,8x8") == (None, [[1, 1], [2, 2], [8, 8]], [8, 16], 64 * 69)
    assert planned("--latent-grid=4x4") == planned("--latent-grids=4x4") == ([4, 4], None, None, 64 * 16)
    refused = invoke(
        train.build_command(), "--outdir=/nowhere", "--cfg=spade", data, "--dry-run", f"--resume={pkl}"
    )
    assert "--cfg=spade knows one grid of latents: say which, as --latent-grid=4x4" in refused.output
    # and the transfer takes every weight
    again, _ = trained(
        run_dir.parents[1], f"--resume={pkl}", "--latent-grids=2x2,8x8", "--set=total_kimg=0.004"
    )
    G = snapshot.load_network_pkl(again)["G_ema"]
    assert G.latent_grids == [[2, 2], [8, 8]] and G.grid_splits == [16]


@pytest.mark.parametrize(("args", "message"), [
    (["--latent-grids=8x8,4x4"], "--latent-grids=8x8,4x4: grids go from coarse to fine, not 8x8 before 4x4"),
    (["--latent-grids=4x4,4x4"], "not 4x4 before 4x4"),
    (["--latent-grids=2x4,4x2"], "not 2x4 before 4x2"),
    (["--latent-grids=4x4,8"], "--latent-grids=8: expected rows x columns, such as 4x4"),
    (["--latent-grids=4x4,64x64"], "--latent-grids: 64 rows of 64 blocks do not fit into 32x32 pixels"),
    (["--latent-grids=4x4,8x8", "--latent-grid=4x4"], "--latent-grid and --latent-grids both say"),
    (["--grid-split=8"], "--grid-split divides the layers between several grids: see --latent-grids"),
    (["--latent-grids=4x4,8x8", "--grid-split=4"], "--grid-split=4: 4x4,8x8 takes 1 rising resolution of 8,16,32"),
    (["--latent-grids=4x4,8x8", "--grid-split=8,16"], "--grid-split=8,16: 4x4,8x8 takes 1 rising resolution of"),
    (["--latent-grids=2x2,4x4,8x8", "--grid-split=16,8"], "2x2,4x4,8x8 takes 2 rising resolutions of 8,16,32"),
    (["--latent-grids=4x4,8x8", "--cfg=spade"], "--cfg=spade knows one grid of latents: say which"),
    (["--latent-grids=4x4,16x16,32x32"], "--grid-split=32,32: 4x4,16x16,32x32 takes 2 rising resolutions of"),
])  # fmt: skip
def test_grids_that_cannot_be(args, message):
    result = invoke(
        train.build_command(), "--outdir=/nowhere", "--data=demo", "--cfg=ssn", "--dry-run", *args
    )
    assert result.exit_code == 2 and message in result.output


def test_blocks_of_both_grids_together(two, tmp_path):
    """What is written is what the network says of these blocks; both grids are numbered; the next edit goes on."""
    G = snapshot.load_network_pkl(two[0])["G_ema"]
    common = [f"--outdir={tmp_path}", f"--network={two[0]}", "--device=cpu", "--candidates=2"]
    output = call(resample.main, *common, "--blocks=0:1,1:row3", "--numbering")
    assert (
        "16x16 pixels, 2x2,4x4 blocks" in output and "blocks 0:1, 1:12, 1:13, 1:14, 1:15 re-drawn" in output
    )
    (folder,) = tmp_path.iterdir()
    assert folder.name == "00000-blocks0_1_1_row3"
    result = record(folder)
    assert result["settings"]["blocks"] == [1, 16, 17, 18, 19] and result["network"]["grids"] == GRIDS
    before = G(seed_latent(0, G.z_dim), None, noise_mode="const").clamp(-1, 1)
    mask = union_mask([1, 16, 17, 18, 19], GRIDS, [RES, RES])
    assert mask[:8, 8:].all() and mask[12:].all() and int(mask.sum()) == 64 + 64
    for each in result["candidates"]:
        z = replace_blocks(
            seed_latent(0, G.z_dim), seed_latent(each["donor"], G.z_dim), [1, 16, 17, 18, 19], GRIDS
        )
        square = (G(z, None, noise_mode="const").clamp(-1, 1) - before).square().mean(dim=1)[0]
        assert each["inside"] == pytest.approx(float(square[mask].mean()), rel=1e-3)
        assert each["outside"] == pytest.approx(float(square[~mask].mean()), rel=1e-3)
        masks = block_masks(GRIDS, [RES, RES])
        assert each["blocks"] == pytest.approx([float(square[m].mean()) for m in masks], rel=1e-3)
    height, width = read_image(folder / "seed0000-numbering.png").shape[:2]
    assert width > 2 * 0.8 * height  # two pictures side by side
    call(resample.main, *common, f"--from={folder}", "--pick=2", "--blocks=all")
    last = record(sorted(tmp_path.iterdir())[-1])
    assert last["settings"]["blocks"] == list(range(20)) and last["history"][0]["blocks"] == [
        1,
        16,
        17,
        18,
        19,
    ]


def test_a_mask_takes_the_blocks_of_all_grids(two, tmp_path):
    mask = np.zeros([RES, RES], dtype=np.uint8)
    mask[9:11, 1:7] = 255  # block 2 of the coarse grid, 8 and 9 of the fine one
    write_png(tmp_path / "mouth.png", mask)
    call(resample.main, f"--outdir={tmp_path / 'out'}", f"--network={two[0]}", "--device=cpu", "--candidates=1",
         f"--mask={tmp_path / 'mouth.png'}")  # fmt: skip
    (folder,) = (tmp_path / "out").iterdir()
    assert record(folder)["settings"]["blocks"] == [2, 4 + 8, 4 + 9]


def test_a_number_without_its_grid_is_refused(two, tmp_path):
    result = invoke(
        resample.main, f"--outdir={tmp_path}", f"--network={two[0]}", "--device=cpu", "--blocks=3"
    )
    assert result.exit_code != 0
    assert "'3' is of which grid? write '0:...' for 2x2 or '1:...' for 4x4" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_knows_its_runs(two):
    from types import SimpleNamespace

    from ssn_ext.sweep import plan

    assert plan.is_spatial(SimpleNamespace(run_dir=lambda: str(two[1])), None)


def test_figures_of_blocks_of_both_grids(two, tmp_path):
    from ssn_ext import paper_figures

    output = call(paper_figures.main, "rows", f"--network={two[0]}", f"--out={tmp_path / 'rows.png'}", "--seeds=0,1",
                  "--blocks=0:1", "--blocks=1:row3")  # fmt: skip
    assert "block 0:1: mean squared change" in output and "blocks 1:12, 1:13, 1:14, 1:15: mean" in output
    assert (tmp_path / "rows.png").is_file()


def test_metrics_are_given_by_grid(two, monkeypatch, own_cache):
    monkeypatch.setattr(metric, "NUM_LATENTS", 4)
    monkeypatch.setattr(floor_metric, "NUM_PICTURES", 30)
    output = call(
        calc_metrics.calc_metrics, f"--network={two[0]}", "--metrics=ldbr_dist,ldbr_floor", "--gpus=0"
    )
    lines = [json.loads(line)["results"] for line in output.splitlines() if line.startswith('{"results"')]
    for grid, count in [("2x2", 4), ("4x4", 16)]:
        influence = np.array(lines[0][f"ldbr_dist_influence_{grid}"])
        outside = (influence.sum(axis=1) - np.diag(influence)) / (count - 1)
        assert lines[0][f"ldbr_dist_{grid}"] == pytest.approx(outside.mean(), rel=1e-3)
        assert 0 < lines[1][f"ldbr_floor_share_{grid}"] < 1.5 and lines[1][f"ldbr_floor_own_{grid}"] >= 0
        assert (two[1] / f"influence_{grid}.png").is_file()
    assert lines[0]["ldbr_dist"] == pytest.approx((lines[0]["ldbr_dist_2x2"] + lines[0]["ldbr_dist_4x4"]) / 2)


def test_its_pickle_opens_both_ways(two):
    """A snapshot opens through the restricted reader with the picture that plain unpickling gives."""
    import pickle

    with open(two[0], "rb") as f:
        theirs = pickle.load(f)["G_ema"]
    ours = snapshot.load_network_pkl(two[0])["G_ema"]
    z = torch.randn(2, ours.z_dim)
    assert torch.equal(ours(z, None, noise_mode="const"), theirs(z, None, noise_mode="const"))
