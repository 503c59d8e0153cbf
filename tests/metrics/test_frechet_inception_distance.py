# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import scipy.linalg
import torch

from metrics import metric_main
from metrics.frechet_inception_distance import frechet_distance


def random_covariance(rnd, size, rank=None):
    a = rnd.standard_normal([size, rank or 3 * size])
    return a @ a.T / a.shape[1]


def test_one_dimensional_gaussians():
    assert frechet_distance([1.0], [[4.0]], [3.0], [[25.0]]) == pytest.approx((1 - 3) ** 2 + (2 - 5) ** 2)


def test_diagonal_covariances_in_a_rotated_frame():
    rnd = np.random.default_rng(0)
    q, _ = np.linalg.qr(rnd.standard_normal([6, 6]))
    a, b = rnd.uniform(0.5, 2, [2, 6])
    m0, m1 = rnd.standard_normal([2, 6])
    expected = ((m0 - m1) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(m0, (q * a) @ q.T, m1, (q * b) @ q.T) == pytest.approx(expected, rel=1e-12)


def test_agrees_with_the_matrix_root():
    rnd = np.random.default_rng(1)
    c0, c1 = random_covariance(rnd, 20), random_covariance(rnd, 20)
    m0, m1 = rnd.standard_normal([2, 20])
    root = scipy.linalg.sqrtm(c0 @ c1).real
    expected = ((m0 - m1) ** 2).sum() + np.trace(c0 + c1 - 2 * root)
    assert frechet_distance(m0, c0, m1, c1) == pytest.approx(expected, rel=1e-9)


def test_rank_one_covariances():
    a, b = np.random.default_rng(2).standard_normal([2, 50])  # tr (aa'bb')^(1/2) = |a.b|
    expected = a @ a + b @ b - 2 * abs(a @ b)
    zero = np.zeros(50)
    assert frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b)) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_features():
    rnd = np.random.default_rng(3)
    c0, c1 = random_covariance(rnd, 60, rank=20), random_covariance(rnd, 60, rank=25)
    zero = np.zeros(60)
    value = frechet_distance(zero, c0, zero, c1)
    lifted = frechet_distance(zero, c0 + 1e-12 * np.eye(60), zero, c1 + 1e-12 * np.eye(60))
    assert value == pytest.approx(lifted, rel=1e-4)
    assert value == pytest.approx(frechet_distance(zero, c1, zero, c0), rel=1e-10)
    assert frechet_distance(zero, c0, zero, c0) < 1e-10 * np.trace(c0)


def test_degenerate():
    zero, none = np.zeros(4), np.zeros([4, 4])
    assert frechet_distance(zero, none, zero, none) == 0
    assert frechet_distance(zero, none, zero + 2, np.eye(4)) == pytest.approx(4 * 4 + 4)


def tiny_features(pictures):
    """What the tiny detector sees in uint8 pictures [N, 8, 8, 3]: float64 [N, 12]."""
    x = pictures.astype(np.float64).reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4))  # [N, 2, 2, 3]
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1) / 127.5


def run(name, G, dataset_kwargs, detector, **kwargs):
    return metric_main.calc_metric(
        name, G=G, dataset_kwargs=dataset_kwargs, detector=detector, device="cpu", **kwargs
    )


@pytest.mark.filterwarnings("ignore:The Frechet distance of 10 pictures")
def test_metric_is_the_distance_of_the_features(
    make_generator, dataset_kwargs, pictures, detector_folder, monkeypatch
):
    monkeypatch.setattr(metric_main.METRICS.resolve("fid1k"), "settings", dict(max_real=10, num_gen=40))
    result = run("fid1k", make_generator(), dataset_kwargs, detector_folder)
    real = tiny_features(pictures[:10])

    from metrics import metric_utils

    opts = metric_utils.MetricOptions(G=make_generator(), device="cpu")
    made = torch.cat(list(metric_utils.generated_batches(opts, 40, 7, 7))).permute(0, 2, 3, 1).numpy()
    made = tiny_features(made)
    covs = [np.cov(f.T, bias=True) for f in (real, made)]
    expected = frechet_distance(real.mean(axis=0), covs[0], made.mean(axis=0), covs[1])
    assert result.results == {"fid1k": pytest.approx(expected, rel=1e-5)}
    details = result.details
    assert (details.num_real, details.num_gen, details.dtype) == (10, 40, "float32")
    assert details.detector == "inception-2015-12-05" and len(details.detector_sha256) == 64
    assert len(details.data_hash) == 64 and details.seed == 0


def test_other_detectors_give_other_keys_and_few_pictures_a_warning(
    make_generator, dataset_kwargs, detector_file, monkeypatch
):
    monkeypatch.setattr(metric_main.METRICS.resolve("fid5k"), "settings", dict(max_real=None, num_gen=8))
    with pytest.warns(UserWarning, match="8 pictures in 12 features"):
        result = run("fid5k", make_generator(), dataset_kwargs, detector_file)
    assert list(result.results) == ["fd5k_tiny_net"]
    assert result.details.num_real == 30
