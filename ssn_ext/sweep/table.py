# SPDX-License-Identifier: Apache-2.0
"""The table of a sweep: means and standard errors from lines of results, as Markdown and CSV."""

import csv
import io
import math
import statistics
from dataclasses import dataclass, field

import dnnlib
from ssn_ext.sweep import plan

# Results under the names that the table shows them by; other lists and repetitions are left out.
SHOWN = {
    "ldbr_dist": "ldbr_dist",
    "ldbr_dist_inside": "inside",
    "ldbr_dist_locality": "locality",
    "ldbr_floor_own": "own floor",
    "ldbr_floor_efficiency": "efficiency",
    "ldbr_floor_order": "order",
    "ldbr_floor_kept": "kept",
    "ldbr_floor": "data floor",
}
REPEATED = ["ldbr_floor_distortion", "ldbr_floor_inside"]
# What numbers of one column must have in common.
SAME_DETAILS = ["detector_sha256", "num_real", "num_gen", "num_latents", "data_hash", "mirror"]


@dataclass(frozen=True)
class Value:
    """A number and its standard error, None where that is not known."""

    mean: float
    error: float | None = None

    def __str__(self):
        return with_error(self.mean, self.error)

    def over(self, other):
        """This divided by another: errors of independent numbers, to first order."""
        ratio = self.mean / other.mean
        parts = [(v.error / v.mean) ** 2 for v in (self, other) if v.error is not None and v.mean]
        return Value(ratio, abs(ratio) * math.sqrt(sum(parts)) if parts else None)


@dataclass
class Row:
    """A line of the table. seed: of the training; 'mean of N' for the mean of several."""

    name: str
    seed: int | str | None
    lambda_d: float | None
    kimg: float | None
    minutes: float | None
    values: dict = field(default_factory=dict)  # key of a result -> Value
    lacks: int = 0  # lines of results that are missing


# ----------------------------------------------------------------------------------------
# Numbers


def with_error(mean, error=None):
    """'0.01917 +- 0.00024': the error with two digits, the number with as many places; without one four digits."""
    if not math.isfinite(mean):
        return str(mean)
    if error is None or not math.isfinite(error) or error == 0:
        return _digits(mean, 4)
    places = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    return f"{_places(mean, places)} +- {_places(error, places)}"


def _digits(number, digits):
    """A number to so many significant digits, without an exponent."""
    if number == 0:
        return "0"
    return _places(number, digits - 1 - math.floor(math.log10(abs(number))))


def _places(number, places):
    return f"{round(number, places):.{max(places, 0)}f}"


def combine(lines):
    """key -> Value of the lines (dicts) that one metric gave with several seeds; lists and text are left out.

    The error of the mean of n numbers: from their own errors e_i (KEY_stderr) sqrt(sum e_i^2) / n where they have
    such, else from their scatter, std / sqrt(n), where there are two or more.
    """
    found = {}
    for key, first in lines[0].items():
        if isinstance(first, list | str | type(None)) or key.endswith("_stderr") or key in REPEATED:
            continue
        values = [line[key] for line in lines]
        own = [line.get(f"{key}_stderr") for line in lines]
        if None not in own:
            error = math.sqrt(sum(each**2 for each in own)) / len(own)
        else:
            error = standard_error(values)
        found[key] = Value(statistics.fmean(values), error)
    return found


def standard_error(values):
    """std / sqrt(n) of a mean of n values; None for one, or for equal ones."""
    return statistics.stdev(values) / math.sqrt(len(values)) or None if len(values) > 1 else None


# ----------------------------------------------------------------------------------------
# Rows


def collect(runs, s):
    """(rows of the runs that are trained, notes): a note for numbers of a column that do not compare."""
    rows, details = [], {}
    for run in runs:
        if run.final() is None:
            continue
        options, stats = None, None
        if run.run_dir() is not None:
            options, stats = plan.read_options(run.run_dir()), plan.last_stats(run.run_dir())
        row = Row(
            name=run.name,
            seed=run.seed,
            lambda_d=options["loss_kwargs"].get("lambda_d") if options else None,
            kimg=run.kimg,
            minutes=stats["Timing/total_sec"]["mean"] / 60 if stats else None,
            lacks=sum(map(len, plan.missing(run, s).values())),
        )
        for metric in plan.metrics_of(run, s) if options else []:
            lines = plan.results(run, metric, s)
            if lines:
                row.values.update(combine([lines[seed]["results"] for seed in sorted(lines)]))
            for line in lines.values():
                for name in SAME_DETAILS:
                    if name in line["details"]:
                        details.setdefault((metric, name), set()).add(str(line["details"][name]))
        rows.append(row)
    notes = [
        f"{metric}: {name} differs ({', '.join(sorted(each))}), so not all its numbers compare"
        for (metric, name), each in details.items()
        if len(each) > 1
    ]
    return rows, notes


def with_means(rows):
    """The rows, each name's followed by the mean of its trainings where there are several; its errors are those over
    trainings."""
    result = []
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        result += same
        if len(same) < 2:
            continue
        minutes = [row.minutes for row in same if row.minutes is not None]
        mean = Row(name, f"mean of {len(same)}", same[0].lambda_d, same[0].kimg, statistics.fmean(minutes))
        for key in same[0].values:
            numbers = [row.values[key].mean for row in same if key in row.values]
            if len(numbers) == len(same):
                mean.values[key] = Value(statistics.fmean(numbers), standard_error(numbers))
        result.append(mean)
    return result


def quality_key(s):
    """Name of the result that is the sweep's distance: that of the first fid or kid metric; None without one."""
    from metrics import detectors

    for metric in s.metrics:
        if metric.startswith(("fid", "kid")):
            return detectors.result_name(metric, detectors.choose("inception", s.detector))
    return None


def factors(rows, quality):
    """[(row, against lambda 0, against the baseline)], each comparison a dict with `distortion` = theirs / own and
    `distance` = own / theirs as Values; with the training of the same seed. Rows without any are left out."""
    found = []
    for row in rows:
        compared = []
        for name in ["lambda0", plan.BASELINE]:
            other = next((r for r in rows if r.name == name and r.seed == row.seed), None)
            ratios = {}
            if other is not None and other is not row:
                if all("ldbr_dist" in r.values for r in (row, other)) and row.values["ldbr_dist"].mean > 0:
                    ratios["distortion"] = other.values["ldbr_dist"].over(row.values["ldbr_dist"])
                if quality is not None and all(quality in r.values for r in (row, other)):
                    ratios["distance"] = row.values[quality].over(other.values[quality])
            compared.append(ratios)
        if any(compared):
            found.append((row, *compared))
    return found


def monotone(rows):
    """A sentence on whether distortion falls with lambda, within two standard errors; None for fewer than two."""
    chain = [
        r for r in rows if r.name.startswith("lambda") and "ldbr_dist" in r.values and isinstance(r.seed, int)
    ]
    rises, pairs = [], 0
    for seed in dict.fromkeys(row.seed for row in chain):
        same = sorted((row for row in chain if row.seed == seed), key=lambda row: row.lambda_d)
        for low, high in zip(same, same[1:], strict=False):
            a, b = low.values["ldbr_dist"], high.values["ldbr_dist"]
            pairs += 1
            if b.mean - a.mean > 2 * math.hypot(a.error or 0, b.error or 0):
                rises.append(f"{high.name} ({b}) is above {low.name} ({a}) with training seed {seed}")
    if not pairs:
        return None
    return (
        f"Distortion does not fall with lambda: {'; '.join(rises)}."
        if rises
        else ("Distortion falls with lambda in all pairs of neighbours, within two standard errors.")
    )


# ----------------------------------------------------------------------------------------
# Text


def columns(rows):
    """Keys of the results that the Markdown table shows, in order: those of other metrics, then block-resampling's."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    return [key for key in keys if not key.startswith("ldbr_")] + [key for key in SHOWN if key in keys]


def markdown(rows, notes, s, title, provenance):
    """The page: the table, factors against lambda 0 and the baseline, what its errors are, and where it is from."""
    keys = columns(rows)
    head = ["name", "lambda", "train seed", "kimg", "minutes", *[SHOWN.get(key, key) for key in keys]]
    body = [
        [
            row.name,
            "" if row.lambda_d is None else f"{row.lambda_d:g}",
            "" if row.seed is None else row.seed,
            "" if row.kimg is None else f"{row.kimg:g}",
            "" if row.minutes is None else _digits(row.minutes, 2 if row.minutes < 10 else 3),
            *[row.values.get(key, "") for key in keys],
        ]
        for row in rows
    ]
    seeds = f"{len(s.metric_seeds)} metric seed{'s' * (len(s.metric_seeds) > 1)}"
    parts = [
        f"# {title}",
        _table(head, body),
        f"+- is the standard error over {seeds} ({', '.join(map(str, s.metric_seeds))}), for ldbr_dist and inside over"
        " the latents of all of them; in rows that are means, over trainings. Minutes are those of the training.",
    ]
    quality = quality_key(s)
    compared = factors(rows, quality)
    if compared:
        head = [
            "name",
            "train seed",
            "distortion falls by",
            f"{quality or 'distance'} over lambda 0's",
            "over the baseline's",
        ]
        body = [
            [
                row.name,
                row.seed,
                f"{zero['distortion']} times" if "distortion" in zero else "",
                _percent(zero.get("distance")),
                _percent(plain.get("distance")),
            ]
            for row, zero, plain in compared
        ]
        parts += ["## Against lambda 0 and the continued baseline", _table(head, body)]
        parts.append(
            "The paper, on FFHQ at 256x256, lambda 100: distortion falls by 6.5 times, FID rises by 25 %."
        )
    lacking = [f"{row.name}, seed {row.seed}: {row.lacks}" for row in rows if row.lacks]
    parts += [text for text in [monotone(rows)] if text]
    parts += [f"Lines of results still missing: {'; '.join(lacking)}."] if lacking else []
    parts += [f"Warning: {note}." for note in notes]
    parts.append("\n".join(f"- {name}: {text}" for name, text in provenance.items()))
    return "\n\n".join(parts) + "\n"


def _percent(ratio):
    """+26.1 +- 0.4 %, from a ratio; '' for None."""
    if ratio is None:
        return ""
    text = str(Value(100 * (ratio.mean - 1), None if ratio.error is None else 100 * ratio.error))
    return f"{'' if text.startswith('-') else '+'}{text} %"


def _table(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def comma_separated(rows, s):
    """The same with all results: each with a column for its standard error, six digits; factors at the end."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    names = [name for key in keys for name in (key, f"{key}_stderr")]
    ratios = ["distortion_lambda0_over_own", "distance_over_lambda0", "distance_over_baseline"]
    compared = {id(row): (zero, plain) for row, zero, plain in factors(rows, quality_key(s))}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "lambda_d", "train_seed", "kimg", "minutes", *names, *ratios])
    for row in rows:
        zero, plain = compared.get(id(row), ({}, {}))
        cells = [row.values.get(key, Value(None)) for key in keys]
        numbers = [number for value in cells for number in (value.mean, value.error)]
        last = [zero.get("distortion"), zero.get("distance"), plain.get("distance")]
        numbers += [value and value.mean for value in last]
        writer.writerow(
            [row.name, _number(row.lambda_d), row.seed, _number(row.kimg), _number(row.minutes)]
            + [_number(number) for number in numbers]
        )
    return out.getvalue()


def _number(value):
    return "" if value is None else f"{value:.6g}"


def write_text(path, text):
    """Writes a file, complete or not at all."""
    with dnnlib.util.open_atomic(path) as f:
        f.write(text.encode("utf-8"))
