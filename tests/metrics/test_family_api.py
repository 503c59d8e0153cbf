# SPDX-License-Identifier: Apache-2.0
"""A metric as the family's users write them, against the names and signatures that they know."""

import numpy as np
import pytest
import torch

import dnnlib
import dnnlib.plugins
from metrics import detectors, metric_main, metric_utils

INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
)


@pytest.fixture
def registry(monkeypatch):
    """A registry of the test's own."""
    mine = dnnlib.plugins.Registry("metric")
    monkeypatch.setattr(metric_main, "METRICS", mine)
    return mine


def compute_mean_shift(opts, max_real, num_gen):
    """Distance of the two means, and the largest variance of generated features."""
    detector_url = INCEPTION
    detector_kwargs = dict(return_features=True)
    mu_real, sigma_real = metric_utils.compute_feature_stats_for_dataset(
        opts=opts,
        detector_url=detector_url,
        detector_kwargs=detector_kwargs,
        rel_lo=0,
        rel_hi=0,
        capture_mean_cov=True,
        max_items=max_real,
    ).get_mean_cov()
    stats = metric_utils.compute_feature_stats_for_generator(
        opts=opts,
        detector_url=detector_url,
        detector_kwargs=detector_kwargs,
        rel_lo=0,
        rel_hi=1,
        batch_size=10,
        batch_gen=5,
        jit=False,
        capture_mean_cov=True,
        max_items=num_gen,
    )
    mu_gen, sigma_gen = stats.get_mean_cov()
    assert sigma_real.shape == sigma_gen.shape == (stats.num_features, stats.num_features)
    if opts.rank != 0:
        return float("nan"), float("nan")
    return float(np.square(mu_gen - mu_real).sum()), float(sigma_gen.max())


def shift20_full(opts):
    opts.dataset_kwargs.update(max_size=None, xflip=False)
    shift, spread = compute_mean_shift(opts, max_real=None, num_gen=20)
    return dict(shift20_full=shift, shift20_spread=spread)


def brightness(opts):
    """With a loop, a detector and a progress monitor of its own."""
    dataset = dnnlib.util.construct_class_by_name(**opts.dataset_kwargs)
    detector = metric_utils.get_feature_detector(
        url=INCEPTION, device=opts.device, num_gpus=opts.num_gpus, rank=opts.rank, verbose=False
    )
    assert metric_utils.get_feature_detector_name(INCEPTION) == "inception-2015-12-05"
    stats = metric_utils.FeatureStats(capture_all=True, max_items=7)
    progress = opts.progress.sub(tag="brightness", num_items=7, flush_interval=4, rel_lo=0, rel_hi=0.5)
    while not stats.is_full():
        z = torch.randn([3, opts.G.z_dim], device=opts.device)
        c = torch.zeros([3, opts.G.c_dim], device=opts.device)
        images = opts.G(z=z, c=c, **opts.G_kwargs)
        images = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
        stats.append_torch(detector(images, return_features=True), num_gpus=opts.num_gpus, rank=opts.rank)
        progress.update(stats.num_items)
    assert stats.get_all_torch().shape == (7, 12) and stats.num_items == 7
    return dict(brightness=stats.get_all().mean(), pictures=len(dataset))


def test_a_metric_of_the_family_runs_unchanged(
    registry, make_generator, dataset_kwargs, detector_folder, pictures, capsys
):
    """NVIDIA's file is asked for by URL and found where --detector says."""
    for function in (shift20_full, brightness):
        metric_main.register_metric(function)
    assert metric_main.list_valid_metrics() == ["shift20_full", "brightness"]
    G = make_generator()
    given = dict(dataset_kwargs, xflip=True, max_size=9)
    args = dict(G=G, dataset_kwargs=given, num_gpus=1, rank=0, device=torch.device("cpu"))
    progress = metric_utils.ProgressMonitor(verbose=True)
    result = metric_main.calc_metric(
        metric="shift20_full", detector=detector_folder, progress=progress, cache=True, **args
    )
    # The same from the pictures themselves: the tiny detector averages quarters.
    quarters = pictures.astype(np.float64).reshape(30, 2, 4, 2, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    real = quarters.reshape(30, 12) / 127.5
    opts = metric_utils.MetricOptions(**args)
    made = next(metric_utils.generated_batches(opts, 20, 20, 20)).double()
    made = torch.nn.functional.adaptive_avg_pool2d(made, 2).flatten(1).numpy() / 127.5
    expected = dict(
        shift20_full=np.square(made.mean(axis=0) - real.mean(axis=0)).sum(),
        shift20_spread=made.var(axis=0).max(),
    )
    assert result.results == pytest.approx(expected, rel=1e-5)
    assert given["xflip"] is True and given["max_size"] == 9  # what a metric overrides does not leak
    assert result.details.detector == "inception-2015-12-05" and result.details.num_real == 30
    assert "generator features" in capsys.readouterr().out


def test_a_loop_of_ones_own(registry, make_generator, dataset_kwargs, detector_folder, monkeypatch):
    monkeypatch.setattr(detectors, "local_file", lambda url: f"{detector_folder}/{url.rsplit('/', 1)[-1]}")
    metric_main.register_metric(brightness)
    result = metric_main.calc_metric(
        metric="brightness", G=make_generator(), dataset_kwargs=dataset_kwargs, device=torch.device("cpu")
    )
    assert 0.8 < result.results.brightness < 1.2 and result.results.pictures == 30


def test_signatures():
    """Positional arguments in the family's order."""
    import inspect

    def names(function):
        return [name for name in inspect.signature(function).parameters if name != "self"]

    options = ["G", "G_kwargs", "dataset_kwargs", "num_gpus", "rank", "device", "progress", "cache"]
    assert names(metric_utils.MetricOptions)[:8] == options
    common = ["opts", "detector_url", "detector_kwargs", "rel_lo", "rel_hi", "batch_size"]
    rest = ["data_loader_kwargs", "max_items", "stats_kwargs"]
    assert names(metric_utils.compute_feature_stats_for_dataset) == [*common, *rest]
    generator = names(metric_utils.compute_feature_stats_for_generator)
    assert generator[:8] == [*common, "batch_gen", "jit"] and generator[-1] == "stats_kwargs"
    monitor = [
        "tag",
        "num_items",
        "flush_interval",
        "verbose",
        "progress_fn",
        "pfn_lo",
        "pfn_hi",
        "pfn_total",
    ]
    assert names(metric_utils.ProgressMonitor) == monitor
    assert names(metric_utils.ProgressMonitor.sub) == [
        "tag",
        "num_items",
        "flush_interval",
        "rel_lo",
        "rel_hi",
    ]
    assert names(metric_utils.FeatureStats) == ["capture_all", "capture_mean_cov", "max_items"]
    assert names(metric_main.report_metric) == ["result_dict", "run_dir", "snapshot_pkl"]
    detector = ["url", "device", "num_gpus", "rank", "verbose"]
    assert names(metric_utils.get_feature_detector) == detector
