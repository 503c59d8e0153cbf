# SPDX-License-Identifier: Apache-2.0
"""python -m ssn_ext.sweep with scripts that are played by functions; the numbers they write are known."""

import json
import os
import re
import sys
from pathlib import Path

import PIL.Image
import pytest
from click.testing import CliRunner

import dnnlib
from dnnlib.plugins import load_plugins
from ssn_ext.sweep import plan, plot, table, work
from ssn_ext.sweep.__main__ import main

load_plugins()
DETECTOR = "efficientnet-lite0-128"
FD = "fd1k_efficientnet_lite0_128"
METRICS = "fid1k,ldbr_dist,ldbr_floor"
# lambda -> distortion, own floor, kept, distance
TRUTH = {0.0: (0.02, 0.008, 0.5, 500.0), 10.0: (0.01, 0.006, 0.4, 550.0), 100.0: (0.004, 0.003, 0.2, 625.0)}
BASELINE = 450.0


class Scripts:
    """Stands for the processes of train.py and calc_metrics.py, and writes what they would leave behind."""

    def __init__(self):
        self.calls, self.environments = [], []
        self.stop_at = {}  # title -> kimg at which that training is stopped, once
        self.broken = set()  # titles whose training fails

    def run(self, processes, script, args, log, env):
        if processes.stopped:
            raise work.Stopped
        given = {key: value for key, _, value in (arg[2:].partition("=") for arg in args)}
        self.environments.append(env)
        if "dry-run" not in given and "total_kimg" not in str(args):
            self.calls.append((script, args))
        text, status = getattr(self, script.removesuffix(".py"))(processes, given, args)
        with open(log, "a", encoding="utf-8") as f:
            f.write(text)
        return status

    def train(self, processes, given, args):
        if given.get("gamma") == "-1":
            return "Usage: ...\n\nError: --gamma must be non-negative\n", 2
        if "dry-run" in given:
            return '{\n  "batch_size": 16,\n}\n', 0
        if os.path.isfile(os.path.join(given.get("resume", ""), "checkpoint.pt")):
            path = Path(given["resume"])
        else:
            path = Path(given["outdir"]) / f"{len(plan.configs.run_dirs(given['outdir'])):05d}-set"
            path.mkdir()
            command = plan.parse_options([a for a in args if not a.startswith(("--outdir", "--kimg"))])
            command.update({key: float(value) for key, value in command.items() if key == "lambda_d"})
            spatial = given["cfg"] != "laptop"
            options = dict(
                command=command, batch_size=16, G_kwargs={"latent_grid": [4, 4]} if spatial else {}
            )
            options["loss_kwargs"] = {"lambda_d": float(given["lambda-d"])} if "lambda-d" in given else {}
            with dnnlib.util.open_atomic(
                path / "training_options.json"
            ) as f:  # as train.py does: others may look
                f.write(json.dumps(options).encode())
        title = path.parent.name
        if title in self.broken:
            return "Training options: ...\nError: out of memory. Try --batch-gpu=8\n", 1
        kimg = float(given.get("kimg", 0))
        end = self.stop_at.pop(title, kimg)
        (path / "checkpoint.pt").write_text("")
        stats = {
            "Progress/tick": 7,
            "Progress/kimg": end,
            "Timing/sec_per_kimg": 20,
            "Timing/total_sec": 20 * end,
        }
        (path / "stats.jsonl").write_text(
            json.dumps({key: {"mean": value} for key, value in stats.items()}) + "\n"
        )
        if end < kimg:
            processes.stop()
            return f"Stopped at {end} kimg\n", 130
        (path / f"network-snapshot-{int(end):06d}.pkl").write_text("")
        return "Exiting...\n", 0

    def calc_metrics(self, _processes, given, _args):
        snapshot = Path(given["network"])
        options = plan.read_options(snapshot.parent)
        seed, lambda_d = int(given["seed"]), options["loss_kwargs"].get("lambda_d")
        distortion, own, kept, distance = TRUTH.get(lambda_d, (None, None, None, BASELINE))
        for metric in given["metrics"].split(","):
            if metric == "fid1k":
                results = {FD: distance + 3 * (seed - 1)}
            elif metric == "ldbr_dist":
                results = dict(ldbr_dist=distortion, ldbr_dist_stderr=distortion / 50)
                results.update(
                    ldbr_dist_inside=0.1, ldbr_dist_inside_stderr=0.001, ldbr_dist_locality=0.1 / distortion
                )
                results["ldbr_dist_influence"] = [[0.0]]
            else:
                results = dict(ldbr_floor=0.0115, ldbr_floor_own=own, ldbr_floor_efficiency=own / distortion)
                results.update(ldbr_floor_kept=kept, ldbr_floor_distortion=distortion)
            judged = "detector" in given and metric == "fid1k"
            line = dict(results=results, metric=metric, total_time=30.0, snapshot_pkl=snapshot.name)
            line["details"] = dict(
                seed=seed, detector=given.get("detector") if judged else None, G_kwargs={}, num_gen=1000
            )
            with open(snapshot.parent / f"metric-{metric}.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        return "done\n", 0

    def new(self):
        """The calls since the last time, as texts."""
        calls, self.calls = self.calls, []
        return [" ".join([script, *args]) for script, args in calls]


@pytest.fixture
def scripts(monkeypatch):
    fake = Scripts()
    monkeypatch.setattr(work.Processes, "run", lambda processes, *args: fake.run(processes, *args))
    return fake


@pytest.fixture
def sweep(tmp_path, scripts):
    """Function that runs the command in tmp_path/sweep; options may be replaced by giving them again."""

    def run(*args, status=0):
        given = [
            f"--outdir={tmp_path / 'sweep'}",
            "--gpus=0",
            f"--metrics={METRICS}",
            f"--detector={DETECTOR}",
        ]
        given += ["--lambda-d=0,10,100", "--metric-seeds=0-2", "--kimg=10", "--base-kimg=70", *args]
        result = CliRunner().invoke(main, given)
        if result.exit_code != status:
            raise AssertionError(f"{result.exit_code}: {result.output} {result.exception!r}")
        return result.output

    run.dir = tmp_path / "sweep"
    return run


def settings(tmp_path, **changes):
    values = dict(
        outdir=str(tmp_path), data="demo", base=None, base_kimg=70, cfg="laptop", kimg=10, lambdas=(10.0, 0.0),
        variants={"mine": ("--demodulation=zero-padded", "--lambda-d=10")}, options=("--batch=16",),
        train_seeds=(1, 2), metrics=("fid1k", "ldbr_dist"), metric_seeds=(0, 1), detector=DETECTOR, gpus=0, jobs=1,
        threads=1, devices=(),
    )  # fmt: skip
    return plan.Settings(**{**values, **changes})


# ----------------------------------------------------------------------------------------
# The plan


def test_runs_and_their_options(tmp_path):
    base, runs = plan.make_runs(settings(tmp_path))
    assert base.options == ("--cfg=laptop", "--batch=16") and base.kimg == 70 and base.seed is None
    names = ["baseline", "lambda0", "lambda10", "mine"]
    assert [run.title for run in runs] == [
        f"{name}-seed{seed}" for name in names for seed in (1, 2)
    ]  # lambda ascends, variants as given
    options = {run.title: " ".join(run.options) for run in runs}
    assert options["baseline-seed2"] == "--cfg=laptop --batch=16"
    assert options["lambda10-seed1"] == "--cfg=ssn --lambda-d=10 --batch=16"
    assert options["mine-seed2"] == "--cfg=ssn --batch=16 --demodulation=zero-padded --lambda-d=10"
    assert {run.kimg for run in runs} == {10} and {run.seed for run in runs} == {1, 2}
    kinds = {run.kind for run in runs}
    assert len(kinds) == 4  # baseline, lambda 0, lambda > 0, the variant


def test_dry_run_says_how_long_and_writes_nothing(sweep, scripts):
    output = sweep("--dry-run", "--images-per-second=50", "--lambda-d=0,10")
    assert not sweep.dir.exists() and scripts.new() == []
    lines = {line.split("  ")[0]: line for line in output.splitlines() if line}
    assert re.search(r"--cfg=laptop +70 +50 +23 min +0 of 3 +\?$", lines["base"])  # 70,000 / 50 s
    assert re.search(r"--cfg=ssn --lambda-d=10 +10 +50 +3 min +0 of 9 +\?$", lines["lambda10-seed1"])  # 200 s
    assert (
        "In all about 33 min, and what is marked ? (not timed yet), with 1 at a time" in output
    )  # (70 + 30) / 50
    # two at a time: the base alone, then three runs in the time of one and a half
    assert "In all about 28 min," in sweep(
        "--dry-run", "--images-per-second=50", "--lambda-d=0,10", "--jobs=2"
    )


def test_dry_run_measures_the_speed(sweep, scripts):
    output = sweep("--dry-run", "--lambda-d=0,10")  # the stand-in takes 20 s for a thousand pictures
    assert re.search(r"lambda10-seed1 .* 10 +50 +3 min", output)
    assert not sweep.dir.exists()


def test_steps_of_a_trial(tmp_path, scripts, monkeypatch):
    """As many steps as the lazy regularisers need, after one; no pictures, no snapshots, and only where not known."""
    seen = []
    play = scripts.train
    monkeypatch.setattr(scripts, "train", lambda p, given, args: seen.append(args) or play(p, given, args))
    s = settings(tmp_path, variants={}, train_seeds=(1,))
    base, runs = plan.make_runs(s)
    sweep = work.Sweep(s, base, runs, work.Processes(), print)
    sweep.check()
    trials = [args for args in seen if "--dry-run" not in args]
    assert len(trials) == 3 and len(seen) == 6  # laptop, lambda 0, lambda 10
    for args in trials:
        assert args[-4:] == [
            "--set=total_kimg=0.272", "--set=kimg_per_tick=0.256", "--set=image_snapshot_ticks=null",
            "--set=network_snapshot_ticks=null",
        ]  # fmt: skip
        assert not any("--resume" in arg for arg in args)  # there is no base yet
    assert set(sweep.speeds.values()) == {50.0}
    seen.clear()
    sweep.check(images_per_second=10)
    assert len(seen) == 3 and all("--dry-run" in args for args in seen)
    assert set(sweep.speeds.values()) == {10.0}


# ----------------------------------------------------------------------------------------
# Only what is missing


def test_a_sweep_and_what_a_second_one_does(sweep, scripts):
    sweep("--images-per-second=50")
    calls = scripts.new()
    assert [call.split()[0] for call in calls].count("train.py") == 5
    base = sweep.dir / "base" / "00000-set" / "network-snapshot-000070.pkl"
    common = f"--data=demo --gpus=0 --metrics=none --seed=1 --resume={base}"
    assert (
        calls[0]
        == f"train.py --outdir={sweep.dir}/base --data=demo --gpus=0 --metrics=none --seed=0 --cfg=laptop --kimg=70"
    )
    assert f"train.py --outdir={sweep.dir}/lambda10-seed1 {common} --cfg=ssn --lambda-d=10 --kimg=10" in calls
    network = f"--network={sweep.dir}/lambda10-seed1/00000-set/network-snapshot-000010.pkl"
    ask = f"calc_metrics.py {network} --metrics="
    assert f"{ask}fid1k --seed=2 --data=demo --gpus=0 --detector={DETECTOR}" in calls
    assert f"{ask}ldbr_dist,ldbr_floor --seed=2 --data=demo --gpus=0" in calls
    assert len(calls) == 5 + 2 * 3 + 3 * 3 * 2  # base and baseline have no blocks

    pages = {
        name: (sweep.dir / name).read_bytes() for name in ["sweep.md", "sweep.csv", "sweep.png", "sweep.svg"]
    }
    sweep("--images-per-second=50")
    assert scripts.new() == []
    assert {name: (sweep.dir / name).read_bytes() for name in pages} == pages

    lines = sweep.dir / "lambda10-seed1" / "00000-set" / "metric-fid1k.jsonl"
    text = lines.read_text().splitlines(keepends=True)
    lines.write_text(text[0] + text[2] + text[1][:50])  # the line of one seed is half written
    sweep()
    assert list(map(len, map(json.loads, lines.read_text().splitlines()))) == [5, 5, 5]
    assert scripts.new() == [f"{ask}fid1k --seed=1 --data=demo --gpus=0 --detector={DETECTOR}"]

    sweep("--metric-seeds=0-3", "--lambda-d=10")
    assert sorted({re.search("--seed=.", call)[0] for call in scripts.new()}) == ["--seed=3"]

    sweep("--lambda-d=0,10,100", "--variant=mine: --lambda-d=10 --demodulation=zero-padded")
    calls = scripts.new()
    assert len(calls) == 1 + 6 and all("mine-seed1" in call for call in calls)
    assert "--cfg=ssn --lambda-d=10 --demodulation=zero-padded --kimg=10" in calls[0]

    sweep("--train-seeds=1,2", "--lambda-d=10")
    assert [call for call in scripts.new() if call.startswith("train") and "seed2 " not in call] == []

    sweep("--detector=efficientnet-lite0", "--lambda-d=10")
    calls = scripts.new()  # other numbers of the same pictures; block-resampling needs no detector
    assert len(calls) == 3 * 3 and all("--metrics=fid1k " in call for call in calls)


def test_more_kimg_go_on(sweep, scripts):
    sweep("--lambda-d=0", "--images-per-second=50")
    scripts.new()
    sweep("--lambda-d=0", "--kimg=20")
    calls = [call for call in scripts.new() if call.startswith("train")]
    for title in ["baseline-seed1", "lambda0-seed1"]:
        assert f"train.py --resume={sweep.dir}/{title}/00000-set --kimg=20" in calls
    assert len(calls) == 2
    sweep("--lambda-d=0", "--kimg=10")  # its snapshot and lines are still there
    assert scripts.new() == []
    output = sweep("--lambda-d=0", "--kimg=15", status=1)
    assert "is past 15 kimg and has no snapshot from there: raise --kimg, or take another --outdir" in output


def test_stopped_and_gone_on(sweep, scripts):
    scripts.stop_at["lambda0-seed1"] = 4.0
    output = sweep("--images-per-second=50", status=130)
    assert "Stopped; the same command goes on." in output
    calls = scripts.new()
    assert not any("lambda10-seed1" in call or "lambda100-seed1" in call for call in calls)
    assert "| baseline |" in (sweep.dir / "sweep.md").read_text()  # what there is
    plan_text = sweep("--dry-run")
    assert re.search(r"lambda0-seed1 .* 4\.0 of 10 +50 +2 min +0 of 9", plan_text)  # 6,000 / 50 s
    output = sweep()
    assert "lambda0-seed1: going on\n" in output
    calls = [call for call in scripts.new() if call.startswith("train")]
    assert calls[0] == f"train.py --resume={sweep.dir}/lambda0-seed1/00000-set --kimg=10"
    assert len(calls) == 3 and not any("baseline" in call for call in calls)


def test_stopped_while_the_base_is_trained(sweep, scripts):
    scripts.stop_at["base"] = 30.0
    output = sweep("--images-per-second=50", status=130)
    assert len(scripts.new()) == 1 and "Nothing is trained yet: no table." in output


def test_a_run_that_fails_leaves_the_others_alone(sweep, scripts):
    scripts.broken.add("lambda10-seed1")
    output = sweep("--images-per-second=50", status=1)
    reason = "Failed: lambda10-seed1: train.py: out of memory. Try --batch-gpu=8 (more in "
    assert reason + f"{sweep.dir}/lambda10-seed1/output.txt)" in output
    page = (sweep.dir / "sweep.md").read_text()
    assert "| lambda100 |" in page and "| lambda10 |" not in page
    scripts.broken.clear()
    scripts.new()
    sweep()
    assert all("lambda10-seed1" in call for call in scripts.new())


def test_jobs_threads_and_devices(sweep, scripts, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    sweep("--jobs=4", "--devices=0,3", "--images-per-second=50")
    assert {env["OMP_NUM_THREADS"] for env in scripts.environments} == {"3"}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in scripts.environments} == {"0", "3"}
    scripts.environments.clear()
    sweep("--threads=5", "--lambda-d=1", "--images-per-second=50", status=1)  # the stand-in knows no lambda 1
    assert {tuple(env.items()) for env in scripts.environments} == {(("OMP_NUM_THREADS", "5"),)}


# ----------------------------------------------------------------------------------------
# A base of one's own, runs made by hand


def test_a_given_base(sweep, scripts, tmp_path):
    sweep("--lambda-d=0", "--images-per-second=50")
    base = tmp_path / "elsewhere" / "network-snapshot-000070.pkl"
    base.parent.mkdir()
    base.write_text("networks")
    scripts.new()
    other = tmp_path / "other"
    sweep(f"--outdir={other}", f"--base={base}", "--lambda-d=0", "--images-per-second=50")
    calls = scripts.new()
    assert not any("/base " in call for call in calls) and f"--resume={base}" in calls[0]
    assert "| base |  |  | 70 |" in (other / "sweep.md").read_text()  # a bare file is not measured
    # a base that lies in its run directory is, and says what the config of the baseline is
    options = dict(command=dict(cfg="paper256"), batch_size=16, G_kwargs={}, loss_kwargs={})
    (base.parent / "training_options.json").write_text(json.dumps(options))
    (base.parent / "stats.jsonl").write_text("")
    output = sweep(f"--outdir={tmp_path / 'third'}", f"--base={base}", "--dry-run", "--images-per-second=50")
    assert re.search(r"baseline-seed1 +--cfg=paper256 ", output) and re.search(
        r"base .* 70 .* there +0 of 3", output
    )
    # another snapshot of the same name is another base
    away = tmp_path / "away" / base.name
    away.parent.mkdir()
    away.write_text("other networks")
    output = sweep(f"--outdir={other}", f"--base={away}", "--lambda-d=0", status=1)
    assert re.search(
        rf"baseline-seed1/00000-set was trained with --resume={base}, not {away}: give that variant", output
    )


def test_recorded_options_must_be_those_asked_for(sweep, scripts):
    variant = "--variant=mine: --lambda-d=10 --set=loss_kwargs.pl_weight=0"
    sweep("--lambda-d=0", variant, "--images-per-second=50")
    sweep("--lambda-d=0", variant.replace("=10", "=10.0"))  # the same number
    for changed, message in [
        (variant.replace("=10", "=3"), "--lambda-d=10.0, not 3"),
        (variant.replace("=0", "=1"), "--set=loss_kwargs.pl_weight=0, not loss_kwargs.pl_weight=1"),
        (variant + " --mirror=True", "--mirror=(not given), not True"),
        (variant.split(" --set")[0], "--set=loss_kwargs.pl_weight=0, not (not given)"),
    ]:
        output = sweep("--lambda-d=0", changed, status=1)
        (line,) = [line for line in output.splitlines() if line.startswith("Error")]
        assert f"mine-seed1/00000-set was trained with {message}: give that variant another name" in line


def test_options_as_train_py_records_them():
    """Text of a command line against values of training_options.json."""
    for asked, recorded, name, same in [
        ("1", 1, "seed", True), ("1.50", 1.5, "gamma", True), ("2", 1.5, "gamma", False), ("x", 1.5, "gamma", False),
        ("true", True, "mirror", True), ("0", False, "mirror", True), ("true", False, "mirror", False),
        ("noaug", "noaug", "aug", True), (["a=1"], ["a=1"], "set", True), (["a=1"], ["a=2"], "set", False),
        ("widths,labels", ["widths", "labels"], "allow_partial", True), (None, "x", "aug", False),
        ("/here/faces.zip", "/there/faces.zip", "data", True), ("demo", "/there/faces.zip", "data", False),
    ]:  # fmt: skip
        assert plan._same(asked, recorded, name) is same, (asked, recorded)


# ----------------------------------------------------------------------------------------
# The table


def cells(page, name):
    """The cells of a run's line in the first table of a page, by their heads."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    return dict(zip(lines[0], next(line for line in lines[2:] if line[0] == name), strict=True))


def test_the_numbers_of_the_table(sweep):
    sweep("--images-per-second=50")
    page = (sweep.dir / "sweep.md").read_text()
    # distance: 497, 500, 503: mean 500, std 3, error sqrt(3); distortion: 0.02 +- 0.0004 / sqrt(3)
    assert cells(page, "lambda0") == {
        "name": "lambda0", "lambda": "0", "train seed": "1", "kimg": "10", "minutes": "3.3", FD: "500.0 +- 1.7",
        "ldbr_dist": "0.02000 +- 0.00023", "inside": "0.10000 +- 0.00058", "locality": "5.000", "own floor": "0.008000",
        "efficiency": "0.4000", "kept": "0.5000", "data floor": "0.01150",
    }  # fmt: skip
    assert cells(page, "baseline")["ldbr_dist"] == "" and cells(page, "baseline")[FD] == "450.0 +- 1.7"
    assert cells(page, "base")["kimg"] == "70" and cells(page, "base")["minutes"] == "23.3"
    # lambda 100 against lambda 0: 0.02 / 0.004 = 5, error 5 sqrt(2) / (50 sqrt(3)); 625 / 500 and 625 / 450
    (factor,) = re.findall(r"\| lambda100 \| 1 \| (5.* times) \| (.*) \| (.*) \|", page)
    assert factor == ("5.000 +- 0.082 times", "+25.00 +- 0.55 %", "+38.89 +- 0.66 %")
    order = re.findall(r"^\| (base|baseline|lambda\d+) \|", page.split("## ")[0], re.MULTILINE)
    assert order == ["base", "baseline", "lambda0", "lambda10", "lambda100"]
    assert "Distortion falls with lambda in all pairs of neighbours, within two standard errors." in page
    head, *lines = [line.split(",") for line in (sweep.dir / "sweep.csv").read_text().splitlines()]
    numbers = dict(zip(head, next(line for line in lines if line[0] == "lambda100"), strict=True))
    assert (
        numbers[FD] == "625"
        and numbers[f"{FD}_stderr"] == "1.73205"
        and numbers["ldbr_dist_stderr"] == "4.6188e-05"
    )
    assert numbers["distortion_lambda0_over_own"] == "5" and numbers["distance_over_baseline"] == "1.38889"
    assert "ldbr_dist_influence" not in head and "ldbr_floor_distortion" not in head


def test_several_trainings(sweep):
    sweep("--lambda-d=0", "--train-seeds=1,2", "--images-per-second=50")
    page = (sweep.dir / "sweep.md").read_text()
    assert re.findall(r"\| lambda0 \| 0 \| ([^|]*) \|", page) == ["1", "2", "mean of 2"]
    rows = [
        table.Row("a", seed, 1.0, 10, 2.0, {"x": table.Value(x, 9.0)}) for seed, x in [(1, 1.0), (2, 3.0)]
    ]
    mean = table.with_means(rows)[2]
    assert mean.seed == "mean of 2" and mean.values["x"] == table.Value(2.0, 1.0)  # std sqrt(2) / sqrt(2)


def test_numbers_to_the_digits_of_their_errors():
    for mean, error, text in [
        (0.0191734, 0.000239, "0.01917 +- 0.00024"), (460.6, 2.34, "460.6 +- 2.3"), (12346, 678, "12350 +- 680"),
        (1.0, 0.0996, "1.00 +- 0.10"), (0.5054321, None, "0.5054"), (732.04, None, "732.0"), (0.0, None, "0"),
        (5.0, 0.0, "5.000"), (float("nan"), None, "nan"), (-0.00123, 0.00045, "-0.00123 +- 0.00045"),
    ]:  # fmt: skip
        assert table.with_error(mean, error) == text


def test_errors_of_means():
    lines = [
        {"a": 1.0, "b": 2.0, "b_stderr": 0.3},
        {"a": 2.0, "b": 2.5, "b_stderr": 0.4},
        {"a": 6.0, "b": 3.0, "b_stderr": 1.2},
    ]
    found = table.combine(lines)
    assert list(found) == ["a", "b"]
    assert found["a"].mean == 3.0 and found["a"].error == pytest.approx((7 / 3) ** 0.5)  # std sqrt(7), of 3
    assert found["b"].mean == 2.5 and found["b"].error == pytest.approx(1.3 / 3)  # sqrt(.09 + .16 + 1.44) / 3
    assert table.combine(lines[:1])["a"] == table.Value(1.0, None)
    assert table.combine(lines[:1])["b"] == table.Value(2.0, 0.3)


def test_monotone_or_not():
    def chain(*numbers):
        return [
            table.Row(f"lambda{i:g}", 1, i, 10, 1.0, {"ldbr_dist": table.Value(x, 0.01)})
            for i, x in enumerate(numbers)
        ]

    assert "falls with lambda in all pairs" in table.monotone(chain(0.5, 0.3, 0.32))  # within 2 sqrt(2) 0.01
    said = table.monotone(chain(0.5, 0.3, 0.33))
    assert "lambda2 (0.330 +- 0.010) is above lambda1 (0.300 +- 0.010) with training seed 1" in said
    assert table.monotone(chain(0.5)) is None


def test_numbers_that_do_not_compare_are_named(sweep):
    sweep("--lambda-d=0", "--images-per-second=50")
    lines = sweep.dir / "lambda0-seed1" / "00000-set" / "metric-fid1k.jsonl"
    lines.write_text(lines.read_text().replace('"num_gen": 1000', '"num_gen": 500'))
    sweep("--lambda-d=0")
    assert (
        "Warning: fid1k: num_gen differs (1000, 500), so not all its numbers compare."
        in (sweep.dir / "sweep.md").read_text()
    )


def test_report_trains_and_measures_nothing(sweep, scripts):
    scripts.stop_at["lambda10-seed1"] = 4.0
    sweep("--images-per-second=50", "--metric-seeds=0", status=130)
    scripts.new()
    (sweep.dir / "sweep.md").unlink()
    output = sweep("--report")
    assert scripts.new() == [] and "| lambda0 | 0 |" in output
    assert "Lines of results still missing: " in output and "lambda0, seed 1: 6" in output


# ----------------------------------------------------------------------------------------
# The plot


def test_the_plot_holds_every_run(sweep):
    sweep("--variant=zero-padded: --lambda-d=10 --demodulation=zero-padded", "--images-per-second=50")
    text = (sweep.dir / "sweep.svg").read_text()
    for name in [
        "baseline",
        "lambda0",
        "lambda10",
        "lambda100",
        "zero-padded",
        "floor of the data, 0.0115",
        FD,
    ]:
        assert re.search(rf">[^<]*{re.escape(name)}[^<]*</text>", text), name
    with PIL.Image.open(sweep.dir / "sweep.png") as picture:
        assert picture.width == 1200


def rows_like_a_sweep():
    q, rows = FD, [table.Row("baseline", 1, None, 10, 1.0, {FD: table.Value(461.0, 2.0)})]
    points = dict(
        lambda0=(0.0192, 480), lambda1=(0.0185, 484), lambda10=(0.0126, 502), lambda100=(0.0038, 632),
        lambda1000=(0.0005, 1400), near=(0.0130, 505), nearer=(0.0128, 503),
    )  # fmt: skip
    for name, (x, y) in points.items():
        values = {
            q: table.Value(y, 4.0),
            "ldbr_dist": table.Value(x, x / 80),
            "ldbr_floor_own": table.Value(x / 2),
        }
        values.update(ldbr_floor=table.Value(0.0115), ldbr_floor_kept=table.Value(x * 20))
        lambda_d = float(name[6:]) if name.startswith("lambda") else 10.0
        rows.append(table.Row(name, 1, lambda_d, 10, 1.0, values))
    return rows


def test_labels_do_not_overlap_and_stay_inside():
    figure = plot.draw(rows_like_a_sweep(), FD)
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    labels = [text for text in axes.texts if text.get_gid() == "label"]
    assert sorted(text.get_text() for text in labels) == sorted(row.name for row in rows_like_a_sweep()[1:])
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), axes.texts[i].get_text()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_where_the_marks_are():
    rows = rows_like_a_sweep()
    axes = plot.draw(rows, FD).axes[0]
    assert axes.get_xscale() == "log" and axes.get_yscale() == "log"  # distances of 461 to 1400
    assert plot.draw(rows[:5], FD).axes[0].get_yscale() == "linear"
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    chain = [(row.values["ldbr_dist"].mean, row.values[FD].mean) for row in rows[1:6]]
    assert tuple(map(list, zip(*chain, strict=True))) in lines  # lambdas, joined in their order
    assert ([0.0096], [480.0]) in lines and ([0.0096, 0.0192], [480.0, 480.0]) in lines  # lambda0's own floor
    assert ([0.0115, 0.0115], [0, 1]) in lines and ([0, 1], [461.0, 461.0]) in lines


def test_without_matplotlib_the_table_is_written(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = sweep("--lambda-d=0", "--images-per-second=50")
    assert (
        "No plot: the plot needs matplotlib: python -m pip install matplotlib, then run the same command again"
        in output
    )
    assert (sweep.dir / "sweep.md").exists() and (sweep.dir / "sweep.csv").exists()
    assert not (sweep.dir / "sweep.png").exists()


def test_nothing_to_draw(sweep):
    output = sweep("--lambda-d=none", "--images-per-second=50")
    assert f"No plot: nothing to draw: no run has both {FD} and ldbr_dist yet" in output
    output = sweep("--lambda-d=none", "--metrics=ldbr_dist")
    assert "No plot: there is no fid or kid among --metrics" in output


# ----------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "args, message",
    [
        (["--lambda-d=1,x"], "cannot read '1,x': numbers from 0 on such as '0,10,100', or 'none'"),
        (["--lambda-d=-1"], "cannot read '-1'"),
        (["--metrics=fid"], "--metrics: fid is not known; there are fid50k_full, "),
        (["--detector=mine.pt"], "--detector: 'mine.pt' is neither a file"),
        (["--base=gone.pkl"], "gone.pkl"),
        (["--variant=mine"], "--variant='mine': expected 'name: --key=value ...'"),
        (["--variant=a b: --gamma=1"], "--variant: 'a b' is no name; letters, digits and ._+- are accepted"),
        (["--variant=a: gamma"], "--variant=a: cannot read 'gamma'; options of train.py, --key=value each"),
        (["--variant=a: --kimg=3"], "--variant=a: --kimg=3 is for the sweep to say"),
        (
            ["--variant=lambda10: --gamma=1"],
            "--variant: the name lambda10 is taken, there are base, baseline, lambda0",
        ),
        (["--variant=a: --gamma=1", "--variant=a: --gamma=2"], "--variant: the name a stands there twice"),
        (["--options=--seed=3"], "--options: --seed=3 is for the sweep to say"),
        (["--options=--set=total_kimg=3"], "--options: --set=total_kimg=3 is for the sweep to say"),
        (["--variants=gone.json"], "--variants: cannot read gone.json: "),
        (["--variant=a: --gamma=-1"], "a-seed1: train.py: --gamma must be non-negative"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(sweep, args, message):
    output = sweep(*args, status=2 if args[0].startswith("--lambda-d") else 1)
    (line,) = [line for line in output.splitlines() if line.startswith("Error")]
    assert message in line and not sweep.dir.exists()


def test_variants_from_a_file(sweep, tmp_path):
    file = tmp_path / "variants.json"
    file.write_text(
        json.dumps({"a": "--gamma=2 --lambda-d=10", "b": ["--encoder-init=random"], "c": "--cfg=laptop"})
    )
    output = sweep(f"--variants={file}", "--variant=d: --gamma=3", "--dry-run", "--images-per-second=50")
    assert re.search(r"a-seed1 +--cfg=ssn --gamma=2 --lambda-d=10 ", output)
    assert re.search(r"b-seed1 +--cfg=ssn --encoder-init=random ", output)
    assert re.search(r"c-seed1 +--cfg=laptop .* 0 of 3 ", output)  # no blocks
    assert re.search(r"d-seed1 +--cfg=ssn --gamma=3 ", output)
    for text in ["[1]", '{"a": 1}']:
        file.write_text(text)
        assert 'must hold {"name": "--key=value ...", ...}' in sweep(f"--variants={file}", status=1)


def test_two_sweeps_in_one_folder(sweep, tmp_path):
    pytest.importorskip("fcntl", reason="this system has no flock")
    sweep.dir.mkdir()
    with work.only_one(str(sweep.dir), work.Processes()):
        output = sweep("--images-per-second=50", status=1)
    assert f"Error: --outdir: another sweep, or a training that it began, is at work in {sweep.dir}" in output
    sweep("--images-per-second=50", "--lambda-d=0")


def test_a_run_directory_that_was_just_made_is_not_there_yet(sweep):
    """train.py makes the folder, then writes its options: the status of a sweep may look in between."""
    sweep("--images-per-second=50", "--dry-run")
    folder = sweep.dir / "lambda0-seed1" / "00000-set"
    folder.mkdir(parents=True)
    assert "lambda0-seed1" in sweep("--images-per-second=50", "--dry-run")
    sweep("--images-per-second=50")
    assert (sweep.dir / "lambda0-seed1" / "00001-set" / "training_options.json").is_file()
