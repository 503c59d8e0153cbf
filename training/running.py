# SPDX-License-Identifier: Apache-2.0
"""Options that may change while a run goes on: they decide how long it takes and what it writes, never what it
learns."""

import re

import dnnlib
from training.configs import ConfigError, Options

FREE_TO_CHANGE = {
    "kimg",
    "workers",
    "snap",
    "metrics",
    "detector",
    "best",
    "keep_last",
    "log",
    "trust_pickle",
}

# By the first letters of a metric's name: which way is better, and how the names of its numbers end.
JUDGED = {
    "fid": ("lower", [""]),
    "kid": ("lower", [""]),
    "ppl": ("lower", [""]),
    "is": ("higher", [""]),  # the first number, the mean
    "pr": ("higher", ["_precision", "_recall"]),
}


def change_running(c, opts):
    """Applies those options (dict: values by name, None where not given) to the options of the loop; returns their
    part of the description. ConfigError for what cannot be."""
    opts = Options(opts)
    if opts.metrics is not None:
        check_metrics(opts.metrics)
        c.metrics = list(opts.metrics)
    if opts.detector is not None:
        c.metric_kwargs = dnnlib.EasyDict(detector=opts.detector)
    if opts.best is not None:
        parse_best(opts.best)
        c.best = opts.best
    if c.get("best") is not None and parse_best(c.best)[0] not in c.metrics:
        c.metrics = [*c.metrics, parse_best(c.best)[0]]
    if opts.keep_last is not None:
        if opts.keep_last < 1:
            raise ConfigError("--keep-last must be at least 1")
        c.keep_last = opts.keep_last
    if opts.log is not None:
        check_trackers(opts.log)
        c.log = list(opts.log)
    if opts.workers is not None:
        if opts.workers < 0:
            raise ConfigError("--workers must be at least 0")
        prefetch = dict(prefetch_factor=2) if opts.workers else {}
        c.data_loader_kwargs = dnnlib.EasyDict(pin_memory=True, num_workers=opts.workers, **prefetch)
    desc = []
    if opts.kimg is not None:
        if opts.kimg < 1:
            raise ConfigError("--kimg must be at least 1")
        desc.append(f"kimg{opts.kimg}")
        c.total_kimg = opts.kimg
    if opts.snap is not None:
        if opts.snap < 1:
            raise ConfigError("--snap must be at least 1")
        c.image_snapshot_ticks = c.network_snapshot_ticks = opts.snap
    return desc


def check_metrics(names):
    """Refuses metrics that are not registered."""
    from metrics import metric_main

    if not all(metric_main.is_valid_metric(name) for name in names):
        known = metric_main.list_valid_metrics()
        raise ConfigError("\n".join(["--metrics can only contain the following values:", *known]))


def check_trackers(names):
    """Refuses trackers that are not known or cannot be imported."""
    from training import trackers

    for name in names:
        if name not in trackers.TRACKERS:
            raise ConfigError(
                f"--log can only contain {', '.join(trackers.TRACKERS)}, or be none: not {name}"
            )
        problem = trackers.why_unavailable(name)
        if problem:
            raise ConfigError(problem)


def parse_best(name):
    """(metric, part of its number's name, 'lower' or 'higher') for --best=NAME.

    NAME is a metric, or one of its numbers where it has several (pr50k3_full_recall). Metrics of plug-ins say which
    way is better in an attribute `better` of their function. ConfigError for a name that cannot be judged by.
    """
    from metrics import metric_main

    choices = {}
    for metric in metric_main.list_valid_metrics():
        better, endings = JUDGED.get(re.match("[a-z]*", metric)[0], (None, [""]))
        choices.update({metric + ending: (metric, ending, better) for ending in endings})
    if name not in choices:
        several = [choice for choice in choices if choice.startswith(f"{name}_")]
        known = [choice for choice in several or choices if choices[choice][2] is not None]
        raise ConfigError(f"--best={name} is not a number to judge by; there are {', '.join(known)}")
    metric, ending, better = choices[name]
    better = better or getattr(metric_main.METRICS.resolve(metric), "better", None)
    if better not in ("lower", "higher"):
        raise ConfigError(
            f"--best={name}: nobody said which way is better; an attribute `better` of its function, 'lower' or"
            " 'higher', would"
        )
    return metric, ending, better
