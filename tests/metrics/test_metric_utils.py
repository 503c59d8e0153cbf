# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from metrics import metric_main, metric_utils
from metrics.metric_utils import FeatureStats, MetricOptions, ProgressMonitor
from torch_utils import distributed

FEATURES = dict(return_features=True)


def options(G=None, **kwargs):
    return MetricOptions(G=G, device="cpu", **kwargs)


def test_options_are_copies():
    given = dict(xflip=True)
    opts = options(dataset_kwargs=given)
    opts.dataset_kwargs.update(xflip=False)
    assert given == dict(xflip=True)


# Statistics.


def test_mean_and_covariance():
    x = np.random.default_rng(0).standard_normal([50, 4]).astype(np.float32)
    for flags in (dict(capture_mean_cov=True), dict(capture_all=True)):
        stats = FeatureStats(max_items=40, **flags)
        for part in np.split(x, [7, 7, 30]):
            stats.append(part)
        assert stats.is_full() and stats.num_items == 40 and stats.num_features == 4
        mean, cov = stats.get_mean_cov()
        assert mean == pytest.approx(x[:40].mean(axis=0, dtype=np.float64), rel=1e-6)
        assert cov == pytest.approx(np.cov(x[:40].T.astype(np.float64), bias=True), rel=1e-6)
    assert np.array_equal(stats.get_all(), x[:40])
    assert torch.equal(stats.get_all_torch(), torch.from_numpy(x[:40]))


def test_broken_features():
    with pytest.raises(ValueError, match="NaN or infinite"):
        FeatureStats(capture_all=True).append([[1.0, float("nan")]])
    stats = FeatureStats(capture_all=True)
    stats.append([[1, 2]])
    with pytest.raises(ValueError, match="3 values came after features of 2"):
        stats.append([[1, 2, 3]])


def test_statistics_files(tmp_path):
    stats = FeatureStats(capture_all=True, capture_mean_cov=True)
    stats.append([[1, 2], [3, 4]])
    stats.save(tmp_path / "a.pkl")
    again = FeatureStats.load(tmp_path / "a.pkl")
    assert list(vars(again)) == list(FeatureStats.FIELDS)
    assert np.array_equal(again.get_all(), stats.get_all())
    assert np.array_equal(again.get_mean_cov()[1], stats.get_mean_cov()[1])
    plain = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert type(plain) is dict and list(plain) == list(FeatureStats.FIELDS)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(pickle.UnpicklingError, match="cannot hold posix.getcwd|cannot hold nt.getcwd"):
        FeatureStats.load(tmp_path / "b.pkl")


# Random draws.


def test_latents_belong_to_the_picture(make_generator):
    opts = options(make_generator())
    z, t, picks = metric_utils.latents(opts, range(400), count=2, num_labels=7)
    assert z.shape == (400, 2, 5) and z.dtype == t.dtype == torch.float32 and picks.shape == (400, 2)
    some = metric_utils.latents(opts, [3, 250], count=2, num_labels=7)
    assert torch.equal(some[0], z[[3, 250]]) and torch.equal(some[1], t[[3, 250]])
    assert np.array_equal(some[2], picks[[3, 250]])
    assert abs(float(z.mean())) < 0.1 and abs(float(z.std()) - 1) < 0.05
    assert sorted(set(picks.flat)) == list(range(7)) and 0 <= t.min() and t.max() < 1
    other = metric_utils.latents(options(make_generator(), seed=1), range(2), count=2)
    assert not torch.equal(other[0], z[:2])


def test_seeded_leaves_no_trace():
    before = torch.get_rng_state()
    draws = []
    for numbers in [(0, 1), (0, 1), (0, 2)]:
        with metric_utils.seeded(torch.device("cpu"), *numbers):
            draws.append(torch.randn(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


# Features.


def generated(G, detector, **kwargs):
    opts = options(G, **kwargs)
    stats = metric_utils.compute_feature_stats_for_generator(
        opts, detector, FEATURES, capture_all=True, max_items=21
    )
    return stats.get_all()


def test_batch_sizes_do_not_matter(make_generator, detector_file):
    G = make_generator().train()
    found = [generated(G, detector_file, batch_size=b, batch_gen=g) for b, g in [(64, None), (4, 4), (5, 2)]]
    assert found[0].shape == (21, 12) and G.training
    for other in found[1:]:
        assert np.allclose(found[0], other, atol=1e-5)
    assert not np.allclose(found[0], generated(G, detector_file, seed=1), atol=1e-2)
    noisy = make_generator(noise=0.5)
    assert np.array_equal(generated(noisy, detector_file), generated(noisy, detector_file))


def test_labels_are_those_of_random_pictures(make_generator, dataset_kwargs):
    opts = options(make_generator(c_dim=3), dataset_kwargs=dict(dataset_kwargs, use_labels=True))
    dataset = metric_utils.label_dataset(opts)
    _, _, picks = metric_utils.latents(opts, range(9), num_labels=len(dataset))
    labels = metric_utils.labels_for(opts, dataset, picks)
    assert labels.argmax(dim=2)[:, 0].tolist() == [int(i) % 3 for i in picks[:, 0]]
    assert next(iter(metric_utils.generated_batches(opts, 4, 4, 4))).shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match="wants labels of length 3, those of data have length 0"):
        metric_utils.label_dataset(options(make_generator(c_dim=3), dataset_kwargs=dataset_kwargs))
    with pytest.raises(ValueError, match="specify --data"):
        metric_utils.label_dataset(options(make_generator(c_dim=3)))


def real(dataset_kwargs, detector, max_items=None, ask=FEATURES, **kwargs):
    flags = kwargs.pop("flags", dict(capture_mean_cov=True))
    opts = options(dataset_kwargs=dataset_kwargs, **kwargs)
    return metric_utils.compute_feature_stats_for_dataset(opts, detector, ask, max_items=max_items, **flags)


def test_real_features_are_in_order(dataset_kwargs, pictures, detector_file):
    stats = real(dataset_kwargs, detector_file, max_items=25, flags=dict(capture_all=True), batch_size=4)
    x = pictures[:25].reshape(25, 2, 4, 2, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(25, 12)
    assert np.allclose(stats.get_all(), x / 127.5, atol=1e-5)
    mirrored = real(dict(dataset_kwargs, xflip=True), detector_file)
    assert mirrored.num_items == 60


def test_the_cache_names_everything_that_matters(dataset_kwargs, detector_file, cache, script, tmp_path):
    def files():
        return sorted(os.listdir(cache / "gan-metrics"))

    first = real(dataset_kwargs, detector_file)
    assert len(files()) == 1 and files()[0].startswith("data-tiny-net-")
    again = real(dataset_kwargs, detector_file, batch_size=7)  # from the file
    assert np.array_equal(again.raw_cov, first.raw_cov) and len(files()) == 1
    reordered = dict(reversed(list(dataset_kwargs.items())))
    real(reordered, detector_file)
    assert len(files()) == 1
    real(dataset_kwargs, detector_file, max_items=20)
    real(dict(dataset_kwargs, xflip=True), detector_file)
    real(dataset_kwargs, detector_file, ask=dict(no_output_bias=True))
    assert len(files()) == 4
    os.utime(os.path.join(dataset_kwargs["path"], "img00.png"), ns=(1, 1))  # the data changed
    real(dataset_kwargs, detector_file)
    assert len(files()) == 5
    with open(detector_file, "rb") as f:
        altered = zip_with_note(f.read(), tmp_path / "new" / "tiny-net.pt")
    real(dataset_kwargs, altered)  # same name, another file
    assert len(files()) == 6


def zip_with_note(data, path):
    """The same TorchScript archive with a comment: another sha256."""
    path.parent.mkdir()
    path.write_bytes(data)
    with zipfile.ZipFile(path, "a") as z:
        z.comment = b"note"
    return str(path)


def test_a_file_that_answers_less_is_computed_again(dataset_kwargs, detector_file, cache, monkeypatch):
    real(dataset_kwargs, detector_file)
    assert real(dataset_kwargs, detector_file, flags=dict(capture_all=True)).get_all().shape == (30, 12)
    monkeypatch.setattr(metric_utils, "real_batches", None)  # from now on only the file will do
    assert real(dataset_kwargs, detector_file).get_mean_cov()[1].shape == (12, 12)
    with pytest.raises(TypeError):
        real(dataset_kwargs, detector_file, cache=False)


def test_a_broken_file_is_written_again(dataset_kwargs, detector_file, cache):
    real(dataset_kwargs, detector_file)
    (file,) = (cache / "gan-metrics").iterdir()
    file.write_bytes(b"half a fi")
    with pytest.warns(UserWarning, match="is broken and will be written again"):
        real(dataset_kwargs, detector_file)
    assert FeatureStats.load(file).num_items == 30


def test_metrics_of_one_call_share_features(make_generator, dataset_kwargs, detector_file, monkeypatch):
    shared = {}
    G = make_generator()

    def both(flags):
        opts = options(G, dataset_kwargs=dataset_kwargs, shared=shared, cache=False)
        args = (opts, detector_file, FEATURES)
        found = metric_utils.compute_feature_stats_for_dataset(*args, **flags)
        return found, metric_utils.compute_feature_stats_for_generator(*args, max_items=10, **flags)

    first = both(dict(capture_mean_cov=True))
    monkeypatch.setattr(metric_utils, "real_batches", None)
    monkeypatch.setattr(metric_utils, "generated_batches", None)
    second = both(dict(capture_all=True))
    assert first[0] is second[0] and first[1] is second[1] and len(second[1].get_all()) == 10


def test_fingerprint(tmp_path, dataset_kwargs):
    def zipped(name, text):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            z.writestr("a.txt", text)
        return metric_utils.data_fingerprint(dict(path=str(tmp_path / name)))

    assert zipped("a.zip", "same") == zipped("b.zip", "same") != zipped("c.zip", "not the same")
    assert metric_utils.data_fingerprint(dict(class_name="x.y", size=3)) is None
    before = metric_utils.data_fingerprint(dataset_kwargs)
    os.remove(os.path.join(dataset_kwargs["path"], "img07.png"))
    assert metric_utils.data_fingerprint(dataset_kwargs) != before


def test_the_resize_filter_that_the_data_says(tmp_path, dataset_kwargs, detector_file):
    def noted(text):
        (tmp_path / "data" / "dataset.json").write_text(text)
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as z:
            z.writestr("dataset.json", text)
        paths = (dataset_kwargs["path"], str(tmp_path / "data.zip"))
        return {metric_utils.resize_filter_of(dict(path=path)) for path in paths}

    assert noted('{"labels": null, "made_by": {"resize_filter": "box", "tool": "x"}}') == {"box"}
    for text in ('{"labels": null}', "[1]", "not json", '{"made_by": null}', '{"made_by": {}}'):
        assert noted(text) == {None}
    assert metric_utils.resize_filter_of({}) is metric_utils.resize_filter_of(dict(path="nowhere")) is None
    noted('{"labels": null, "made_by": {"resize_filter": "lanczos"}}')
    opts = options(dataset_kwargs=dataset_kwargs)
    metric_utils.compute_feature_stats_for_dataset(opts, detector_file, FEATURES, capture_all=True)
    assert opts.details.data_resize == "lanczos"


def test_the_generators_precision_is_recorded(make_generator):
    G = make_generator()
    assert options(G).details.dtype == "float32"
    G.use_fp16 = True
    assert options(G).details.dtype == "float32"  # a CPU does not use it
    on_gpu = dict(G=G, device="cuda")
    assert MetricOptions(**on_gpu).details.dtype == "float16 and float32"
    assert MetricOptions(G_kwargs=dict(force_fp32=True), **on_gpu).details.dtype == "float32"


# Progress.


def test_progress(capsys):
    calls = []
    whole = ProgressMonitor(verbose=True, progress_fn=lambda *a: calls.append(a), pfn_total=100, pfn_hi=100)
    stage = whole.sub("faces", num_items=40, flush_interval=10, rel_lo=0.5, rel_hi=1)
    for items in (5, 10, 15, 40):
        stage.update(items)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["faces", "items", "10/40"], ["faces", "items", "40/40"]]
    assert " eta " in lines[0] and " eta " not in lines[1]
    assert calls == [(0, 100), (50, 100), (62.5, 100), (100, 100)]


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    stage = ProgressMonitor("faces", num_items=3, verbose=True)
    stage.shown_time -= 1
    stage.update(1)
    stage.update(2)  # too soon after the last
    stage.update(3)
    text = capsys.readouterr().out
    assert text.count("\r") == 2 and text.count("\n") == 1 and text.endswith("\n")
    lines = [line.rstrip() for line in text.split("\r")[1:]]
    assert lines[0].startswith("faces                33% 1/3, ") and "eta " in lines[0]
    assert lines[1].startswith("faces               100% 3/3, ") and lines[1].endswith("in 0s")
    endless = ProgressMonitor("a stage with a rather long name, " * 4, verbose=True)
    endless.shown_time -= 1
    endless.update(7)
    assert len(capsys.readouterr().out) == 80  # what goes round at the edge cannot be rewritten


# Several processes.


def _all_features(opts, detector):
    args = (opts, detector, FEATURES)
    found = metric_utils.compute_feature_stats_for_dataset(*args, capture_all=True)
    made = metric_utils.compute_feature_stats_for_generator(*args, capture_all=True, max_items=9)
    return found.get_all(), made.get_all()


def _process(rank, folder, kwargs, detector):
    """One of two processes: writes the features that it has in the end."""
    distributed.init_process(rank, 2, f"file://{folder}/meet", "cpu")
    opts = options(num_gpus=2, rank=rank, batch_size=4, cache=False, **kwargs)
    real, made = _all_features(opts, detector)
    np.savez(os.path.join(folder, f"{rank}.npz"), real=real, made=made)
    failure = _failure(opts, detector)
    with open(os.path.join(folder, f"{rank}.txt"), "w") as f:
        f.write(f"{type(failure).__name__}: {failure}")
    torch.distributed.destroy_process_group()


def _failure(opts, detector):
    """What a metric raises here when a picture is broken that only one of two processes reads."""
    with open(os.path.join(opts.dataset_kwargs.path, "img13.png"), "r+b") as f:
        f.truncate(60)

    def metric(_opts):
        stats = metric_utils.compute_feature_stats_for_dataset(opts, detector, FEATURES, capture_all=True)
        return dict(rows=stats.num_items)

    metric_main.METRICS.register("broken_picture", metric)
    try:
        metric_main.calc_metric("broken_picture", device="cpu", num_gpus=2, rank=opts.rank)
    except Exception as err:
        return err


def test_two_processes_find_the_features_of_one(
    tmp_path, make_generator, dataset_kwargs, detector_file, pictures
):
    """Afterwards one of them fails, and both say so."""
    kwargs = dict(G=make_generator(), dataset_kwargs=dict(dataset_kwargs, max_size=29))
    context = torch.multiprocessing.get_context("spawn")
    args = (str(tmp_path), kwargs, detector_file)
    workers = [context.Process(target=_process, args=(rank, *args)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    mine, others = sorted((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert mine.startswith("OSError: Image 'img13.png' in ")
    assert others == f"PeerError: another process failed, {mine}"  # and did not wait for it
    with open(tmp_path / "data" / "img13.png", "wb") as f:
        PIL.Image.fromarray(pictures[13]).save(f, "png")
    real, made = _all_features(options(**kwargs), detector_file)
    assert len(real) == 29 and len(made) == 9
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert np.allclose(found["real"], real, atol=1e-5) and np.allclose(found["made"], made, atol=1e-5)
        found.close()


def test_the_share_of_each_process():
    shares = [metric_utils.shares(5, options(num_gpus=2, rank=rank)) for rank in range(2)]
    assert shares == [[0, 2, 4], [1, 3, 5]]
