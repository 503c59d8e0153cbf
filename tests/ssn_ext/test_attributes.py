# SPDX-License-Identifier: Apache-2.0
"""Readers of attributes on pictures whose attributes are known; consistency of generators known in closed form."""

import gzip
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from ssn_ext import attributes, consistency
from ssn_ext.blocks import block_masks
from torch_utils.images import to_float
from training.networks import Generator
from training.snapshot import save_network_pkl

ROOT = Path(__file__).parents[2]
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
GRID = [2, 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder, table) of 200 pictures 16x16: blocks 0 and 3 have the colour of 'hair', block 1 is bright for mood
    'gay'."""
    folder = tmp_path_factory.mktemp("pictures")
    rnd = np.random.RandomState(0)
    lines = ["file,hair,mood,name,always"]
    for i in range(200):
        color, mood = rnd.choice(list(COLORS)), rnd.choice(["gay", "glum"])
        picture = rnd.randint(100, 120, size=[16, 16, 3])
        picture[:8, :8] = picture[8:, 8:] = COLORS[color]
        picture[:8, 8:] += 100 if mood == "gay" else -80
        PIL.Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{color},{mood},n{i},yes")
    table = folder.parent / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    return str(folder), str(table)


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """(path, output) of a reader trained by the command line."""
    out = tmp_path_factory.mktemp("reader") / "attributes.pt"
    result = call("train", f"--data={files[0]}", f"--labels={files[1]}", f"--out={out}", "--steps=90")
    assert result.exit_code == 0, result.output
    return str(out), result.output


def call(*args):
    return CliRunner().invoke(attributes.main, list(args))


def fails(*args):
    result = call(*args)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    return result.output.strip().splitlines()[-1]


# Tables and training.


def test_tables_are_read_plain_and_compressed(files, tmp_path):
    packed = tmp_path / "table.csv.gz"
    packed.write_bytes(gzip.compress(Path(files[1]).read_bytes()))
    plain, table = attributes.load_table(*files), attributes.load_table(files[0], str(packed))
    assert list(table.values) == ["hair", "mood"]  # names and what never changes are no attributes
    assert table.values["hair"] == ["blue", "green", "red"]
    assert torch.equal(plain.labels, table.labels) and table.pictures.shape == (200, 3, 16, 16)
    rows = attributes.read_table(files[1])
    for number in (0, 77):
        assert table.values["hair"][table.labels[number, 0]] == rows[f"{number:03d}.png"]["hair"]
        color = COLORS[rows[f"{number:03d}.png"]["hair"]]
        assert tuple(table.pictures[number, :, 0, 0].tolist()) == color
    assert int(table.held_out().sum()) == 20


def test_visibility_is_everything_a_rectangle_or_the_rest():
    masks = attributes.random_visible(3000, [16, 24], torch.Generator().manual_seed(0))
    everything = masks.all(dim=2).all(dim=1)
    assert 0.28 < everything.float().mean() < 0.39
    areas = []
    for mask in masks[~everything][:200]:
        inside = mask if mask.float().mean() < 0.5 else ~mask
        rows, columns = inside.any(dim=1), inside.any(dim=0)
        assert torch.equal(inside, rows[:, None] & columns)
        areas.append((int(rows.sum()), int(columns.sum())))
    assert min(areas) >= (1, 2) and max(a for a, _ in areas) <= 8 and max(b for _, b in areas) <= 12


def test_the_reader_reads_what_is_visible_and_nothing_else(files, trained):
    reader, details = attributes.load_reader(trained[0])
    table = attributes.load_table(*files)
    assert details["accuracy"]["hair"] > 0.95 and details["accuracy"]["mood"] > 0.95
    assert details["majority"] == attributes.majorities(table)
    shown = consistency.visibility(reader, table, GRID)
    assert (shown["hair"] > 0.8).tolist() == [True, False, False, True]
    assert (shown["mood"] > 0.8).tolist() == [False, True, False, False]
    masks = block_masks(GRID, [16, 16])
    pictures = to_float(table.pictures[:8])
    hidden = torch.where(masks[0], pictures, torch.randn_like(pictures))
    for name, each in reader.read(pictures, masks[0]).items():
        torch.testing.assert_close(each, reader.read(hidden, masks[0])[name])
    assert consistency.real_ties(reader, table, GRID)["hair"] > 0.95  # of 40 pairs in 20 held-out pictures


def test_training_is_deterministic_and_its_file_is_plain(files, trained, tmp_path):
    table = attributes.load_table(*files)
    first, second = (attributes.train_reader(table, 10, seed=3).state_dict() for _ in range(2))
    other = attributes.train_reader(table, 10, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["heads.weight"], other["heads.weight"])
    content = torch.load(trained[0], weights_only=True)
    assert (
        content["format"] == attributes.FORMAT and content["weights"]["heads.weight"].dtype == torch.float16
    )
    assert json.loads(content["config"])["details"]["data"] == files[0]


def test_columns_are_chosen(files, tmp_path):
    out = tmp_path / "mood.pt"
    result = call(
        "train", f"--data={files[0]}", f"--labels={files[1]}", f"--out={out}", "--steps=10",
        "--columns=mood", "--seed=5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    reader, details = attributes.load_reader(str(out))
    assert list(reader.values) == ["mood"] and details["seed"] == 5 and details["steps"] == 10


# The numbers of a check.


def test_ratio_is_the_mean_with_its_error_for_equal_weights():
    rnd = np.random.RandomState(0)
    values = rnd.rand(50)
    mean, error = consistency.ratio(values * 3, np.full(50, 3.0))
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 50**0.5)
    assert np.isnan(consistency.ratio(np.zeros(2), np.zeros(2))).all()
    draws = []  # unequal weights: against the scatter of repeated draws
    for _ in range(400):
        weights = rnd.randint(0, 5, size=200)
        draws.append(consistency.ratio(rnd.binomial(weights, 0.7), weights))
    means, errors = np.array(draws).T
    assert means.mean() == pytest.approx(0.7, abs=0.005) and errors.mean() == pytest.approx(
        means.std(), rel=0.1
    )


def test_distance_and_agreement_of_readings():
    p = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.9, 0.1]])
    q = torch.tensor([[0.0, 1.0], [0.6, 0.4], [0.8, 0.2]])
    torch.testing.assert_close(consistency.distance(p, q), torch.tensor([1.0, 0.0, 0.1]))
    sure, agree = consistency.agreement(p, q)
    assert sure.tolist() == [1, 0, 1] and agree.tolist() == [0, 0, 1]


class Painter(torch.nn.Module):
    """Pictures as those of the table; block b takes its colour from the latent of block source[b]."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.dummy = torch.nn.Parameter(torch.zeros(1))
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = 4, 0, 4, 1
        self.img_resolution, self.img_channels, self.latent_grid = 16, 3, GRID

    def mapping(self, z, c, truncation_psi=1):
        return z[:, None].float()

    def synthesis(self, ws, noise_mode="const"):
        thirds = torch.special.ndtr(ws[:, 0]).mul(3).long().clamp(0, 2)  # [N, 4]
        colors = to_float(torch.tensor(list(COLORS.values()), dtype=torch.uint8))[thirds]  # [N, 4, 3]
        moods = to_float(torch.tensor([30, 210], dtype=torch.uint8))[(ws[:, 0, 1] > 0).long()]
        masks = block_masks(GRID, [16, 16])
        picture = torch.full([len(ws), 3, 16, 16], -0.14)
        for block in (0, 3):
            picture = torch.where(masks[block], colors[:, self.source[block], :, None, None], picture)
        return torch.where(masks[1], moods[:, None, None, None], picture)

    def forward(self, z, c, noise_mode="const"):
        return self.synthesis(self.mapping(z, c))


@pytest.mark.parametrize("source", [{0: 0, 3: 3}, {0: 0, 3: 0}])
def test_a_check_knows_a_generator_that_breaks_its_ties_from_one_that_keeps_them(files, trained, source):
    reader, _details = attributes.load_reader(trained[0])
    shown = consistency.visibility(reader, attributes.load_table(*files), GRID)
    results = consistency.check(Painter(source), reader, shown, count=200, seed=1, batch=64)
    hair, mood = results["hair"], results["mood"]
    assert mood["inside"] == pytest.approx(0.5, abs=0.1) and mood["inside_stderr"] < 0.05
    assert mood["here"] == pytest.approx(0, abs=0.01) and mood["elsewhere"] == pytest.approx(0, abs=0.01)
    assert mood["unrelated"] == pytest.approx(0.5, abs=0.1)
    if source[3] == 3:  # independent colours: nothing outside changes, but hair agrees by chance only
        assert hair["inside"] == pytest.approx(2 / 3, abs=0.08)
        assert hair["tie_before"] == pytest.approx(1 / 3, abs=0.12)
        assert hair["tie_after"] == pytest.approx(1 / 3, abs=0.12)
        assert np.max(hair["outside_by_block"]) < 0.01
        assert consistency.overall(results)["kept"] > 0.98
    else:  # one colour, of block 0: re-drawing that changes the rest, re-drawing block 3 changes nothing
        assert hair["inside"] == pytest.approx(1 / 3, abs=0.08)  # mean of 2/3 and 0
        assert hair["tie_before"] > 0.97 and hair["tie_after"] > 0.97
        assert hair["outside_by_block"][0] == pytest.approx(2 / 3, abs=0.1)
        assert np.max(hair["outside_by_block"][1:]) < 0.01 and hair["elsewhere"] < 0.01
        assert hair["here"] == pytest.approx(hair["outside_by_block"][0] / 2, rel=1e-4)


def test_of_several_grids_those_of_one_block_are_left_out(files, trained, monkeypatch):
    """1x1,2x2: the second grid's blocks count, as if it were the only one."""
    reader, _details = attributes.load_reader(trained[0])
    shown = consistency.visibility(reader, attributes.load_table(*files), GRID)
    plain = Painter({0: 0, 3: 0})
    expected = consistency.check(plain, reader, shown, count=20)
    several = Painter({0: 0, 3: 0})
    several.z_dim, several.latent_grid, several.latent_grids = 5, [1, 5], [[1, 1], [2, 2]]
    assert consistency.grids_read(several) == [[2, 2]]
    monkeypatch.setattr(several, "synthesis", lambda ws, noise_mode="const": plain.synthesis(ws[..., 1:]))
    original = consistency.draw_latents

    def with_another(G, seed, numbers):  # the same latents, and one more block before them
        z, fresh, c = original(plain, seed, numbers)
        return *(torch.nn.functional.pad(each, [1, 0]) for each in (z, fresh)), c

    monkeypatch.setattr(consistency, "draw_latents", with_another)
    got = consistency.check(several, reader, shown, count=20)
    assert got["hair"]["outside_by_block"] == pytest.approx(expected["hair"]["outside_by_block"], abs=1e-5)


def test_overall_with_nothing_to_tell():
    assert all(np.isnan(value) for value in consistency.overall({}).values())


# The command, and what it refuses.


def test_the_command_prints_and_writes_all_numbers(trained, files, tmp_path, monkeypatch):
    monkeypatch.setattr("training.generating.load_generator", lambda *_args: Painter({0: 0, 3: 0}))
    out = tmp_path / "check.json"
    args = [
        "--network=painter.pkl",
        f"--classifiers={trained[0]}",
        "--count=40",
        "--device=cpu",
        f"--json={out}",
    ]
    result = call("check", *args)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert list(content["attributes"]) == ["hair", "mood"] and content["count"] == 40
    assert content["attributes"]["hair"]["tie_real"] > 0.95
    assert "hair            0, 3" in result.output and "mood            1" in result.output
    assert f"The rest keeps {content['overall']['kept']:.3f}" in result.output
    again = call("check", *args, f"--data={files[0]}", f"--labels={files[1]}")
    assert again.stdout == result.stdout
    assert call("check", *args, "--seed=1").stdout != result.stdout


def test_mistakes_are_one_clear_line(files, trained, tmp_path):
    data, labels = f"--data={files[0]}", f"--labels={files[1]}"
    out = f"--out={tmp_path / 'new.pt'}"
    torch.manual_seed(0)
    G = Generator(z_dim=4, c_dim=0, w_dim=4, img_resolution=8, img_channels=3)
    save_network_pkl(tmp_path / "plain.pkl", G=G, D=None, G_ema=G)
    texts = {"one.csv": "file\n1.png\n", "cells.csv": "file,a\n1.png,x,y\n", "few.csv": "file,a\n000.png,x\n"}
    texts["bad.csv.gz"] = "not packed"
    texts["single.csv"] = "file,a\n" + "".join(f"{i:03d}.png,n{i}\n" for i in range(200))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for args, message in [
        (["train", data, labels, f"--out={trained[0]}"], "would be replaced: choose another --out"),
        (["train", data, labels, out, "--columns=name"], "--columns=name: 200 different values"),
        (["train", data, labels, out, "--columns=eyes"], "--columns=eyes: no such column"),
        (["train", data, f"--labels={tmp_path / 'one.csv'}", out], "must have two columns or more"),
        (["train", data, f"--labels={tmp_path / 'cells.csv'}", out], "row 2: 3 cells under 2 columns"),
        (["train", data, f"--labels={tmp_path / 'few.csv'}", out], "describes 1 pictures"),
        (["train", data, f"--labels={tmp_path / 'single.csv'}", out], "no column of 2 to 64 values"),
        (["train", data, f"--labels={tmp_path / 'bad.csv.gz'}", out], "does not read as a table"),
        (["train", data, f"--labels={tmp_path / 'missing.csv'}", out], "missing.csv"),
        (["check", f"--network={tmp_path / 'plain.pkl'}", f"--classifiers={files[1]}"], "is no file of"),
        (["check", f"--network={tmp_path / 'plain.pkl'}", "--classifiers=no.pt"], "no.pt"),
        (["check", f"--network={tmp_path / 'plain.pkl'}", f"--classifiers={trained[0]}"], "no latent_grid"),
    ]:
        line = fails(*args)
        assert line.startswith("Error: ") and message in line, line
    assert not (tmp_path / "new.pt").exists()


def test_networks_of_other_proportions_are_refused(trained, monkeypatch):
    G = Painter({0: 0, 3: 3})
    G.img_shape = [8, 16]
    monkeypatch.setattr("training.generating.load_generator", lambda *_args: G)
    line = fails("check", "--network=wide.pkl", f"--classifiers={trained[0]}", "--device=cpu")
    assert "reads pictures of 16x16, the network makes 16x8: the proportions differ" in line
    G.img_shape, G.latent_grid = [16, 16], [1, 1]
    line = fails("check", "--network=one.pkl", f"--classifiers={trained[0]}", "--device=cpu")
    assert "has a single block: there is no rest to stay the same" in line


# What is shipped.


def test_the_shipped_table_and_reader():
    table = attributes.load_table("demo", "demo")
    assert len(table.labels) == 2800 and "hair_color" in table.values
    assert (ROOT / "demo" / "attributes.pt").stat().st_size < 300e3
    reader, details = attributes.load_reader(str(ROOT / "demo" / "attributes.pt"))
    assert (details["data"], details["labels"]) == ("demo", "demo")
    found = attributes.accuracies(reader, table, torch.ones(32, 32, dtype=torch.bool))
    assert found == pytest.approx(details["accuracy"], abs=0.01)
    assert min(found["skin"], found["hair_color"], found["glasses"]) > 0.95
