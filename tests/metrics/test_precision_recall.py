# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from metrics import metric_main
from metrics.precision_recall import neighbour_radii, precision_recall, share_inside


def brute_force(real, gen, k):
    def covered(probes, points):
        hits = 0
        for probe in probes:
            radii = [sorted(np.linalg.norm(points - point, axis=1))[k] for point in points]
            hits += any(np.linalg.norm(probe - p) <= r for p, r in zip(points, radii, strict=True))
        return hits / len(probes)

    return covered(gen, real), covered(real, gen)


def test_against_brute_force_whatever_the_batches():
    rnd = np.random.default_rng(0)
    real = rnd.standard_normal([25, 3]).astype(np.float16).astype(np.float32)
    gen = (rnd.standard_normal([18, 3]) * 0.8 + 0.8).astype(np.float16).astype(np.float32)
    expected = brute_force(real, gen, 1)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for sizes in [(10000, 10000), (4, 7), (1, 2)]:
        found = precision_recall(torch.from_numpy(real), torch.from_numpy(gen), 1, *sizes)
        assert found == pytest.approx(expected)


def test_radii_on_a_line():
    points = torch.arange(5.0)[:, None]
    assert neighbour_radii(points, 1).tolist() == [1, 1, 1, 1, 1]
    assert neighbour_radii(points, 3, 2, 2).tolist() == [3, 2, 2, 2, 3]
    assert share_inside(torch.tensor([[0.5], [9.0]]), points, torch.ones(5)) == 0.5


def test_a_generator_that_knows_one_of_two_modes():
    """Every picture is good (precision 1), half of the data is missed (recall 1/2); and the reverse."""
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    both, one = torch.cat([grid, grid + 100]), grid + 0.0625
    assert precision_recall(both, one) == (1.0, 0.5)
    assert precision_recall(one, both) == (0.5, 1.0)


def test_too_few():
    with pytest.raises(ValueError, match="more than 3 pictures, not 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_metric(make_generator, dataset_kwargs, detector_file, detector_folder, monkeypatch):
    small = dict(max_real=20, num_gen=12, nhood_size=3, row_batch_size=8, col_batch_size=5)
    monkeypatch.setattr(metric_main.METRICS.resolve("pr50k3"), "settings", small)
    args = dict(G=make_generator(), dataset_kwargs=dataset_kwargs, device="cpu")
    result = metric_main.calc_metric("pr50k3", detector=detector_folder, **args)
    assert list(result.results) == ["pr50k3_precision", "pr50k3_recall"]
    assert result.details.detector == "vgg16"
    result = metric_main.calc_metric("pr50k3", detector=detector_file, **args)
    assert list(result.results) == ["pr50k3_tiny_net_precision", "pr50k3_tiny_net_recall"]
