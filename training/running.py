# SPDX-License-Identifier: Apache-2.0
"""Options that may change while a run goes on: they decide how long it takes and what it writes, never what it
learns."""

import re

import dnnlib
from dnnlib.plugins import own_class
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


def check_saved(saved, path, trust=False):
    """ConfigError where what was read from `path` is not the options that a run recorded there, or names code that
    is neither of this program nor of a plug-in: going on would run it. trust: let them name any code."""
    from training.training_loop import DEFAULTS

    needed = {"command", "training_set_kwargs", "G_kwargs", "D_kwargs", "total_kimg", "num_gpus", "device"}
    if not isinstance(saved, dict) or not needed <= set(saved) <= {*DEFAULTS, "command"}:
        raise ConfigError(f"--resume: {path} is not what train.py writes")
    defaults = {**DEFAULTS, "command": {}, "augment_kwargs": {}}
    for key, value in saved.items():
        kind = type(defaults[key])
        number = kind in (int, float)
        fits = type(value) in (int, float) if number else isinstance(value, kind) or kind not in (dict, list)
        if value is not None and not fits:
            raise ConfigError(
                f"--resume: {path} is damaged: {key} is not a {'number' if number else kind.__name__}"
            )
    for where, name, base in _named_classes(saved):
        if not trust and not (own_class(name, base) or _is_optimizer(name, base)):
            raise ConfigError(
                f"--resume: {path} asks for {str(name)[:80]!r} as {where}, which is neither of this program nor of a"
                " plug-in; --trust-pickle runs it, if you trust the file"
            )


def _named_classes(saved):
    """(where, dotted name, class that it must be derived from) of all code that the options name."""
    import torch

    from training import dataset, hooks

    bases = dict.fromkeys(["G_kwargs", "D_kwargs", "augment_kwargs"], torch.nn.Module)
    bases.update(dict.fromkeys(["G_opt_kwargs", "D_opt_kwargs"], torch.optim.Optimizer))
    bases.update(training_set_kwargs=dataset.Dataset, loss_kwargs=object)
    for key, base in bases.items():
        if saved.get(key):
            yield f"{key}.class_name", saved[key].get("class_name"), base
    yield from (("tick_hooks", name, hooks.Hook) for name in saved.get("tick_hooks") or [])


def _is_optimizer(name, base):
    """Whether it is one of PyTorch's, and may be."""
    import torch

    package, _dot, leaf = str(name).rpartition(".")
    found = (
        getattr(torch.optim, leaf, None)
        if package == "torch.optim" and base is torch.optim.Optimizer
        else None
    )
    return isinstance(found, type) and issubclass(found, base)


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
