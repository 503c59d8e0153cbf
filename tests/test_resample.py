# SPDX-License-Identifier: Apache-2.0
"""resample.py end to end with a small network: what it writes, how one goes on, what it refuses."""

import json
import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import resample
from ssn_ext import ranking
from ssn_ext.blocks import block_masks, replace_blocks, union_mask
from ssn_ext.distortion import discriminator_features, masked_emd, masked_features
from ssn_ext.networks import SpatialGenerator
from torch_utils.images import read_image, to_uint8, write_png
from training import generating
from training.networks import Discriminator, Generator
from training.snapshot import save_network_pkl

GRID, RES = [2, 2], 16


def network(path, seed=0, c_dim=0):
    """Writes a snapshot of a small untrained generator and returns (path, generator)."""
    torch.manual_seed(seed)
    G = SpatialGenerator(
        z_dim=32,
        c_dim=c_dim,
        w_dim=32,
        img_resolution=RES,
        img_channels=3,
        latent_grid=GRID,
        mapping_kwargs={"num_layers": 2},
        synthesis_kwargs={"channel_base": 128, "channel_max": 8},
    )
    for module in G.modules():
        if hasattr(module, "noise_strength"):
            module.noise_strength.data.fill_(0.2)  # so that the noise modes differ
    G = G.eval().requires_grad_(False)
    save_network_pkl(path, G=G, D=None, G_ema=G)
    return path, G


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return network(str(tmp_path_factory.mktemp("network") / "ssn.pkl"))


@pytest.fixture
def run(snapshot, tmp_path, monkeypatch):
    """Calls the script with its outdir in a fresh place and the small network; returns (folder, output)."""
    monkeypatch.setattr(resample, "DEMO_NETWORK", snapshot[0])

    def call(*args):
        result = CliRunner().invoke(resample.main, [f"--outdir={tmp_path / 'out'}", "--device=cpu", *args])
        assert result.exit_code == 0, result.output
        written = [line.split()[1] for line in result.output.splitlines() if line.startswith("Wrote ")]
        return pathlib.Path(written[0]), result.output

    return call


def test_the_next_command_can_be_copied(run, tmp_path):
    folder = tmp_path / "Mein schöner Ordner"
    result = CliRunner().invoke(resample.main, ["--blocks=0", "--candidates=1", f"--outdir={folder}"])
    command = shlex.split(result.output.splitlines()[-1].split(":  ")[1])
    assert command[:2] == ["python", "resample.py"] and command[-1] == "--blocks=..."
    run(*command[2:-1], "--blocks=1")


def record(folder, name="seed0000"):
    return json.loads((folder / f"{name}.json").read_text())


def latents(folder, name="seed0000"):
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def z_of(seed):
    return torch.from_numpy(np.random.RandomState(seed).randn(1, 32))


def pixels(images):
    return to_uint8(images)[0].permute(1, 2, 0).numpy()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_call_writes_what_the_network_says(snapshot, run):
    G = snapshot[1]
    folder, output = run("--blocks=1,2", "--candidates=3", "--numbering")
    result = record(folder)
    assert folder.name == "00000-blocks1_2" and [each["number"] for each in result["candidates"]] == [1, 2, 3]
    before = G(z_of(0), None, noise_mode="const")
    assert (read_image(folder / "seed0000-original.png") == pixels(before)).all()
    masks = block_masks(GRID, [RES, RES])
    for each in result["candidates"]:
        z = replace_blocks(z_of(0), z_of(each["donor"]), [1, 2], GRID)
        after = G(z, None, noise_mode="const")
        assert np.abs(read_image(folder / each["image"]).astype(int) - pixels(after)).max() <= 1
        square = (after.clamp(-1, 1) - before.clamp(-1, 1)).square().mean(dim=1)[0]
        assert each["blocks"] == pytest.approx([square[mask].mean().item() for mask in masks], rel=1e-3)
        assert each["inside"] == pytest.approx(square[masks[1] | masks[2]].mean().item(), rel=1e-3)
        assert each["outside"] == pytest.approx(square[masks[0] | masks[3]].mean().item(), rel=1e-3)
        assert each["ratio"] == pytest.approx(each["inside"] / each["outside"])
        torch.testing.assert_close(latents(folder)["z"][each["number"]], z[0].float())
    assert {"seed0000-grid.png", "seed0000-numbering.png"} <= {path.name for path in folder.iterdir()}
    assert str(folder) in output and "--pick=1" in output
    assert f"{result['candidates'][0]['outside']:.4f}" in output


def test_an_edit_goes_on_from_a_candidate_and_keeps_its_history(snapshot, run):
    first, _ = run("--blocks=0", "--seeds=0,7", "--candidates=2")
    second, _ = run(f"--from={first}", "--pick=2", "--blocks=row1")
    third, _ = run(f"--from={second / 'seed0007.json'}", "--pick=0", "--blocks=0")
    assert second.name == "00001-row1-from00000-pick2"
    assert third.name == "00002-blocks0-from00001-pick0"
    for name in ("seed0000", "seed0007"):
        assert (second / f"{name}-original.png").read_bytes() == (first / f"{name}-2.png").read_bytes()
    assert (third / "seed0007-original.png").read_bytes() == (second / "seed0007-original.png").read_bytes()
    assert not (third / "seed0000.json").exists()
    history = record(third, "seed0007")["history"]
    assert [step["pick"] for step in history] == [2, 0]
    assert [(third / step["result"]).resolve() for step in history] == [
        each / "seed0007.json" for each in (first, second)
    ]
    z = z_of(7)
    for step in history:
        if step["pick"]:
            z = replace_blocks(z, z_of(step["donor"]), step["blocks"], GRID)
    assert torch.equal(z.float(), latents(third, "seed0007")["z"][:1])
    donors = {record(each, "seed0007")["candidates"][0]["donor"] for each in (first, second, third)}
    assert len(donors) == 3  # going on draws anew, from the original too


def test_earlier_work_is_kept_and_the_same_call_is_the_same_work(run):
    first, _ = run("--blocks=3")
    before = content(first)
    others = [
        run("--blocks=3", *more)[0] for more in (["--candidates=2"], ["--candidate-seed=1"], ["--trunc=0.5"])
    ]
    assert len({first, *others}) == 4 and content(first) == before
    assert run("--blocks=3")[0] == first and content(first) == before
    assert run("--blocks=3", "--seeds=4")[0] == first
    assert {name: data for name, data in content(first).items() if "seed0000" in name} == before
    few, many = record(others[0])["candidates"], record(first)["candidates"]
    assert many[:2] == few
    assert {each["donor"] for each in record(others[1])["candidates"]}.isdisjoint(
        each["donor"] for each in many
    )


def test_all_blocks_swapped_one_call_after_the_other_give_the_other_seed(snapshot, run):
    folder, _ = run("--blocks=0", "--swap=9")
    for block in (3, 1, 2):
        folder, _ = run(f"--from={folder}", "--pick=1", f"--blocks={block}", "--swap=9")
    assert torch.equal(latents(folder)["ws"][1:], snapshot[1].mapping(z_of(9), None))
    assert (
        read_image(folder / "seed0000-1.png") == pixels(snapshot[1](z_of(9), None, noise_mode="const"))
    ).all()


def test_truncation_and_noise_are_passed_on(snapshot, run):
    first, _ = run("--blocks=0", "--trunc=0.5", "--noise-mode=random", "--candidates=1")
    again, _ = run(f"--from={first}", "--pick=1", "--blocks=1", "--candidates=1")
    assert record(again)["settings"]["trunc"] == 0.5 and record(again)["settings"]["noise_mode"] == "random"
    assert (again / "seed0000-original.png").read_bytes() == (first / "seed0000-1.png").read_bytes()
    z = latents(again)["z"]
    torch.testing.assert_close(latents(again)["ws"], snapshot[1].mapping(z, None, truncation_psi=0.5))


def test_a_painted_mask_is_measured_itself(snapshot, run, tmp_path):
    mask = np.zeros((RES, RES), dtype=np.uint8)
    mask[2:5, 3:8] = 255
    alpha = np.concatenate([np.full([RES, RES, 3], 255, np.uint8), mask[:, :, np.newaxis]], axis=2)
    write_png(tmp_path / "Left eye.png", alpha)  # white everywhere, but seen only in places
    folder, _ = run(f"--mask={tmp_path / 'Left eye.png'}", "--candidates=1")
    result = record(folder)
    assert folder.name == "00000-mask-left_eye" and result["settings"]["blocks"] == [0]
    before, after = snapshot[1].synthesis(latents(folder)["ws"], noise_mode="const").clamp(-1, 1)
    square = (after - before).square().mean(dim=0).numpy()
    assert result["candidates"][0]["inside"] == pytest.approx(square[mask > 0].mean(), rel=1e-3)
    assert result["candidates"][0]["outside"] == pytest.approx(square[mask == 0].mean(), rel=1e-3)


@pytest.fixture(scope="module")
def judged(snapshot, tmp_path_factory):
    """The same generator in a snapshot with a discriminator: (path, D)."""
    torch.manual_seed(1)
    D = Discriminator(c_dim=0, img_resolution=RES, img_channels=3, channel_base=128, channel_max=8)
    path = str(tmp_path_factory.mktemp("judged") / "ssn.pkl")
    save_network_pkl(path, G=snapshot[1], D=D, G_ema=snapshot[1])
    return path, D.eval().requires_grad_(False)


@pytest.mark.parametrize("by", ranking.BY)
def test_the_best_candidates_are_shown_in_order(snapshot, judged, run, by):
    """All are scored in the JSON and can be gone on from; the best have pictures, which are the candidates' own."""
    plain, _ = run("--blocks=1,2", "--candidates=6")
    folder, output = run("--blocks=1,2", "--candidates=6", "--best=2", f"--by={by}", f"--network={judged[0]}")
    assert folder.name == f"00001-blocks1_2-by-{by}"
    result = record(folder)
    candidates = result["candidates"]
    assert [each["donor"] for each in candidates] == [each["donor"] for each in record(plain)["candidates"]]
    assert (result["settings"]["by"], result["settings"]["best"]) == (by, 2)
    assert sorted(each["rank"] for each in candidates) == [1, 2, 3, 4, 5, 6]
    ranked = sorted(candidates, key=lambda each: each["rank"])
    scores = [each["scores"][by] for each in ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 6
    shown = [each["number"] for each in ranked[:2]]
    pictures = {f"seed0000-{name}.png" for name in ["original", "grid", *shown]}
    assert {path.name for path in folder.glob("*.png")} == pictures
    for number in shown:
        name = f"seed0000-{number}.png"
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    assert [each["image"] is None for each in ranked] == [False] * 2 + [True] * 4
    lines = [line for line in output.splitlines() if line.split()[:1] in ([str(n)] for n in range(1, 7))]
    assert [int(line.split()[0]) for line in lines] == shown
    assert [float(line.split()[-1]) for line in lines] == pytest.approx(scores[:2], rel=1e-3)
    assert f"Go on from candidate {shown[0]}: " in output
    again, _ = run(f"--from={folder}", f"--pick={ranked[-1]['number']}", "--blocks=0", "--candidates=1")
    assert torch.equal(latents(again)["ws"][0], latents(folder)["ws"][ranked[-1]["number"]])


def test_scores_are_what_they_say(snapshot, judged, run):
    """locality: change inside by change outside; diversity: the first is the largest change inside; realism: D's logit
    beside three pictures of the last seeds; features: those of D."""
    folder, _ = run("--blocks=1,2", "--candidates=4", "--best=1", f"--network={judged[0]}")
    result = record(folder)
    assert result["settings"]["by"] == "realism"
    G, D = snapshot[1], judged[1]
    others = torch.cat([G(z_of(2**32 - 1 - i), None, noise_mode="const") for i in range(3)])
    pictures = G.synthesis(latents(folder)["ws"], noise_mode="const")
    clamped = pictures.clamp(-1, 1)
    outside = ~union_mask([1, 2], GRID, (RES, RES))
    for each, picture in zip(result["candidates"], pictures[1:], strict=True):
        assert each["scores"]["locality"] == each["ratio"] == pytest.approx(each["inside"] / each["outside"])
        logit = D(torch.cat([picture[None], others]), None)[0]
        assert each["scores"]["realism"] == pytest.approx(logit.item(), rel=1e-3, abs=1e-4)
        after = clamped[each["number"]][None]
        emd = masked_emd(clamped[:1], after, outside, GRID)
        assert each["emd_outside"] == pytest.approx(float(emd), rel=1e-3)
        features = masked_features(clamped[:1], after, outside, lambda x: discriminator_features(D, x))
        assert each["features_outside"] == pytest.approx(float(features), rel=1e-3)
    diversity = [each["scores"]["diversity"] for each in result["candidates"]]
    assert max(diversity) == pytest.approx(max(each["inside"] for each in result["candidates"]))


def test_ranking_by_change_needs_no_discriminator(run):
    folder, _ = run("--blocks=0", "--candidates=3", "--by=locality")
    candidates = record(folder)["candidates"]
    assert all(each["image"] and "realism" not in each["scores"] for each in candidates)
    assert "features_inside" not in candidates[0] and candidates[0]["emd_inside"] > 0


@pytest.mark.parametrize("kind", ["grey", "palette", "deep"])
def test_a_label_map_chooses_its_values(run, tmp_path, kind):
    """The same blocks and the same numbers as with the mask painted by hand."""
    labels = np.zeros((RES, RES), dtype=np.uint8)
    labels[2:5, 3:8], labels[9:, 9:], labels[0, 15] = 3, 5, 7
    image = PIL.Image.fromarray(labels.astype(np.uint16) * 100 if kind == "deep" else labels)
    if kind == "palette":
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(tmp_path / "map.png")
    write_png(tmp_path / "painted.png", np.isin(labels, [3, 5]).astype(np.uint8) * 255)
    values = "300,500" if kind == "deep" else "3,5"
    folder, _ = run(f"--mask={tmp_path / 'map.png'}", f"--label={values}", "--candidates=1")
    painted, _ = run(f"--mask={tmp_path / 'painted.png'}", "--candidates=1")
    assert folder.name == "00000-mask-map-" + values.replace(",", "_") and folder == painted
    assert record(folder)["settings"]["blocks"] == [0, 3]
    assert record(folder)["candidates"] == record(painted)["candidates"]


def test_wide_networks_take_wide_masks(run, tmp_path):
    """8x16 pixels, 2x4 blocks: a label map of its shape is measured itself, one of another shape refused."""
    torch.manual_seed(0)
    G = SpatialGenerator(
        z_dim=16, c_dim=0, w_dim=16, img_resolution=16, img_channels=3, latent_grid=[2, 4], img_shape=[8, 16],
        mapping_kwargs={"num_layers": 1}, synthesis_kwargs={"channel_base": 64, "channel_max": 8},
    )  # fmt: skip
    G = G.eval().requires_grad_(False)
    D = Discriminator(
        c_dim=0, img_resolution=16, img_channels=3, img_shape=[8, 16], channel_base=64, channel_max=8
    )
    save_network_pkl(tmp_path / "wide.pkl", G=G, D=D, G_ema=G)
    labels = np.zeros((8, 16), dtype=np.uint8)
    labels[5:8, 9:14] = 2
    write_png(tmp_path / "map.png", labels)
    network = f"--network={tmp_path / 'wide.pkl'}"
    folder, _ = run(network, f"--mask={tmp_path / 'map.png'}", "--label=2", "--candidates=3", "--best=2")
    result = record(folder)
    assert result["settings"]["blocks"] == [6, 7]
    pictures = G.synthesis(latents(folder)["ws"], noise_mode="const").clamp(-1, 1)
    for each in result["candidates"]:
        square = (pictures[each["number"]] - pictures[0]).square().mean(dim=0).numpy()
        assert each["inside"] == pytest.approx(square[labels == 2].mean(), rel=1e-3)
        assert each["outside"] == pytest.approx(square[labels != 2].mean(), rel=1e-3)
    again, _ = run(network, f"--mask={tmp_path / 'map.png'}", "--label=2", "--mask-coverage=0.5")
    assert record(again)["settings"]["blocks"] == [6]
    write_png(tmp_path / "tall.png", labels.T)
    lines = fails(tmp_path, network, f"--mask={tmp_path / 'tall.png'}", "--label=2")
    assert "has 8x16 pixels, the network's pictures have 16x8" in lines[-1]


def test_mistakes_in_ranking_and_label_maps_are_named(run, tmp_path):
    write_png(tmp_path / "map.png", np.full((RES, RES), 4, dtype=np.uint8))
    write_png(tmp_path / "colours.png", np.zeros((RES, RES, 3), dtype=np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    for args, message in [
        (["--blocks=0", "--best=2"], "has no discriminator: it ranks by realism; --by=diversity"),
        (["--blocks=0", "--best=5", "--by=locality"], "--best=5: there are only 4 candidates"),
        (["--numbering", "--by=locality"], "--best and --by rank candidates"),
        (["--blocks=0", "--label=3"], "--label chooses values of a label map"),
        ([f"--mask={tmp_path / 'map.png'}", "--label=3"], "map.png: its values are 4"),
        ([f"--mask={tmp_path / 'colours.png'}", "--label=3"], "colours.png has colours (mode RGB)"),
        ([f"--mask={tmp_path / 'text.png'}", "--label=3"], "Not a picture of a known format"),
    ]:
        line = fails(tmp_path, *args)[-1]
        assert line.startswith("Error: ") and message in line, line
    labels = np.zeros((RES, RES), dtype=np.uint8)
    labels[0, 0] = 1
    write_png(tmp_path / "map.png", labels)
    line = fails(tmp_path, f"--mask={tmp_path / 'map.png'}", "--label=1", "--mask-coverage=0.5")[-1]
    assert "--label covers no more than --mask-coverage=0.5 of any block" in line


def test_projected_pictures_are_edited_and_go_on(snapshot, run, tmp_path):
    ws = snapshot[1].mapping(torch.cat([z_of(1), z_of(2)]), None).numpy()
    np.savez(tmp_path / "projected_w.npz", w=ws)
    folder, _ = run(f"--projected-w={tmp_path / 'projected_w.npz'}", "--blocks=2", "--candidates=1")
    assert sorted(latents(folder, "proj01")) == ["ws"]
    again, _ = run(f"--from={folder}", "--pick=1", "--blocks=0", "--seeds=1")
    assert (again / "proj01-original.png").read_bytes() == (folder / "proj01-1.png").read_bytes()
    assert np.array_equal(latents(again, "proj01")["ws"][0, :, [0, 1, 3]], ws[1][:, [0, 1, 3]])


def test_numbering_alone_writes_no_candidates_but_can_be_gone_on_from(run):
    folder, output = run("--numbering", "--seeds=5")
    assert record(folder, "seed0005")["candidates"] == [] and "--pick=1" not in output
    assert not (folder / "seed0005-grid.png").exists()
    again, _ = run(f"--from={folder}", "--pick=0", "--blocks=all", "--candidates=1")
    change = record(again, "seed0005")["candidates"][0]
    assert change["outside"] is None and change["ratio"] is None and change["inside"] > 0


def test_nothing_in_the_folder_is_left_half_written(run):
    folder, _ = run("--blocks=0", "--candidates=1")
    assert {path.suffix for path in folder.iterdir()} == {".png", ".json", ".npz"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Say what to re-draw, as --blocks=5,6"),
        (["--blocks=4"], "'4' is outside the 2x2 grid: blocks are 0 to 3"),
        (["--blocks=eyes"], "Cannot read 'eyes' as blocks"),
        (["--blocks=0", "--seeds=3-1"], "cannot read '3-1'"),
        (["--blocks=0", "--seeds=x"], "cannot read 'x'"),
        (["--blocks=0", "--seeds=4294967296"], "numbers below 2**32"),
        (["--blocks=0", "--candidates=0"], "--candidates"),
        (["--blocks=0", "--pick=1"], "--from and --pick go together"),
        (["--blocks=0", "--swap=1", "--candidates=2"], "leave out --candidates"),
        (["--numbering", "--swap=1"], "need --blocks or --mask"),
        (["--blocks=0", "--class=1"], "unconditional"),
        (["--blocks=0", "--network=missing.pkl"], "missing.pkl"),
    ],
)
def test_mistakes_are_one_clear_line(run, tmp_path, args, message):
    lines = fails(tmp_path, *args)
    assert message in lines[-1] and lines[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_no_numbers_leave_nothing_behind(run, tmp_path):
    assert (
        "values that are no numbers (NaN)" in fails(tmp_path, "--blocks=0", "--seeds=0", "--trunc=1e30")[-1]
    )
    assert list((tmp_path / "out").iterdir()) == []


def fails(tmp_path, *args):
    """The lines printed by a call that ends with a user error, not with an exception of ours."""
    result = CliRunner().invoke(resample.main, [f"--outdir={tmp_path / 'out'}", *args])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    return result.output.strip().splitlines()


@pytest.mark.parametrize(
    "key,value",
    [("name", "../../elsewhere"), ("name", "a/b"), ("name", 5), ("seed", -1), ("seed", "1"), ("candidates", 7),
     ("candidates", [None]), ("settings", {}), ("settings", []), ("network", "x"), ("files", {}),
     ("files", {"latents": "../seed0000.npz"}), ("files", {"latents": "/etc/passwd"}), ("history", {}),
     ("history", [1])],
)  # fmt: skip
def test_results_of_others_lead_nowhere_else(run, tmp_path, key, value):
    """A name in a result is that of files to be written; everything else has its form, too."""
    folder, _ = run("--blocks=0", "--candidates=1")
    path = folder / "seed0000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    before = sorted(tmp_path.rglob("*"))
    lines = fails(tmp_path, f"--from={folder}", "--pick=0", "--blocks=1")
    assert lines[-1] == f"Error: {path} is damaged: {key} is not as resample.py writes it"
    assert sorted(tmp_path.rglob("*")) == before


def test_latents_that_are_not_those_of_the_result(run, tmp_path):
    folder, _ = run("--blocks=0", "--candidates=1")
    good = latents(folder)
    for wrong in [
        dict(ws=np.zeros((2, 3, 4), np.float32)), dict(ws=good["ws"][:1]), dict(z=good["z"]),
        dict(good, z=np.zeros((2, 5))),
    ]:  # fmt: skip
        np.savez(folder / "seed0000.npz", **{k: np.asarray(v) for k, v in wrong.items()})
        lines = fails(tmp_path, f"--from={folder}", "--pick=0", "--blocks=1")
        assert lines[-1].startswith(("Error: The latents of", "Error: Cannot read the latents in"))


def test_an_archive_that_unpacks_to_much_more(tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "MOST_LATENTS", 10**6)
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(10**6, np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 10**5
    assert "unpacks to 4,000," in fails(tmp_path, "--blocks=0", f"--projected-w={tmp_path / 'bomb.npz'}")[-1]


def test_wrong_files_are_named(run, tmp_path):
    half = b'{"format": "ssn-resample/1", "name": "x", "seed": 0}'
    files = {"text.pkl": b"no pickle", "text.json": b"{}", "broken.json": b"{", "half.json": half}
    files["deep.json"] = b"[" * 100_000
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    G = Generator(z_dim=4, c_dim=0, w_dim=4, img_resolution=8, img_channels=1)
    save_network_pkl(tmp_path / "plain.pkl", G=G, D=None, G_ema=G)
    save_network_pkl(tmp_path / "foreign.pkl", **dict.fromkeys(["G", "D", "G_ema"], torch.nn.Linear(2, 2)))
    for args, message in [
        (["--network=" + str(tmp_path / "text.pkl")], "text.pkl"),
        (["--network=" + str(tmp_path / "plain.pkl")], "no latent_grid"),
        (
            ["--network=" + str(tmp_path / "foreign.pkl")],
            "asks for torch.nn.modules.linear.Linear: nothing was run",
        ),
        (["--network=" + str(tmp_path / "foreign.pkl"), "--trust-pickle"], "no latent_grid"),
        ([f"--from={tmp_path / 'text.json'}", "--pick=1"], "text.json is no result of resample.py"),
        (
            [f"--from={tmp_path / 'half.json'}", "--pick=1"],
            "half.json is damaged: settings, network, network_hash",
        ),
        ([f"--from={tmp_path / 'broken.json'}", "--pick=1"], "Cannot read the result"),
        ([f"--from={tmp_path / 'deep.json'}", "--pick=1"], "Cannot read the result"),
        ([f"--from={tmp_path / 'missing'}", "--pick=1"], "missing"),
        ([f"--mask={tmp_path / 'text.json'}"], "--blocks and --mask"),
        ([f"--projected-w={tmp_path / 'text.pkl'}"], "Cannot read the latents"),
    ]:
        lines = fails(tmp_path, "--blocks=0", *args)
        assert lines[-1].startswith("Error: ") and message in lines[-1]
    np.savez(tmp_path / "w.npz", w=np.zeros([1, 2, 3]))
    assert (
        "must hold 'w' of shape [n, "
        in fails(tmp_path, "--blocks=0", f"--projected-w={tmp_path / 'w.npz'}")[-1]
    )
    write_png(tmp_path / "mask.png", np.zeros((RES, RES), dtype=np.uint8))
    assert "covers no block" in fails(tmp_path, f"--mask={tmp_path / 'mask.png'}")[-1]
    write_png(tmp_path / "mask.png", np.full((8, 4), 255, dtype=np.uint8))
    assert (
        "has 4x8 pixels, the network's pictures have 16x16"
        in fails(tmp_path, f"--mask={tmp_path / 'mask.png'}")[-1]
    )


def test_going_on_from_the_wrong_place_is_refused(run, tmp_path):
    folder, _ = run("--blocks=0", "--candidates=2")
    onward = ["--blocks=1", f"--from={folder}"]
    assert "it must be 0 (the original) or 1 to 2" in fails(tmp_path, *onward, "--pick=3")[-1]
    assert "--from and --pick go together" in fails(tmp_path, *onward)[-1]
    assert "has no seed 4, only 0" in fails(tmp_path, *onward, "--pick=1", "--seeds=4")[-1]
    assert "was made with 1.0" in fails(tmp_path, *onward, "--pick=1", "--trunc=0.5")[-1]
    assert str(folder) in fails(tmp_path, "--blocks=1", f"--from={folder.parent}", "--pick=1")[-1]
    other, _ = network(str(tmp_path / "other.pkl"), seed=1)
    line = fails(tmp_path, *onward, "--pick=1", f"--network={other}")[-1]
    assert "is of another network" in line and "ssn.pkl" in line and "other.pkl" in line
    (folder / "seed0000.npz").write_bytes(b"cut")
    assert "Cannot read the latents" in fails(tmp_path, *onward, "--pick=1")[-1]


def test_conditional_networks_need_a_class_and_pass_it_on(run, tmp_path):
    path, G = network(str(tmp_path / "cond.pkl"), c_dim=3)
    assert "must be 0 to 2, not None" in fails(tmp_path, "--blocks=0", f"--network={path}")[-1]
    first, _ = run("--blocks=0", f"--network={path}", "--class=2", "--candidates=1")
    again, _ = run("--blocks=1", f"--from={first}", "--pick=1", "--candidates=1")
    ws = G.mapping(latents(again)["z"], torch.eye(3)[[2, 2]])
    torch.testing.assert_close(latents(again)["ws"], ws)


def test_help_does_not_wait_for_pytorch():
    code = "import resample, sys; print('torch' in sys.modules)"
    root = pathlib.Path(resample.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


# --- speed --------------------------------------------------------------------------------------------------


def test_sixteen_candidates_of_the_demo_in_less_than_a_second(tmp_path):
    """After loading, in processor time of one thread: pictures, sheet, JSON and latents."""
    from ssn_ext import results, session

    options = session.Options(blocks="5,6", candidates=16, outdir=str(tmp_path), device="cpu")
    job = session.make_job(options, resample.DEMO_NETWORK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder = results.run_folder(job.outdir, job.name, job.same)
        began = time.process_time()
        record = session.resample(job, folder, job.starts[0])
        assert time.process_time() - began < 1
    finally:
        torch.set_num_threads(threads)
    assert len(record["candidates"]) == 16 and len(list(pathlib.Path(folder).glob("*.png"))) == 18


def test_loading_does_not_import_what_it_does_not_need():
    """Half of the time until the first picture went into PyTorch's compiler, SymPy and SciPy."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from ssn_ext import session\n"
        "session.load_network_pkl(sys.argv[1], only=['G_ema'])\n"
        "more = {name.split('.')[0] for name in set(sys.modules) - before} | (set(sys.modules) - before)\n"
        "print(sorted(more & {'torch._dynamo', 'sympy', 'scipy', 'imageio', 'matplotlib'}))\n"
    )
    command = [sys.executable, "-c", code, resample.DEMO_NETWORK]
    root = pathlib.Path(resample.__file__).resolve().parent
    output = subprocess.run(command, cwd=root, text=True, capture_output=True, check=True).stdout
    assert output.strip() == "[]"
