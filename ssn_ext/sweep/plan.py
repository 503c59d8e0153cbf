# SPDX-License-Identifier: Apache-2.0
"""What a sweep consists of, and what of it is there already: runs, their directories, lines of results.

    OUTDIR/lambda10-seed1/00000-lorelei32-ssn-.../     the run directory that train.py makes
    OUTDIR/lambda10-seed1/output.txt                   what train.py and calc_metrics.py printed
    OUTDIR/base/...                                    likewise, where the sweep trains the baseline itself

A run is known by its folder, and the options in its training_options.json must be those that are asked for. Trained
is a run that has the snapshot of its length, measured is one whose metric-*.jsonl have a line for each metric, seed and
detector.
"""

import json
import math
import os
import re
import shlex
from dataclasses import dataclass

from metrics import metric_main
from training import configs, running

# Options that the sweep itself gives to train.py.
OWN_OPTIONS = ["outdir", "data", "resume", "kimg", "seed", "gpus", "device", "dry_run", "metrics"]
NOT_COMPARED = {*running.FREE_TO_CHANGE, "gpus", "device", "resume"}
BASELINE, BASE = "baseline", "base"


@dataclass(frozen=True)
class Settings:
    """A sweep, as the command line gives it: what is trained, from what, how it is measured, and on which machine."""

    outdir: str
    data: str
    base: str | None  # snapshot to start from; None: the sweep trains it
    base_kimg: int
    cfg: str  # of the baseline
    kimg: int
    lambdas: tuple
    variants: dict  # name -> options of train.py, '--key=value' each
    options: tuple  # of all runs
    train_seeds: tuple
    metrics: tuple
    metric_seeds: tuple
    detector: str | None
    gpus: int
    jobs: int
    threads: int
    devices: tuple


@dataclass(frozen=True)
class Run:
    """One training: its name (a row of the table), seed, options of train.py, folder and length.

    snapshot: where the networks are given rather than trained.
    """

    name: str
    seed: int | None
    options: tuple
    folder: str
    kimg: int | None
    snapshot: str | None = None

    @property
    def title(self):
        """Its name and seed, as the folder's."""
        return os.path.basename(self.folder)

    @property
    def kind(self):
        """Runs of one kind take equally long: all options but the value of lambda."""
        rest = tuple(text for text in self.options if not text.startswith("--lambda-d="))
        given = parse_options(self.options).get("lambda_d")
        return rest, given is not None and float(given) > 0

    def run_dir(self):
        """The run directory that is complete or can be continued, the latest of them; None where there is none."""
        if self.snapshot is not None:
            folder = os.path.dirname(os.path.abspath(self.snapshot))
            return folder if os.path.isfile(os.path.join(folder, "training_options.json")) else None
        for _number, path in reversed(configs.run_dirs(self.folder)):
            if not os.path.isfile(os.path.join(path, "training_options.json")):
                continue  # train.py has just made it
            if os.path.isfile(os.path.join(path, "checkpoint.pt")) or self._final_of(path):
                return path
        return None

    def final(self):
        """Path of the trained snapshot; None as long as there is none."""
        path = self.run_dir()
        return self.snapshot or (self._final_of(path) if path else None)

    def _final_of(self, path):
        saved = read_options(path)
        batch = saved["batch_size"]
        seen = math.ceil(self.kimg * 1000 / batch) * batch  # whole batches
        file = os.path.join(path, f"network-snapshot-{seen // 1000:06d}.pkl")
        return file if os.path.isfile(file) else None

    def kimg_done(self):
        """Thousands of pictures seen so far."""
        if self.final() is not None:
            return self.kimg
        line = last_stats(self.run_dir())
        return line["Progress/kimg"]["mean"] if line else 0.0


# ----------------------------------------------------------------------------------------
# What is asked for


def make_runs(s):
    """(the base, the other runs): first the continued baseline, then lambda ascending, then the variants as given, each
    with every training seed. ValueError for names that clash and options that are the sweep's own."""
    common = [f"--cfg={s.cfg}", *s.options]
    base = Run(BASE, None, tuple(common), os.path.join(s.outdir, BASE), s.base_kimg, s.base)
    if s.base is not None:
        number = re.search(r"network-snapshot-(\d+)\.pkl$", s.base)
        base = Run(BASE, None, (), base.folder, int(number[1]) if number else None, s.base)
    rows = {BASELINE: common}
    for value in sorted(set(s.lambdas)):
        rows[f"lambda{value:g}"] = ["--cfg=ssn", f"--lambda-d={value:g}", *s.options]
    for name, options in s.variants.items():
        if name in [*rows, BASE]:
            raise ValueError(f"--variant: the name {name} is taken, there are {BASE}, {', '.join(rows)}")
        has_cfg = "cfg" in parse_options(options)
        rows[name] = [*([] if has_cfg else ["--cfg=ssn"]), *s.options, *options]
    runs = [
        Run(name, seed, tuple(options), os.path.join(s.outdir, f"{name}-seed{seed}"), s.kimg)
        for name, options in rows.items()
        for seed in s.train_seeds
    ]
    return base, runs


def split_options(text, where):
    """The '--key=value' parts of a text; ValueError, naming `where`, for others and for the sweep's own options."""
    parts = shlex.split(text) if isinstance(text, str) else [str(part) for part in text]
    for part in parts:
        match = re.fullmatch(r"--([a-z0-9-]+)=.*", part, re.DOTALL)
        if match is None:
            raise ValueError(f"{where}: cannot read {part!r}; options of train.py, --key=value each")
        name = match[1].replace("-", "_")
        if name in OWN_OPTIONS or part.startswith("--set=total_kimg="):
            raise ValueError(f"{where}: {part} is for the sweep to say; equal budgets from one snapshot")
    return tuple(parts)


def parse_variant(text):
    """(name, options) of 'name: --key=value --key=value'; ValueError for what reads otherwise."""
    name, colon, options = text.partition(":")
    if not colon:
        raise ValueError(f"--variant={text!r}: expected 'name: --key=value ...'")
    return check_name(name.strip()), split_options(options, f"--variant={name.strip()}")


def read_variants(path):
    """name -> options, of a JSON file {"name": "--key=value ..." or ["--key=value", ...]}; ValueError otherwise."""
    try:
        with open(path, encoding="utf-8") as f:
            table = json.load(f)
    except (OSError, ValueError) as err:
        raise ValueError(f"--variants: cannot read {path}: {err}") from err
    if not isinstance(table, dict) or not all(isinstance(v, str | list) for v in table.values()):
        raise ValueError(f'--variants: {path} must hold {{"name": "--key=value ...", ...}}')
    return {check_name(name): split_options(v, f"{path}, {name}") for name, v in table.items()}


def check_name(name):
    """The name, if a folder can bear it; else ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise ValueError(f"--variant: {name!r} is no name; letters, digits and ._+- are accepted")
    return name


def parse_options(parts):
    """Options as train.py records them in its `command`: name -> text, `set` -> list of texts."""
    found = {}
    for part in parts:
        key, value = part[2:].split("=", 1)
        key = key.replace("-", "_")
        if key == "set":
            found.setdefault("set", []).append(value)
        else:
            found[key] = value
    return found


# ----------------------------------------------------------------------------------------
# What is there


def read_options(run_dir):
    """training_options.json of a run directory; ValueError in one line where it cannot be read."""
    path = os.path.join(run_dir, "training_options.json")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as err:
        raise ValueError(f"cannot read {path}: {err}") from err


def read_lines(path):
    """The lines of a JSON-lines file as dicts, oldest first; broken ones are left out. [] where there is no file."""
    if not os.path.isfile(path):
        return []
    lines = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for text in f:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # half written when a process was killed
            if isinstance(line, dict):
                lines.append(line)
    return lines


def last_stats(run_dir):
    """The last line of stats.jsonl; None where there is none."""
    lines = read_lines(os.path.join(run_dir, "stats.jsonl")) if run_dir else []
    return lines[-1] if lines else None


def is_spatial(run, s):
    """Whether a run's generator has a grid of latents: as recorded; before it has begun, if it has another config than
    the baseline."""
    path = run.run_dir()
    if path is None:
        return parse_options(run.options)["cfg"] != s.cfg
    return not {"latent_grid", "latent_grids"}.isdisjoint(read_options(path)["G_kwargs"])


def needed_detector(metric, choice):
    """Name of the detector that a metric's numbers depend on; None for a metric that needs none."""
    from metrics import detectors

    role = getattr(metric_main.METRICS.resolve(metric), "detector", None)
    return None if role is None else detectors.stem(detectors.choose(role, choice).source)


def metrics_of(run, s):
    """The sweep's metrics that apply to a run: those of block-resampling need a grid of latents."""
    spatial = is_spatial(run, s)
    return [name for name in s.metrics if spatial or not name.startswith("ldbr_")]


def results(run, metric, s):
    """seed -> the latest line of a metric for the run's snapshot, judged by the sweep's detector."""
    path = run.run_dir()
    snapshot = run.final()
    if path is None or snapshot is None:
        return {}
    detector, found = needed_detector(metric, s.detector), {}
    for line in read_lines(os.path.join(path, f"metric-{metric}.jsonl")):
        details = line.get("details", {})
        if line.get("snapshot_pkl") != os.path.basename(snapshot) or details.get("G_kwargs"):
            continue
        if details.get("seed") in s.metric_seeds and detector in (None, details.get("detector")):
            found[details["seed"]] = line
    return found


def missing(run, s):
    """seed -> metrics without a line, for the seeds that lack any."""
    if run.snapshot is not None and run.run_dir() is None:
        return {}  # a bare file: there is no place for its lines
    lacking = {}
    for metric in metrics_of(run, s):
        there = results(run, metric, s)
        for seed in s.metric_seeds:
            if seed not in there:
                lacking.setdefault(seed, []).append(metric)
    return lacking


def check_recorded(run, s):
    """ValueError where a run's directory was trained with other options than those that are asked for."""
    path = run.run_dir()
    if path is None or run.snapshot is not None:
        return
    saved = read_options(path)
    asked = parse_options([*run.options, f"--data={s.data}", f"--seed={run.seed or 0}"])
    recorded = {k: v for k, v in saved["command"].items() if v is not None and v != []}
    different = [
        f"--{name.replace('_', '-')}={_text(recorded.get(name))}, not {_text(asked.get(name))}"
        for name in sorted({*recorded, *asked} - NOT_COMPARED)
        if not _same(asked.get(name, configs.OPTION_DEFAULTS.get(name)), recorded.get(name), name)
    ]
    if s.base is not None and run.name != BASE and not _same_file(recorded.get("resume"), s.base):
        different.append(f"--resume={recorded.get('resume')}, not {s.base}")
    if different:
        raise ValueError(
            f"{path} was trained with {'; '.join(different)}: give that variant another name, or the sweep another"
            " --outdir"
        )
    done = last_stats(path)
    if run.final() is None and done and done["Progress/kimg"]["mean"] > run.kimg * (1 + 1e-6):
        raise ValueError(
            f"{path} is past {run.kimg} kimg and has no snapshot from there: raise --kimg, or take another --outdir"
        )


def _same(asked, recorded, name):
    """Whether a text of the command line and a value that train.py recorded say the same."""
    if asked is None or recorded is None:
        return asked is recorded
    if name == "set":
        return list(asked) == list(recorded)
    if name == "data":
        return os.path.basename(os.path.normpath(asked)) == os.path.basename(os.path.normpath(recorded))
    if isinstance(recorded, bool):
        return str(asked).lower() in (
            {"true", "1", "yes", "on", "t", "y"} if recorded else {"false", "0", "no", "off"}
        )
    if isinstance(recorded, int | float):
        try:
            return float(asked) == float(recorded)
        except ValueError:
            return False
    return str(asked) == (",".join(recorded) if isinstance(recorded, list) else str(recorded))


def _same_file(recorded, asked):
    """Whether two snapshots are one: by content where both are there, else by name."""
    if recorded is None:
        return False
    if os.path.isfile(recorded) and os.path.isfile(asked):
        from dnnlib.download import sha256_of

        return os.path.samefile(recorded, asked) or sha256_of(recorded) == sha256_of(asked)
    return os.path.basename(recorded) == os.path.basename(asked)


def _text(value):
    return "(not given)" if value is None else " ".join(value) if isinstance(value, list) else value
