# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from metrics import metric_main
from metrics.inception_score import inception_score


def test_uniform_probabilities_score_one():
    assert inception_score(np.full([50, 8], 1 / 8)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))


def test_certain_and_balanced_scores_the_number_of_classes():
    probs = np.tile(np.eye(5), [20, 1])  # zeros: 0 log 0 = 0
    assert inception_score(probs, splits=10) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    # Sorted by class, each half knows one class only: score 1, where the whole would score 2.
    halves = np.repeat(np.eye(2), 10, axis=0)
    assert inception_score(halves, splits=2)[0] == pytest.approx(1)
    assert inception_score(halves, splits=1)[0] == pytest.approx(2)


def test_mutual_information():
    """The score is exp of the mutual information of picture and class."""
    probs = np.random.default_rng(0).dirichlet(np.ones(6), size=30)
    marginal = probs.mean(axis=0)
    information = -(marginal * np.log(marginal)).sum() + (probs * np.log(probs)).sum(axis=1).mean()
    assert inception_score(probs, splits=1)[0] == pytest.approx(np.exp(information))


def test_uneven_splits_use_every_row():
    probs = np.random.default_rng(1).dirichlet(np.ones(3), size=11)
    parts = [inception_score(probs[a:b], 1)[0] for a, b in [(0, 3), (3, 7), (7, 11)]]
    assert inception_score(probs, 3) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))


def test_too_few():
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(np.ones([9, 1]), 10)


def test_metric_wants_inception(make_generator, detector_file, detector_folder, monkeypatch):
    monkeypatch.setattr(metric_main.METRICS.resolve("is5k"), "settings", dict(num_gen=20, num_splits=10))
    result = metric_main.calc_metric("is5k", G=make_generator(), detector=detector_folder, device="cpu")
    assert list(result.results) == ["is5k_mean", "is5k_std"] and 1 <= result.results.is5k_mean <= 4
    with pytest.raises(OSError, match="The Inception score needs inception-2015-12-05.pt"):
        metric_main.calc_metric("is5k", G=make_generator(), detector=detector_file, device="cpu")
