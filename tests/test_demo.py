# SPDX-License-Identifier: Apache-2.0
"""The shipped demo: the README's first command, and what the model card promises."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import resample
from ssn_ext import metric
from ssn_ext.resampling import influence
from training.dataset import ImageFolderDataset
from training.snapshot import load_network_pkl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo():
    """The shipped snapshot."""
    return load_network_pkl(ROOT / "demo" / "lorelei32.pkl")


def test_sizes_and_contents(demo):
    assert (ROOT / "demo" / "lorelei32.pkl").stat().st_size < 10e6
    assert (ROOT / "demo" / "lorelei32.zip").stat().st_size < 4e6
    G = demo["G_ema"]
    assert (G.latent_grid, G.z_dim, G.img_resolution) == ([4, 4], 1024, 32)
    assert demo["training_set_kwargs"]["path"] == "demo/lorelei32.zip"  # nobody's home directory
    assert len(ImageFolderDataset(str(ROOT / "demo" / "lorelei32.zip"))) == 2800


def test_its_source_is_known_to_be_ours(caplog):
    """Opening the shipped network tells nobody of foreign source code, whichever version wrote it."""
    load_network_pkl(ROOT / "demo" / "lorelei32.pkl")
    assert caplog.messages == []


def test_edits_are_local_and_pictures_differ(demo):
    """A re-drawn block changes its own pixels several times as much as the others."""
    G = demo["G_ema"]
    z, fresh = torch.from_numpy(np.random.RandomState(0).randn(2, 16, G.z_dim)).float()
    result = metric.summarise_influence(influence(G, z, None, fresh), G.latent_grid, [32, 32])
    assert result["ldbr_dist_locality"] > 4
    with torch.no_grad():
        assert float(G(z, None).std(dim=0).mean()) > 0.2  # pictures differ from each other


def test_the_first_command_of_the_readme(tmp_path):
    result = CliRunner().invoke(resample.main, ["--blocks=5,6", f"--outdir={tmp_path}"])
    assert result.exit_code == 0, result.output
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"seed0000-grid.png", "seed0000-original.png", "seed0000-4.png", "seed0000.json"} <= names
    record = json.loads((folder / "seed0000.json").read_text())
    assert all(each["inside"] > each["outside"] for each in record["candidates"])


def test_figures_of_the_documents_exist():
    """Every picture and file that README and docs link to."""
    for page in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "demo").glob("*.md")),
    ]:
        text = page.read_text(encoding="utf-8")
        assert "{{" not in text, f"{page.name} has an unfilled place"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
