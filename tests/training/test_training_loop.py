# SPDX-License-Identifier: Apache-2.0
"""The loop: exact continuation, transfer, signals, and what it writes."""

import json
import os
import shutil
import signal

import numpy as np
import PIL.Image
import pytest
import torch

import dnnlib
from tests.helpers import assert_equal_states
from torch_utils import training_stats
from training import checkpoint, phases, snapshot, training_loop
from training.networks import Generator
from training.transfer import CoverageError


@pytest.fixture(autouse=True)
def fresh_statistics():
    """The reporting module is global: every run of a test starts from nothing, as a process does."""
    training_stats.load_state_dict({})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 random 16x16 pictures with two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rnd = np.random.RandomState(0)
    for i in range(24):
        PIL.Image.fromarray(rnd.randint(256, size=[16, 16, 3], dtype=np.uint8)).save(folder / f"{i:03d}.png")
    labels = [[f"{i:03d}.png", i % 2] for i in range(24)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return str(folder)


def options(pictures, run_dir, spatial=False, **changes):
    """A run of seconds: 16x16, batch 8, ADA, lazy phases of several intervals, conditional."""
    easy = dnnlib.EasyDict
    c = easy(
        run_dir=str(run_dir), total_kimg=0.08, batch_size=8, batch_gpu=4, kimg_per_tick=0.04, device="cpu"
    )
    data = "training.dataset.ImageFolderDataset"
    c.training_set_kwargs = easy(class_name=data, path=pictures, use_labels=True, max_size=None, xflip=False)
    c.data_loader_kwargs = easy(num_workers=0)
    widths = easy(channel_base=64, channel_max=8)
    c.G_kwargs = easy(
        class_name="training.networks.Generator", z_dim=8, w_dim=8, mapping_kwargs=easy(num_layers=1)
    )
    c.G_kwargs.synthesis_kwargs = easy(widths)
    c.D_kwargs = easy(class_name="training.networks.Discriminator", **widths)
    c.D_kwargs.mapping_kwargs = easy(num_layers=1)
    c.loss_kwargs = easy(class_name="training.loss.StyleGAN2Loss", r1_gamma=1)
    if spatial:
        c.G_kwargs.update(
            class_name="ssn_ext.networks.SpatialGenerator", z_dim=32, w_dim=32, latent_grid=[2, 2]
        )
        c.G_kwargs.synthesis_kwargs.encoder_kwargs = easy(channels=4)
        c.loss_kwargs.update(class_name="ssn_ext.loss.DistortionRegularizedLoss", lambda_d=5, dist_interval=2)
        c.tick_hooks = ["ssn_ext.hooks.ChangeMaps"]
    for net in ["G", "D"]:
        c[f"{net}_opt_kwargs"] = easy(class_name="torch.optim.Adam", lr=0.002, betas=[0.0, 0.99], eps=1e-8)
    c.update(G_reg_interval=2, D_reg_interval=3, ada_target=-2, ada_interval=3, ada_kimg=0.1)
    c.augment_kwargs = easy(class_name="training.augment.AugmentPipe", xflip=1, brightness=1, scale=1)
    c.update(image_snapshot_ticks=None, network_snapshot_ticks=2)
    c.update(changes)
    os.makedirs(run_dir, exist_ok=True)
    return c


def test_what_the_console_says_and_in_what_order(pictures, tmp_path, capsys):
    """The family's lines; the tables are those of both networks, and cost the run nothing."""
    c = options(pictures, tmp_path / "a", total_kimg=0.04, image_snapshot_ticks=1)
    training_loop.training_loop(**c)
    first = capsys.readouterr().out
    snapshots = sorted((tmp_path / "a").glob("network-snapshot-*.pkl"))
    training_stats.load_state_dict({})
    training_loop.training_loop(**{**c, "run_dir": str(tmp_path / "a")}, resume_pkl=str(snapshots[-1]))
    second = capsys.readouterr().out
    for text, resumes in [(first, False), (second, True)]:
        expected = [
            "Loading training set...", "Num images:  24", "Image shape: [3, 16, 16]", "Label shape: [2]",
            "Constructing networks...", 'Resuming from "', "Generator ", "Total", "Discriminator ",
            "Total", "Setting up augmentation...", "Distributing across 0 GPUs, 1 process on the CPU...",
            "Setting up training phases...", "Exporting sample images...", "Initializing logs...",
            "Training for 0.04 kimg...", "tick 0 ", "tick 1 ", "Exiting...",
        ]  # fmt: skip
        wanted = [line for line in expected if resumes or not line.startswith("Resuming")]
        found = [next((w for w in wanted if line.startswith(w)), None) for line in text.splitlines()]
        assert [line for line in found if line is not None] == wanted
    total = sum(
        p.numel() for p in Generator(**snapshot.load_network_pkl(snapshots[-1])["G"].init_kwargs).parameters()
    )
    assert f"\nTotal {total}".replace(" ", "") in first.replace(" ", "")


def test_grids_by_the_name_that_the_family_has_for_them(pictures, tmp_path):
    data = dnnlib.util.construct_class_by_name(**options(pictures, tmp_path / "x").training_set_kwargs)
    size, images, labels = training_loop.setup_snapshot_image_grid(data, random_seed=0)
    assert size == (32, 32) and images.shape == (1024, 3, 16, 16) and labels.shape == (1024, 2)
    path = tmp_path / "reals.png"
    training_loop.save_image_grid(images, path, drange=[0, 255], grid_size=size)
    with PIL.Image.open(path) as image:
        assert image.size == (512, 512)


def stop_after(monkeypatch, iterations):
    """Makes the run receive a stop request during its `iterations`-th iteration."""
    original = training_loop.Run.iterate

    def iterate(self):
        original(self)
        iterate.count += 1
        if iterate.count == iterations:
            self.stop.requested = True

    iterate.count = 0
    monkeypatch.setattr(training_loop.Run, "iterate", iterate)


def loss_lines(run_dir):
    """What stats.jsonl says, without times and memory."""
    with open(os.path.join(run_dir, "stats.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in line.items() if k.startswith(("Loss/", "Progress/"))} for line in lines]


@pytest.mark.parametrize(
    "spatial,stop,more",
    [(False, 1, {}), (False, 6, {}), (True, 4, {}), (True, 4, {"distortion": "features"})],
)
def test_a_stopped_run_goes_on_exactly(pictures, tmp_path, monkeypatch, spatial, stop, more):
    """Weights, optimisers, ADA, counters, statistics: all equal to those of the run that was never
    stopped."""
    whole = options(pictures, tmp_path / "whole", spatial)
    whole.loss_kwargs.update(more)
    assert training_loop.training_loop(**whole) is True
    training_stats.load_state_dict({})
    parts = options(pictures, tmp_path / "parts", spatial)
    parts.loss_kwargs.update(more)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert training_loop.training_loop(**parts) is False
    half = checkpoint.read(parts.run_dir)
    assert half["counters"]["nimg"] == 8 * stop
    training_stats.load_state_dict({})  # another process would know nothing
    torch.manual_seed(12345)
    np.random.seed(999)
    assert training_loop.training_loop(**parts, exact_resume=True) is True
    assert_equal_states(checkpoint.read(whole.run_dir), checkpoint.read(parts.run_dir))
    assert_equal_states(loss_lines(whole.run_dir), loss_lines(parts.run_dir), "stats.jsonl")
    assert float(checkpoint.read(whole.run_dir)["augment"]["p"]) > 0  # ADA really was at work


def test_longer_training_goes_on_from_a_finished_run(pictures, tmp_path):
    """--kimg may grow: the result is that of one longer run."""
    first = options(pictures, tmp_path / "a")
    training_loop.training_loop(**first)
    training_stats.load_state_dict({})
    training_loop.training_loop(**{**first, "total_kimg": 0.12}, exact_resume=True)
    training_stats.load_state_dict({})
    long = options(pictures, tmp_path / "b", total_kimg=0.12)
    training_loop.training_loop(**long)
    ours, theirs = checkpoint.read(first.run_dir), checkpoint.read(long.run_dir)
    for part in ["G", "D", "G_ema", "G_opt", "D_opt", "loss"]:
        assert_equal_states(ours[part], theirs[part], part)


def test_run_directory_and_snapshot(pictures, tmp_path):
    c = options(pictures, tmp_path / "run", spatial=True, image_snapshot_ticks=1)
    training_loop.training_loop(**c)
    names = sorted(os.listdir(c.run_dir))
    for name in [
        "reals.png",
        "fakes_init.png",
        "fakes000000.png",
        "changes000000.png",
        "stats.jsonl",
        "checkpoint.pt",
    ]:
        assert name in names
    assert not [name for name in names if name.endswith(".tmp")]
    data = snapshot.load_network_pkl(os.path.join(c.run_dir, "network-snapshot-000000.pkl"))
    assert list(data) == ["training_set_kwargs", "G", "D", "G_ema", "augment_pipe"]
    assert type(data["training_set_kwargs"]) is dict
    assert not any(p.requires_grad for p in data["G"].parameters()) and not data["G"].training
    with open(os.path.join(c.run_dir, "stats.jsonl")) as f:
        line = json.loads(f.readline())
    assert list(line)[-1] == "timestamp"
    for name in [
        "Loss/distortion",
        "Loss/scores/real",
        "Progress/kimg",
        "Timing/Gdist",
        "Resources/cpu_mem_gb",
    ]:
        assert set(line[name]) == {"num", "mean", "std"}
    assert line["Progress/tick"]["mean"] == 0


def test_transfer_starts_from_the_networks_of_a_snapshot(pictures, tmp_path, capsys):
    """And only from them: nothing of the new networks' own random values may remain."""
    first = options(pictures, tmp_path / "first")
    training_loop.training_loop(**first)
    path = os.path.join(first.run_dir, "network-snapshot-000000.pkl")
    run = training_loop.Run(
        training_loop.complete_config(
            options(pictures, tmp_path / "second", resume_pkl=path, random_seed=77)
        ),
        rank=0,
    )
    run.start()
    source = snapshot.load_network_pkl(path)
    for name in ["G", "D", "G_ema"]:
        for key, value in source[name].state_dict().items():
            assert torch.equal(getattr(run, name).state_dict()[key], value)
    assert run.counters.nimg == 0
    assert "copied" in capsys.readouterr().out


def test_transfer_refuses_other_widths(pictures, tmp_path):
    first = options(pictures, tmp_path / "first")
    training_loop.training_loop(**first)
    path = os.path.join(first.run_dir, "network-snapshot-000000.pkl")
    second = options(pictures, tmp_path / "second", resume_pkl=path)
    second.G_kwargs.mapping_kwargs.num_layers = 2
    with pytest.raises(CoverageError, match="fc1.weight .* has nothing to take; .* --allow-partial=mapping"):
        training_loop.training_loop(**second)


def test_transfer_with_allowed_differences(pictures, tmp_path, capsys):
    first = options(pictures, tmp_path / "first")
    training_loop.training_loop(**first)
    path = os.path.join(first.run_dir, "network-snapshot-000000.pkl")
    second = options(pictures, tmp_path / "second", resume_pkl=path, allow_partial=["mapping"])
    second.G_kwargs.mapping_kwargs.num_layers = 2
    run = training_loop.Run(training_loop.complete_config(second), rank=0)
    run.start()
    source = snapshot.load_network_pkl(path)
    assert torch.equal(run.G.mapping.fc0.weight, source["G"].mapping.fc0.weight)
    assert torch.equal(run.G.mapping.fc1.weight, run.G_ema.mapping.fc1.weight)
    assert (
        "G, G_ema re-initialised (mapping): mapping.fc1.weight, mapping.fc1.bias" in capsys.readouterr().out
    )


def test_metrics_of_snapshots_and_one_that_fails(pictures, tmp_path, monkeypatch, capsys):
    """The results are appended; a metric that cannot be computed is a warning, and training goes on."""
    from metrics import metric_main

    def mean_of_weights(opts):
        return dict(mean_of_weights=float(next(opts.G.parameters()).mean()))

    def broken(opts):
        raise ValueError("no such thing")

    for fn in [mean_of_weights, broken]:
        monkeypatch.setitem(metric_main.METRICS._targets, fn.__name__, fn)
    c = options(pictures, tmp_path / "run", metrics=["broken", "mean_of_weights"])
    assert training_loop.training_loop(**c) is True
    assert "Warning: broken could not be computed: ValueError: no such thing" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metric-mean_of_weights.jsonl").read_text().splitlines()
    assert [json.loads(line)["snapshot_pkl"] for line in lines] == ["network-snapshot-000000.pkl"] * 2


def test_metrics_of_one_snapshot_share_features(pictures, tmp_path, monkeypatch):
    """What one metric puts aside the next one finds; the next snapshot begins anew."""
    from metrics import metric_main

    def first(opts):
        opts.shared["pass"] = opts.shared.get("pass", 0) + 1
        return dict(first=opts.shared["pass"])

    def second(opts):
        return dict(second=10 * opts.shared["pass"])

    for fn in [first, second]:
        monkeypatch.setitem(metric_main.METRICS._targets, fn.__name__, fn)
    training_loop.training_loop(**options(pictures, tmp_path / "run", metrics=["first", "second"]))
    for name, value in [("first", 1), ("second", 10)]:
        lines = (tmp_path / "run" / f"metric-{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["results"][name] for line in lines] == [value] * 2


def test_no_more_workers_than_usable_cores(pictures, tmp_path, monkeypatch):
    """A scheduler that gives two cores of many gets two workers; PyTorch would warn of more."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    asked = []
    monkeypatch.setattr(
        training_loop.torch.utils.data, "DataLoader", lambda **kwargs: asked.append(kwargs) or []
    )
    c = options(pictures, tmp_path / "run", data_loader_kwargs=dict(num_workers=3, prefetch_factor=2))
    run = training_loop.Run(training_loop.complete_config(c), rank=0)
    run._load_data()
    run.counters = checkpoint.Counters(nimg=0)
    run._iterate_data()
    assert asked[0]["num_workers"] == 2


def test_training_goes_on_without_detectors(pictures, tmp_path, capsys):
    """A detector that is not there: one warning at the start."""
    c = options(
        pictures, tmp_path / "run", metrics=["fid50k_full"], metric_kwargs=dict(detector="/no/such/file")
    )
    assert training_loop.training_loop(**c) is True
    assert capsys.readouterr().out.count("Warning: training without fid50k_full: ") == 1


def test_abort_fn_and_progress_fn(pictures, tmp_path):
    calls = []
    c = options(pictures, tmp_path / "run")
    training_loop.training_loop(**c, abort_fn=lambda: True, progress_fn=lambda *kimg: calls.append(kimg))
    assert checkpoint.read(c.run_dir)["counters"]["nimg"] == 8  # ended at the first tick
    assert calls == [(0, 0.08), (0, 0.08)]


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="unknown options batchsize; it knows training_set_kwargs"):
        training_loop.training_loop(batchsize=3)


def test_first_signal_asks_and_a_later_one_acts(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        _two_signals(capsys)
    finally:
        signal.signal(signal.SIGINT, before)


def _two_signals(capsys):
    with training_loop.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert "SIGINT: finishing this step and saving" in capsys.readouterr().out
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same request, to the whole group
        stop.since -= stop.SAME + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_closed_output_does_not_hinder_the_request(monkeypatch):
    """As in `train.py | tee log`, where Ctrl-C ends tee first."""

    def broken(*_args, **_kwargs):
        raise BrokenPipeError

    with training_loop.StopSignals() as stop:
        monkeypatch.setattr("builtins.print", broken)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.undo()
        assert stop.requested


def test_worker_processes_change_nothing(pictures, tmp_path):
    """Prefetched pictures are not counted as seen: stopped with workers, continued with one, equal to none."""
    whole = options(pictures, tmp_path / "whole")
    training_loop.training_loop(**whole)
    training_stats.load_state_dict({})
    parts = options(pictures, tmp_path / "parts", total_kimg=0.04)
    parts.data_loader_kwargs = dict(num_workers=2, prefetch_factor=2)
    training_loop.training_loop(**parts)
    training_stats.load_state_dict({})
    parts.update(total_kimg=0.08, data_loader_kwargs=dict(num_workers=1))
    training_loop.training_loop(**parts, exact_resume=True)
    ours, theirs = checkpoint.read(whole.run_dir), checkpoint.read(parts.run_dir)
    for part in ["G", "D", "G_ema", "G_opt", "D_opt", "loss"]:
        assert_equal_states(ours[part], theirs[part], part)


def test_checkpoints_between_ticks(pictures, tmp_path, monkeypatch):
    """Where a tick takes too long the loop saves by itself, at any iteration."""
    saved = []
    original = training_loop.Run.checkpoint_now
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(
        training_loop.Run, "checkpoint_now", lambda run: (saved.append(run.counters.nimg), original(run))
    )
    training_loop.training_loop(**options(pictures, tmp_path / "run"))
    assert {0, 8, 16, 24, 32} <= set(saved)


def test_other_names_or_labels_are_no_continuation(pictures, tmp_path):
    """Of as many pictures: the order, and with it every batch, would be another one. A copy elsewhere is the same."""
    c = options(pictures, tmp_path / "run", total_kimg=0.016)
    training_loop.training_loop(**c)
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    c.training_set_kwargs.update(path=str(copy))
    assert training_loop.training_loop(**dict(c, total_kimg=0.024), exact_resume=True) is True
    table = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(
        json.dumps({"labels": [[name, 1 - label] for name, label in table["labels"]]})
    )
    with pytest.raises(
        checkpoint.CheckpointError, match="copy has other file names or labels than when the run"
    ):
        training_loop.training_loop(**dict(c, total_kimg=0.032), exact_resume=True)
    names = {name: name.replace("000", "zzz") for name, _ in table["labels"]}
    os.rename(copy / "000.png", copy / "zzz.png")
    (copy / "dataset.json").write_text(
        json.dumps({"labels": [[names[n], label] for n, label in table["labels"]]})
    )
    with pytest.raises(checkpoint.CheckpointError, match="other file names or labels"):
        training_loop.training_loop(**dict(c, total_kimg=0.032), exact_resume=True)


def test_another_data_set_is_no_continuation(pictures, tmp_path):
    c = options(pictures, tmp_path / "run")
    training_loop.training_loop(**c)
    more = tmp_path / "more"
    shutil.copytree(pictures, more)
    shutil.copy(more / "000.png", more / "024.png")
    c.training_set_kwargs.update(path=str(more), max_size=24)
    labels = json.loads((more / "dataset.json").read_text())["labels"]
    (more / "dataset.json").write_text(json.dumps({"labels": [*labels, ["024.png", 0]]}))
    with pytest.raises(checkpoint.CheckpointError, match="holds 25 pictures, 24 when the run began"):
        training_loop.training_loop(**{**c, "total_kimg": 0.12}, exact_resume=True)


def test_lazy_correction():
    """One step an iteration needs none; the family's pairs are i / (i + 1); every lazy phase adds its share."""
    assert phases.lazy_correction([1]) == 1
    assert phases.lazy_correction([1, 16]) == pytest.approx(16 / 17)
    assert phases.lazy_correction([1, 4, 4]) == pytest.approx(1 / 1.5)
    assert phases.lazy_correction([1, 1]) == 0.5


def test_draws_depend_on_seed_rank_and_images():
    seeds = {
        training_loop.draw_seed(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 32)]
    }
    assert len(seeds) == 5


# --- checkpoints --------------------------------------------------------------------------------------------


def test_checkpoint_errors(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint.pt in"):
        checkpoint.read(str(tmp_path))
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.read(str(tmp_path))
    torch.save(dict(something=1), tmp_path / "checkpoint.pt")
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint of version 1"):
        checkpoint.read(str(tmp_path))


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    class Broken:
        def state_dict(self):
            return {"x": lambda: None}  # cannot be pickled

    good = checkpoint.Checkpoint(counters=checkpoint.Counters(nimg=5))
    good.save(str(tmp_path))
    with pytest.raises(Exception, match="(?i)pickle"):
        checkpoint.Checkpoint(counters=Broken()).save(str(tmp_path))
    assert checkpoint.read(str(tmp_path)) == {"counters": {"nimg": 5}}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    stats = [json.dumps({"Progress/kimg": {"num": 1, "mean": kimg, "std": 0}}) for kimg in [0.0, 4.0, 8.0]]
    broken = b'\xff\xfe\x00\nnull\n[1]\n{"Progress/kimg": 1}\n'
    (tmp_path / "stats.jsonl").write_bytes(broken + "\n".join(stats).encode() + b'\n{"Progress/ki')
    metrics = [
        json.dumps({"snapshot_pkl": name})
        for name in ["network-snapshot-000004.pkl", "network-snapshot-000008.pkl", None]
    ]
    (tmp_path / "metric-fid5k.jsonl").write_text("\n".join(metrics))  # what is appended begins a line
    (tmp_path / "notes.jsonl").write_text("not ours")
    checkpoint.cut_back_logs(str(tmp_path), kimg=5.0)
    assert (tmp_path / "stats.jsonl").read_text() == "\n".join(stats[:2]) + "\n"
    assert (tmp_path / "metric-fid5k.jsonl").read_text() == "\n".join([metrics[0], metrics[2]]) + "\n"
    assert (tmp_path / "notes.jsonl").read_text() == "not ours"


def test_snapshot_errors(tmp_path):
    missing = tmp_path / "missing.pkl"
    with pytest.raises(snapshot.SnapshotError, match="cannot read .*missing.pkl: No such file"):
        snapshot.load_network_pkl(missing)
    (tmp_path / "noise.pkl").write_bytes(os.urandom(100))
    with pytest.raises(snapshot.SnapshotError, match="noise.pkl is not a network snapshot"):
        snapshot.load_network_pkl(tmp_path / "noise.pkl")
    G = Generator(4, 0, 4, 8, 3, synthesis_kwargs=dict(channel_base=16, channel_max=4))
    snapshot.save_network_pkl(tmp_path / "half.pkl", G=G, D=None, G_ema=G)
    with pytest.raises(snapshot.SnapshotError, match="D is missing or not a network"):
        snapshot.load_network_pkl(tmp_path / "half.pkl")
