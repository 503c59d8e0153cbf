# SPDX-License-Identifier: Apache-2.0
"""The same features, measured by other people's packages: torchmetrics, and prdc of the authors of density and
coverage. What they compute from features alone is compared; their own detectors are not used."""

import numpy as np
import pytest
import torch

from metrics.feature_stats import FeatureStats
from metrics.frechet_inception_distance import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_inception_distance import kernel_distance
from metrics.precision_recall import precision_recall

fid = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics (requirements-test.txt)")
kid = pytest.importorskip("torchmetrics.image.kid", reason="needs torchmetrics (requirements-test.txt)")
inception = pytest.importorskip(
    "torchmetrics.image.inception", reason="needs torchmetrics (requirements-test.txt)"
)
prdc = pytest.importorskip("prdc", reason="needs prdc (requirements-test.txt)")


class Features(torch.nn.Module):
    """A 'detector' whose pictures are features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


@pytest.fixture
def features():
    """Two samples [80, 6] and [60, 6], correlated, of different mean: values that float16 holds."""
    rnd = np.random.default_rng(0)
    mix = rnd.standard_normal([6, 6])
    real, made = rnd.standard_normal([80, 6]) @ mix, rnd.standard_normal([60, 6]) @ mix * 0.8 + 0.4
    return real.astype(np.float16).astype(np.float32), made.astype(np.float16).astype(np.float32)


def updated(metric, real, made):
    """Their metric with both samples, in float64."""
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(real).double(), real=True)
    metric.update(torch.from_numpy(made).double(), real=False)
    return metric.compute()


def test_frechet_distance(features):
    """They divide covariances by N - 1, the family by N."""
    moments = []
    for sample in features:
        stats = FeatureStats(capture_mean_cov=True)
        stats.append(sample)
        mean, cov = stats.get_mean_cov()
        moments += [mean, cov * len(sample) / (len(sample) - 1)]
    theirs = float(updated(fid.FrechetInceptionDistance(feature=Features(6)), *features))
    assert frechet_distance(*moments) == pytest.approx(theirs, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kernel_distance(features):
    """One subset of all rows of both: nothing random is left."""
    real, made = features[0][:60], features[1]
    mean, _std = updated(
        kid.KernelInceptionDistance(feature=Features(6), subsets=1, subset_size=60), real, made
    )
    assert kernel_distance(real, made, num_subsets=1) == pytest.approx(float(mean), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save")
def test_inception_score():
    """They shuffle before they split; ours gets the rows in the order that they draw."""
    probs = np.random.default_rng(1).dirichlet(np.ones(7), size=40)
    logits = torch.from_numpy(np.log(probs))
    for splits in (1, 10):
        metric = inception.InceptionScore(feature=Features(7), splits=splits)
        metric.update(logits)
        torch.manual_seed(5)
        order = torch.randperm(len(probs)).numpy()
        torch.manual_seed(5)
        mean, std = theirs_without_warning(metric) if splits == 1 else metric.compute()
        ours = inception_score(probs[order], splits)
        assert ours[0] == pytest.approx(float(mean), rel=1e-10)
        if splits > 1:  # theirs is the sample's (divided by n - 1), ours the family's
            assert ours[1] * np.sqrt(10 / 9) == pytest.approx(float(std), rel=1e-10)


def theirs_without_warning(metric):
    """One split has no standard deviation; torch warns of that."""
    with pytest.warns(UserWarning, match="degrees of freedom"):
        return metric.compute()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_precision_and_recall(features, k):
    theirs = prdc.compute_prdc(*features, nearest_k=k)
    found = precision_recall(*(torch.from_numpy(f) for f in features), k)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-12)
    assert 0 < found[0] < 1 and 0 < found[1] < 1
