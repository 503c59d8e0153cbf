# SPDX-License-Identifier: Apache-2.0
import ast
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import dnnlib.plugins
import dnnlib.util
from metrics import metric_main

ROOT = pathlib.Path(metric_main.__file__).parents[1]
FAMILY = [
    *("fid50k_full", "kid50k_full", "pr50k3_full", "ppl2_wend", "is50k", "fid50k", "kid50k", "pr50k3"),
    *("ppl_zfull", "ppl_wfull", "ppl_zend", "ppl_wend"),
]


@pytest.fixture
def registry(monkeypatch):
    """A registry of the test's own, with what the real one holds."""
    mine = dnnlib.plugins.Registry("metric")
    for row in metric_main.TABLE:
        mine.register(row.name, row)
    monkeypatch.setattr(metric_main, "METRICS", mine)
    return mine


def test_importing_the_registry_imports_no_torch():
    code = "import sys, metrics.metric_main; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_metrics_do_not_import_training():
    for path in (ROOT / "metrics").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "training" for name in names), path


def test_the_familys_names_come_first(registry):
    assert metric_main.list_valid_metrics()[: len(FAMILY)] == FAMILY
    assert all(
        metric_main.is_valid_metric(name) for name in [*FAMILY, "ppl", "fid5k", "kid5k", "fid1k", "kid1k"]
    )
    assert not metric_main.is_valid_metric("fid")
    assert all(len(metric_main.describe(name)) > 10 for name in metric_main.list_valid_metrics())


def test_the_familys_definitions(monkeypatch):
    """Settings and data set of each row, as the function that computes it gets them."""
    seen = {}

    def spy(opts, name, func_name, **settings):
        seen[name] = (func_name.split(".")[1], dict(opts.dataset_kwargs), settings)
        return {}

    monkeypatch.setattr(dnnlib.util, "call_func_by_name", spy)
    for row in metric_main.TABLE:
        metric_main.calc_metric(row.name, dataset_kwargs=dict(xflip=True, max_size=9), device="cpu")
    full, kept = dict(xflip=False, max_size=None), dict(xflip=True, max_size=None)
    frechet, kernel = "frechet_inception_distance", "kernel_inception_distance"
    assert seen["fid50k_full"] == (frechet, full, dict(max_real=None, num_gen=50000))
    assert seen["fid50k"] == (frechet, kept, dict(max_real=50000, num_gen=50000))
    subsets = dict(num_subsets=100, max_subset_size=1000)
    assert seen["kid50k_full"] == (kernel, full, dict(max_real=1000000, num_gen=50000, **subsets))
    assert seen["kid50k"] == (kernel, kept, dict(max_real=50000, num_gen=50000, **subsets))
    balls = dict(num_gen=50000, nhood_size=3, row_batch_size=10000, col_batch_size=10000)
    assert seen["pr50k3_full"] == ("precision_recall", full, dict(max_real=200000, **balls))
    assert seen["pr50k3"] == ("precision_recall", kept, dict(max_real=50000, **balls))
    assert seen["is50k"] == ("inception_score", full, dict(num_gen=50000, num_splits=10))
    asis = dict(xflip=True, max_size=9)
    paths = dict(num_samples=50000, epsilon=1e-4, batch_size=2)
    for name, space, sampling, crop in [
        ("ppl2_wend", "w", "end", False),
        ("ppl", "w", "end", False),
        ("ppl_zfull", "z", "full", True),
        ("ppl_wfull", "w", "full", True),
        ("ppl_zend", "z", "end", True),
        ("ppl_wend", "w", "end", True),
    ]:
        where = dict(space=space, sampling=sampling, crop=crop)
        assert seen[name] == ("perceptual_path_length", asis, dict(paths, **where))
    subset = dict(xflip=False, max_size=5000, random_seed=0)
    assert seen["fid5k"] == (frechet, subset, dict(max_real=5000, num_gen=5000))


def test_all_are_documented():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [row.name for row in metric_main.TABLE if f"`{row.name}`" not in text] == []


def test_a_metric_of_ones_own(registry, tmp_path, capsys):
    @metric_main.register_metric
    def influence(opts):
        """One line.

        And more.
        """
        opts.details.latents = 3
        return dict(influence=np.float32(0.5), matrix=torch.eye(2), rows=[(1, 2)], unit="mse")

    assert metric_main.is_valid_metric("influence") and metric_main.describe("influence") == "One line."
    with pytest.raises(ValueError, match="registered twice"):
        metric_main.register_metric(influence)
    result = metric_main.calc_metric("influence", G=None, device="cpu", seed=5, run_dir=str(tmp_path))
    assert list(result) == ["results", "metric", "total_time", "total_time_str", "num_gpus", "details"]
    expected = dict(influence=0.5, matrix=[[1.0, 0.0], [0.0, 1.0]], rows=[[1.0, 2.0]], unit="mse")
    assert result.results == expected

    snapshot = str(tmp_path / "network-snapshot-000000.pkl")
    for _ in range(2):
        metric_main.report_metric(result, run_dir=str(tmp_path), snapshot_pkl=snapshot)
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "metric-influence.jsonl").read_text().splitlines() == printed and len(printed) == 2
    record = json.loads(printed[0])
    family = ["results", "metric", "total_time", "total_time_str", "num_gpus", "snapshot_pkl", "timestamp"]
    assert list(record) == [*family, "details"]
    assert record["results"] == expected and record["snapshot_pkl"] == "network-snapshot-000000.pkl"
    assert record["details"]["latents"] == 3 and record["details"]["seed"] == 5


def test_reporting_without_a_run(registry, capsys):
    result = dict(results=dict(fid5k=1.0), metric="fid5k")
    metric_main.report_metric(result, run_dir=None, snapshot_pkl="https://host.name/net.pkl")
    assert json.loads(capsys.readouterr().out)["snapshot_pkl"] == "https://host.name/net.pkl"


def test_unknown():
    with pytest.raises(ValueError, match="Unknown metric 'fid'; known: fid50k_full"):
        metric_main.calc_metric("fid")


def test_why_unavailable(detector_folder, detector_file, tmp_path):
    assert metric_main.why_unavailable(["fid50k_full", "ppl", "is50k"], detector=detector_folder) is None
    assert metric_main.why_unavailable(["fid5k", "pr50k3"], detector=detector_file) is None
    assert "Inception score needs" in metric_main.why_unavailable(["fid5k", "is5k"], detector=detector_file)
    assert "vgg16.pt is not there" in metric_main.why_unavailable(["ppl"], detector=str(tmp_path))
    assert metric_main.why_unavailable([]) is None
