# SPDX-License-Identifier: Apache-2.0
"""train.py: what a run keeps and logs: best and latest snapshots, TensorBoard, Weights & Biases, the progress bar."""

import io
import json
import os
import re
import sys

import pytest
import torch

import dnnlib
from metrics import metric_main
from training import hooks, running, trackers

KIMG = ["--batch=500", "--aug=noaug", "--set=kimg_per_tick=0.5", "--set=image_snapshot_ticks=null"]


@pytest.fixture
def metric(monkeypatch):
    """Function that registers a metric which gives the values of a list one after the other; it returns the list of
    the generators' constants that it was shown."""

    def register(name, values, **attributes):
        values, seen = iter(values), []

        def fake(opts):
            seen.append(opts.G.synthesis.b4.const.clone())
            value = next(values)
            return value if isinstance(value, dict) else {name: value}

        fake.__dict__.update(attributes)
        monkeypatch.setitem(metric_main.METRICS._targets, name, fake)
        return seen

    return register


# --- snapshots ----------------------------------------------------------------------------------------------


def test_best_and_latest_snapshots_over_a_continuation(tiny_run, metric):
    """Ticks at 0.5, 1, 1.5, 2 kimg with values 5, 3, 4, 6; then, continued, 4, 2.5, at 2.5 and 3 kimg."""
    seen = metric("fid_fake", [5, 3, 4, 6])
    first = tiny_run(*KIMG, "--snap=1", "--kimg=2", "--best=fid_fake", "--keep-last=2", short=False)
    assert first.status == 0, first.output
    latest = ["network-snapshot-000001.pkl", "network-snapshot-000002.pkl"]
    assert first.snapshots() == [*latest, "network-snapshot-best.pkl"]
    best = json.loads((first.dir / "best.json").read_text())
    assert best == dict(metric="fid_fake", value=3, kimg=1.0, snapshot_pkl="network-snapshot-000001.pkl")
    assert torch.equal(first.networks("network-snapshot-best.pkl")["G_ema"].synthesis.b4.const, seen[1])
    assert re.findall(r"Best fid_fake so far: (\S+)", first.output) == [
        "network-snapshot-000000.pkl",
        latest[0],
    ]

    seen = metric("fid_fake", [4, 2.5])
    result = tiny_run(f"--resume={first.dir}", "--kimg=3", new=False)
    assert result.status == 0, result.output
    better = dict(best, value=2.5, kimg=3.0, snapshot_pkl="network-snapshot-000003.pkl")
    assert json.loads((first.dir / "best.json").read_text()) == better
    assert torch.equal(first.networks("network-snapshot-best.pkl")["G_ema"].synthesis.b4.const, seen[1])
    assert first.snapshots() == [*latest[1:], "network-snapshot-000003.pkl", "network-snapshot-best.pkl"]


@pytest.mark.parametrize(
    "choice,values,expected",
    [
        ("is_fake", [{"is_fake_mean": 2, "is_fake_std": 9}, {"is_fake_mean": 3, "is_fake_std": 0}], 3),
        ("pr_fake_recall", [{"pr_fake_precision": 1, "pr_fake_recall": 0.1}] * 2, 0.1),
        ("pr_fake_precision", [{"pr_fake_precision": 1, "pr_fake_recall": 0.1}] * 2, 1),
        ("kid_fake", [float("nan"), 7], 7),
        ("ppl_fake", [7, float("nan")], 7),
        ("other", [1, 2], 2),
    ],
)
def test_which_way_is_better(tiny_run, metric, choice, values, expected):
    name = choice.removesuffix("_recall").removesuffix("_precision")
    metric(name, [values[0], *[values[1]] * 3], better="higher")
    result = tiny_run("--snap=1", f"--best={choice}")
    assert result.status == 0, result.output
    best = json.loads((result.dir / "best.json").read_text())
    assert best["metric"] == choice and best["value"] == expected
    assert result.options()["metrics"] == [name]  # it is run though --metrics does not name it


def test_best_of_another_metric_or_of_a_later_time_does_not_count(tmp_path):
    """After a continuation from an older checkpoint, or with another --best."""
    run = dnnlib.EasyDict(
        c=dnnlib.EasyDict(run_dir=str(tmp_path), exact_resume=True, best="fid50k"), kimg=5.0
    )
    for record, expected in [(("fid50k", 4), 1.5), (("fid50k", 6), None), (("kid50k", 4), None)]:
        (tmp_path / "best.json").write_text(
            json.dumps(dict(zip(["metric", "kimg"], record, strict=True), value=1.5))
        )
        hook = hooks.KeepBest(run)
        hook.start()
        assert hook.best == expected


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"metric": "fid50k"}', '{"metric": "x", "kimg": [], "value": 1}']
)
def test_a_damaged_record_of_the_best_is_named(tmp_path, text):
    """Going on without it would replace the best snapshot."""
    run = dnnlib.EasyDict(
        c=dnnlib.EasyDict(run_dir=str(tmp_path), exact_resume=True, best="fid50k"), kimg=5.0
    )
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(OSError, match="best.json is damaged; without it the next snapshot is the best"):
        hooks.KeepBest(run).start()


def test_only_own_and_past_snapshots_are_deleted(tmp_path):
    names = ["network-snapshot-000002.pkl", "network-snapshot-000004.pkl", "network-snapshot-000006.pkl"]
    others = [
        "network-snapshot-000009.pkl",
        "network-snapshot-best.pkl",
        "network-snapshot-000001.pkl.txt",
        "my.pkl",
    ]
    for name in [*names, *others]:
        (tmp_path / name).write_text("")
    c = dnnlib.EasyDict(run_dir=str(tmp_path), keep_last=1)
    run = dnnlib.EasyDict(c=c, is_main=True, snapshot_pkl="x", counters=dnnlib.EasyDict(nimg=6000))
    for change in [dict(is_main=False), dict(snapshot_pkl=None), dict(c=dnnlib.EasyDict(c, keep_last=None))]:
        hooks.KeepLast(dnnlib.EasyDict(run, **change)).tick()
        assert len(os.listdir(tmp_path)) == 7
    hooks.KeepLast(run).tick()
    assert sorted(os.listdir(tmp_path)) == sorted([names[2], *others])


def test_names_to_judge_by(metric):
    assert running.parse_best("fid50k_full") == ("fid50k_full", "", "lower")
    assert running.parse_best("ppl") == ("ppl", "", "lower")
    assert running.parse_best("is50k") == ("is50k", "", "higher")
    assert running.parse_best("pr50k3_full_recall") == ("pr50k3_full", "_recall", "higher")
    with pytest.raises(running.ConfigError, match="there are pr50k3_full_precision, pr50k3_full_recall, p"):
        running.parse_best("pr50k3")
    with pytest.raises(
        running.ConfigError, match="--best=bogus is not a number to judge by; there are fid50k_full, k"
    ):
        running.parse_best("bogus")
    metric("other", [])
    with pytest.raises(running.ConfigError, match="--best=other: nobody said which way is better"):
        running.parse_best("other")


# --- trackers -----------------------------------------------------------------------------------------------


def test_tensorboard(tiny_run, metric):
    """Every statistic, the metrics and the grids, at whole kimg, also of a continued run."""
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metric("fid_fake", [5, 3, 4, 2])
    args = [*KIMG[:3], "--snap=1", "--kimg=1", "--metrics=fid_fake"]
    first = tiny_run(*args, "--log=tensorboard", short=False)
    assert first.status == 0, first.output
    assert tiny_run(f"--resume={first.dir}", "--kimg=2", new=False).status == 0
    events = EventAccumulator(str(first.dir)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("Metrics/fid_fake")] == [(0, 5), (1, 3), (1, 4), (2, 2)]
    expected = [line["Loss/D/loss"]["mean"] for line in first.stats()]
    assert [e.value for e in events.Scalars("Loss/D/loss")] == pytest.approx(expected)
    assert [e.step for e in events.Images("fakes")][0] == 0 and events.Images("reals")[0].width == 32 * 8
    assert "Progress/nonfinite" in events.Tags()["scalars"]


WANDB = """
import json, os
class Image:
    def __init__(self, path): self.path = path
class Run:
    def write(self, **entry):
        with open(os.environ["WANDB_LOG"], "a") as f:
            f.write(json.dumps(entry, default=lambda image: os.path.basename(image.path)) + "\\n")
    def log(self, data, step): self.write(data=data, step=step)
    def finish(self): self.write(finished=True)
def init(**kwargs):
    if os.environ.get("WANDB_REFUSES"): raise RuntimeError("api_key not configured")
    run = Run()
    run.write(init={**kwargs, "config": sorted(kwargs["config"])})
    return run
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A wandb that writes what it is told to a file, whose path it is."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_LOG", str(tmp_path / "wandb.log"))
    yield tmp_path / "wandb.log"
    sys.modules.pop("wandb", None)


def test_wandb(tiny_run, metric, wandb):
    """One run of theirs for a run of ours, also when it is continued."""
    metric("fid_fake", [5, 3, 4])
    first = tiny_run(*KIMG, "--kimg=1", "--snap=1", "--metrics=fid_fake", "--log=wandb", short=False)
    assert first.status == 0, first.output
    assert tiny_run(f"--resume={first.dir}", "--kimg=2", "--snap=5", new=False).status == 0
    entries = [json.loads(line) for line in wandb.read_text().splitlines()]
    opened = [e["init"] for e in entries if "init" in e]
    assert (
        opened[0]["name"] == first.dir.name
        and opened[0]["resume"] == "allow"
        and "G_kwargs" in opened[0]["config"]
    )
    assert opened[1]["id"] == opened[0]["id"] == json.loads((first.dir / "wandb.json").read_text())["id"]
    logged = [e for e in entries if "data" in e and "Metrics/fid_fake" in e["data"]]
    assert [(e["step"], e["data"]["Metrics/fid_fake"]) for e in logged] == [(0, 5), (1, 3), (2, 4)]
    assert sum("finished" in e for e in entries) == 2


def test_wandb_gets_the_grids(tiny_run, wandb):
    assert tiny_run("--log=wandb", "--set=image_snapshot_ticks=3").status == 0
    pictures = [json.loads(line).get("data", {}) for line in wandb.read_text().splitlines()]
    assert {"reals": "reals.png", "fakes": "fakes_init.png"} in pictures
    assert [p["fakes"] for p in pictures if "fakes" in p] == [
        "fakes_init.png",
        "fakes000000.png",
        "fakes000000.png",
    ]


def test_a_tracker_that_refuses_ends_the_run_with_its_reason(tiny_run, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_REFUSES", "1")
    result = tiny_run("--log=wandb")
    assert (
        result.status == 1 and result.output.splitlines()[-1] == "Error: --log=wandb: api_key not configured"
    )


def test_a_tracker_that_breaks_later_does_not(tiny_run, wandb, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(trackers.WandB, "log", full)
    result = tiny_run("--log=wandb")
    assert result.status == 0 and "Exiting..." in result.output
    assert result.output.count("Warning: going on without WandB: OSError: no space left") == 1


@pytest.mark.parametrize("name,module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_the_run(tiny_run, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    result = tiny_run(f"--log={name}")
    assert result.status == 2 and result.dir is None
    assert f"Error: --log={name} needs the Python package {name} (pip install {name}): " in result.output


# --- the terminal -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_bar_on_a_terminal_only(tiny_run, monkeypatch):
    """Drawn between ticks, taken away before each line, and never in log.txt."""
    monkeypatch.setattr(hooks.ProgressBar, "EVERY", 0)
    monkeypatch.setenv("COLUMNS", "100")
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", terminal)
    result = tiny_run()
    drawn = terminal.getvalue()
    bar = r"\rtick 1 \[#{10}\.{10}\] 4/8 images  [\d.]+ img/s  eta \d+s\x1b\[K"
    assert re.search(bar + r"\rtick 1 \[#{20}\] 8/8 images [^\r]*\x1b\[K\r\x1b\[K", drawn), drawn
    assert drawn.endswith("\r\x1b[K")
    assert max(len(part) for part in drawn.split("\r")) <= 99 + len("\x1b[K")
    assert "\r" not in result.output and "\r" not in (result.dir / "log.txt").read_text()
    monkeypatch.setattr(sys, "__stderr__", pipe)
    assert tiny_run().status == 0 and pipe.getvalue() == ""
    monkeypatch.setattr(sys, "__stderr__", None)  # as in a process without a console
    assert tiny_run().status == 0


def test_status_line_keeps_the_familys_fields_first(tiny_run):
    line = next(line for line in tiny_run().output.splitlines() if line.startswith("tick 1 "))
    family = (
        r"tick 1     kimg 0\.0      time \S+ {6,} ?sec/tick \S+ +sec/kimg \S+ +maintenance \S+ +cpumem \S+"
        r" +gpumem 0\.00   augment 0\.\d{3}"
    )
    assert re.fullmatch(family + r"   img/s [\d.]+ +eta \d+s", line), line
