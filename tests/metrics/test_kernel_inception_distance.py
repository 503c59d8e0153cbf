# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from metrics import metric_main
from metrics.kernel_inception_distance import kernel_distance, squared_mmd


def kernel(a, b):
    return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3


def test_against_a_double_loop():
    x, y = np.random.default_rng(0).standard_normal([2, 7, 3])
    within = [np.mean([kernel(s[i], s[j]) for i in range(7) for j in range(7) if i != j]) for s in (x, y)]
    between = np.mean([kernel(p, q) for p in x for q in y])
    assert squared_mmd(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_a_set_and_itself():
    """Unbiased terms within, all pairs between: 2 (S - T) / (m (m - 1)) - 2 S / m^2, below zero."""
    x = np.random.default_rng(1).standard_normal([20, 4])
    gram = np.array([[kernel(p, q) for q in x] for p in x])
    expected = 2 * (gram.sum() - np.trace(gram)) / (20 * 19) - 2 * gram.sum() / 400
    assert kernel_distance(x, x, num_subsets=3) == pytest.approx(expected, rel=1e-10)
    assert expected < 0


def test_unbiased_and_sensitive():
    rnd = np.random.default_rng(2)
    draws = [squared_mmd(*rnd.standard_normal([2, 30, 2])) for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
    shifted = kernel_distance(rnd.standard_normal([300, 2]), rnd.standard_normal([300, 2]) + 1, 10, 100)
    # For a linear kernel it would be |shift|^2 / F = 1; the cubic one only adds to that.
    assert shifted > 1


def test_subsets_are_reproducible_and_bounded():
    rnd = np.random.default_rng(3)
    x, y = rnd.standard_normal([50, 3]), rnd.standard_normal([40, 3])
    assert kernel_distance(x, y, 5, 10, seed=1) == kernel_distance(x, y, 5, 10, seed=1)
    assert kernel_distance(x, y, 5, 10, seed=1) != kernel_distance(x, y, 5, 10, seed=2)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        kernel_distance(x[:1], y)


def test_metric(make_generator, dataset_kwargs, detector_file, detector_folder, monkeypatch):
    small = dict(max_real=None, num_gen=20, num_subsets=2, max_subset_size=1000)
    monkeypatch.setattr(metric_main.METRICS.resolve("kid5k"), "settings", small)
    G = make_generator()
    args = dict(G=G, dataset_kwargs=dataset_kwargs, device="cpu")
    own = metric_main.calc_metric("kid5k", detector=detector_file, **args)
    official = metric_main.calc_metric("kid5k", detector=detector_folder, **args)
    assert list(own.results) == ["kd5k_tiny_net"] and list(official.results) == ["kid5k"]
    assert own.results["kd5k_tiny_net"] == official.results["kid5k"]
