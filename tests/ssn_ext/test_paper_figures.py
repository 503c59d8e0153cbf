# SPDX-License-Identifier: Apache-2.0
"""The paper's figures with small networks: the same pictures as resample.py, seams of known strength, refusals."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import resample
from ssn_ext import figures, paper_figures
from ssn_ext.networks import SpatialGenerator
from torch_utils.images import read_image
from training.networks import Generator
from training.snapshot import save_network_pkl

GAP = figures.GAP


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A small SSN with noise."""
    torch.manual_seed(0)
    G = SpatialGenerator(
        z_dim=32, c_dim=0, w_dim=32, img_resolution=16, img_channels=3, latent_grid=[2, 2],
        mapping_kwargs=dict(num_layers=2), synthesis_kwargs=dict(channel_base=128, channel_max=8),
    )  # fmt: skip
    for module in G.modules():
        if hasattr(module, "noise_strength"):
            module.noise_strength.data.fill_(0.2)
    path = str(tmp_path_factory.mktemp("network") / "ssn.pkl")
    save_network_pkl(path, G=G, D=None, G_ema=G.eval().requires_grad_(False))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small StyleGAN2, without a grid."""
    torch.manual_seed(0)
    G = Generator(
        8,
        0,
        8,
        32,
        1,
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(channel_base=128, channel_max=8),
    )
    path = str(tmp_path_factory.mktemp("plain") / "stylegan2.pkl")
    save_network_pkl(path, G=G, D=None, G_ema=G.eval().requires_grad_(False))
    return path


@pytest.fixture
def draw(tmp_path):
    """Calls a figure's command; returns (picture, output)."""

    def call(*args, out="figure.png"):
        path = tmp_path / "new" / out
        result = CliRunner().invoke(paper_figures.main, [*args, f"--out={path}", "--device=cpu"])
        assert result.exit_code == 0, result.output
        assert f"Wrote {path}" in result.output
        return read_image(path, "RGB"), result.output

    return call


def cell(sheet, row_upper, column, size):
    """The pixels of one cell of a sheet."""
    left = GAP + column * (size + GAP)
    return sheet[row_upper : row_upper + size, left : left + size]


# --- seams --------------------------------------------------------------------------------------------------


def test_seam_energy_of_a_step():
    """A block brighter by d on a flat picture has d^2 on every pair of its border; a ramp has its slope^2 across."""
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 3:6] = True
    flat = torch.zeros(3, 6, 8)
    step = torch.where(mask, flat + torch.tensor([0.5, 1.0, 0.0])[:, None, None], flat)
    assert paper_figures.seam_energy(flat, mask) == 0
    assert paper_figures.seam_energy(step, mask) == pytest.approx((0.25 + 1) / 3)
    ramp = 0.1 * torch.arange(8.0).expand(
        1, 6, 8
    )  # across: 2 rows x 2 sides of the block; down: 0 on 3 x 2 pairs
    assert paper_figures.seam_energy(ramp, mask) == pytest.approx(0.01 * 4 / 10)
    assert paper_figures.seam_energy(step, torch.ones(6, 8, dtype=torch.bool)) == 0


def test_summary_of_seams():
    """Equal ratios have no error; others that of leaving out one picture at a time, to first order."""
    alike = [{"before": b, "pasted": 3 * b} for b in (0.5, 1.0, 2.0)]
    assert paper_figures.summarise_seams(alike) == {"pasted": (pytest.approx(3), pytest.approx(0, abs=1e-12))}
    rnd = np.random.RandomState(0)
    before, pasted = 1 + 0.3 * rnd.rand(400), 2 + rnd.rand(400)
    got = paper_figures.summarise_seams(
        [{"before": b, "pasted": p} for b, p in zip(before, pasted, strict=True)]
    )
    left_out = (pasted.sum() - pasted) / (before.sum() - before)
    jackknife = np.sqrt(399 / 400 * np.square(left_out - left_out.mean()).sum())
    assert got["pasted"] == (pytest.approx(pasted.sum() / before.sum()), pytest.approx(jackknife, rel=0.01))
    flat = paper_figures.summarise_seams([{"before": 0.0, "pasted": 1.0}])["pasted"]
    assert np.isnan(flat).all()


def test_pasting_leaves_the_rest_bit_for_bit():
    torch.manual_seed(0)
    old, new = torch.randn(2, 3, 8, 8)
    mask = torch.rand(8, 8) < 0.4
    pasted = paper_figures.paste(old, new, mask)
    assert torch.equal(pasted[:, ~mask], old[:, ~mask]) and torch.equal(pasted[:, mask], new[:, mask])


# --- figures ------------------------------------------------------------------------------------------------


def test_rows(draw, snapshot, tmp_path):
    """Originals, re-drawn pictures and changes, pixel for pixel those of resample.py; twice the same file."""
    args = ["rows", f"--network={snapshot}", "--seeds=3,5", "--blocks=1", "--blocks=row1", "--candidate=2"]
    sheet, output = draw(*args)
    again, _output = draw(*args, out="again.png")
    assert np.array_equal(sheet, again)
    size = 128  # 16 pixels enlarged by 8
    uppers = [GAP, 2 * GAP + 18 + size, 3 * GAP + 36 + 2 * size]
    inside = []
    for column, seed in enumerate([3, 5]):
        call = ["--blocks=1", "--candidates=2", f"--seeds={seed}", f"--network={snapshot}", "--device=cpu"]
        outdir = tmp_path / f"out{seed}"
        assert CliRunner().invoke(resample.main, [*call, f"--outdir={outdir}"]).exit_code == 0
        (folder,) = outdir.iterdir()
        original = read_image(folder / f"seed{seed:04d}-original.png")
        redrawn = read_image(folder / f"seed{seed:04d}-2.png")
        assert np.array_equal(cell(sheet, uppers[0], column, size), figures.magnify(original, 8))
        assert np.array_equal(cell(sheet, uppers[1], column, size), figures.magnify(redrawn, 8))
        mask = np.zeros([16, 16], dtype=bool)
        mask[:8, 8:] = True
        change = cell(sheet, uppers[2], column, size)
        accent = (change == figures.ACCENT).all(axis=2)
        assert accent.any() and not accent[~figures.enlarge(mask, 8)].any()
        inside.append(np.square((redrawn.astype(float) - original) / 127.5)[mask].mean())
    printed = float(output.split("block 1: mean squared change inside ")[1].split(",")[0])
    assert printed == pytest.approx(np.mean(inside), rel=0.05)
    assert "blocks 2, 3: mean squared change inside" in output


def test_adapt(draw, snapshot):
    """Cells of the figure, and the seams it prints, from the edit itself."""
    sheet, output = draw("adapt", f"--network={snapshot}", "--seeds=0-1", "--blocks=0")
    from training.generating import load_generator

    G = load_generator(snapshot, "cpu")
    edits = [paper_figures.make_edit(G, seed, [0]) for seed in (0, 1)]
    size, upper = 192, GAP + 26  # below the title
    pasted = edits[0].before.clone()
    pasted[:, :8, :8] = edits[0].after[:, :8, :8]
    donor = edits[0].before.clone()
    donor[:, :8, :8] = edits[0].donor[:, :8, :8]
    for column, picture in [(1, edits[0].after), (3, pasted), (4, donor)]:
        expected = figures.magnify(paper_figures.pixels(picture), 12)
        assert np.array_equal(cell(sheet, upper, column, size), expected)
    assert (cell(sheet, upper, 2, size)[20:70, 20:70] == paper_figures.BLANK).all()  # the block is left out
    total = {"before": 0.0, "pasted": 0.0}
    for edit in edits:
        for name, picture in [
            ("before", edit.before),
            ("pasted", torch.where(edit.mask, edit.after, edit.before)),
        ]:
            steps = (picture[:, :8, 7] - picture[:, :8, 8]).square().mean() * 8
            steps = steps + (picture[:, 7, :8] - picture[:, 8, :8]).square().mean() * 8
            total[name] += float(steps) / 16
    assert f"seam, pasted: {total['pasted'] / total['before']:.2f}" in output
    assert torch.equal(edits[0].before, edits[0].before.clamp(-1, 1))
    many, output = draw("adapt", f"--network={snapshot}", "--seeds=0-8", "--blocks=0", out="many.png")
    assert many.shape[0] == upper + 8 * (size + 36 + GAP) + 26
    assert "It shows the first 8 of 9 pictures." in output


def test_droplets(draw, snapshot, plain):
    """Several networks, with and without a grid; the number under a map is its peak over its mean."""
    sheet, output = draw("droplets", f"--network={snapshot}", f"--network={plain}", "--seeds=0-1")
    assert f"1: SpatialGenerator, {snapshot}" in output and f"2: Generator, {plain}" in output
    side = 192
    layers = 7  # of the larger network: b4.conv1 to b32.conv1
    assert sheet.shape[1] == GAP + (layers + 1) * (side + GAP)
    assert sheet.shape[0] == GAP + 26 + 4 * (side + 36 + GAP) + 26
    lone, _output = draw("droplets", f"--network={plain}", "--seeds=1", out="lone.png")
    first = cell(lone, GAP + 26, 0, side)
    assert np.array_equal(first[:, :, 0], first[:, :, 1])  # grey


def test_droplet_figure_shows_multiples_of_the_mean():
    norms = torch.ones(4, 4)
    norms[1, 2] = 6  # mean 21 / 16, peak 32 / 7
    sheet = paper_figures.droplet_figure([("x", torch.zeros(3, 8, 8), {"layer": norms})])
    shown = cell(sheet, GAP + 26, 1, 192)
    top = figures.heat(np.array([1.0]))[0]
    assert (shown[48:96, 96:144] == top).all()
    rest = figures.heat(np.array([1 / 6]))[0]
    assert (shown[:48] == rest).all() and (shown[96:] == rest).all()


def test_large_maps_are_shrunk_and_keep_their_peaks():
    values = np.zeros([1024, 512])
    values[7, 9] = 3
    small = paper_figures._shrunk(values)
    assert small.shape == (256, 128) and small[1, 2] == 3 and small.sum() == 3
    picture = paper_figures._shrunk(np.tile(np.array([10, 30], dtype=np.uint8), (512, 256))[:, :, None])
    assert picture.shape == (256, 256, 1) and (picture == 20).all()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["rows", "--blocks=1", "--out=a.jpg"], "--out=a.jpg: the name must end in .png"),
        (["rows", "--blocks=4"], "'4' is outside the 2x2 grid: blocks are 0 to 3"),
        (["rows"], "Missing option '--blocks'"),
        (["adapt", "--blocks=all"], "--blocks=all is the whole picture: nothing is left that could adapt"),
        (["droplets", "--class=1"], "--class is of no use here: the network is unconditional"),
    ],
)
def test_mistakes(args, message, snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(paper_figures.main, [args[0], f"--network={snapshot}", *args[1:]])
    assert result.exit_code != 0 and message in result.output
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(draw, snapshot, tmp_path):
    args = ["rows", f"--network={snapshot}", "--seeds=0", "--blocks=1"]
    first, _output = draw(*args)
    path = tmp_path / "new" / "figure.png"
    result = CliRunner().invoke(paper_figures.main, [*args, f"--out={path}"])
    assert (
        result.exit_code == 1 and f"--out={path} is there already; --overwrite replaces it" in result.output
    )
    other, _output = draw("rows", f"--network={snapshot}", "--seeds=1", "--blocks=1", "--overwrite")
    assert not np.array_equal(first, other)


def test_a_network_without_a_grid(plain, tmp_path):
    result = CliRunner().invoke(
        paper_figures.main, ["rows", f"--network={plain}", "--blocks=1", f"--out={tmp_path / 'a.png'}"]
    )
    assert result.exit_code == 1 and "train one with train.py --cfg=ssn" in result.output
