# SPDX-License-Identifier: Apache-2.0
"""Options of the training loop as nested dicts: setting one by its dotted name, and what must hold for all of them
together."""

import inspect
import json
import math

import dnnlib


class ConfigError(ValueError):
    """A mistake in the options of a training run, in one line."""


# What numbers of the loop may be: least, most, 'above' (the least itself is too small), 'whole', 'null'.
LIMITS = {
    **dict.fromkeys(["total_kimg", "kimg_per_tick"], (0, math.inf, "above")),
    **dict.fromkeys(["batch_size", "batch_gpu", "num_gpus", "ada_interval"], (0, math.inf, "above whole")),
    **dict.fromkeys(["G_reg_interval", "D_reg_interval", "keep_last"], (0, math.inf, "above whole null")),
    **dict.fromkeys(
        ["image_snapshot_ticks", "network_snapshot_ticks", "data_loader_kwargs.prefetch_factor"],
        (0, math.inf, "above whole null"),
    ),
    "training_set_kwargs.max_size": (0, math.inf, "above whole null"),
    "training_set_kwargs.random_seed": (0, 2**31 - 1, "whole"),
    "random_seed": (0, 2**31 - 1, "whole"),
    "data_loader_kwargs.num_workers": (0, math.inf, "whole"),
    "ema_kimg": (0, math.inf, ""),
    "ema_rampup": (0, math.inf, "above null"),
    "augment_p": (0, math.inf, ""),
    "ada_target": (0, 1, "null"),
    "ada_kimg": (0, math.inf, "above"),
    **dict.fromkeys(["G_kwargs.z_dim", "G_kwargs.w_dim"], (0, math.inf, "above whole")),
    **{
        f"{part}.channel_{end}": (0, math.inf, "above whole")
        for part in ["G_kwargs.synthesis_kwargs", "D_kwargs"]
        for end in ["base", "max"]
    },
    "G_kwargs.mapping_kwargs.num_layers": (0, math.inf, "whole"),
}
SWITCHES = ["cudnn_benchmark", "allow_tf32", "resume_trust", "data_loader_kwargs.pin_memory"]
SWITCHES += ["training_set_kwargs.use_labels", "training_set_kwargs.xflip"]


def easy(value):
    """Nested dicts (as JSON gives them) as EasyDicts."""
    if isinstance(value, dict):
        return dnnlib.EasyDict({k: easy(v) for k, v in value.items()})
    return [easy(v) for v in value] if isinstance(value, list) else value


def set_option(c, assignment):
    """Applies one `a.b=json` to the options; a name that does not exist there is an error listing those that
    do."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}: expected name=value, such as loss_kwargs.pl_weight=0")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *parents, last = path.split(".")
    target = c
    for i, name in enumerate(parents):
        if not isinstance(target.get(name), dict):
            known = [key for key in target if isinstance(target[key], dict)]
            raise ConfigError(f"--set {path}: no {'.'.join(parents[: i + 1])}; there are {', '.join(known)}")
        target = target[name]
    known = _known_names(c, parents)
    if last not in known:
        raise ConfigError(f"--set {path}: {last} is not known there; there are {', '.join(sorted(known))}")
    before = target.get(last)
    if isinstance(before, dict) and not isinstance(value, dict):
        raise ConfigError(
            f"--set {path}: these are {', '.join(before) or 'several'}; set one, as {path}.name=value"
        )
    if type(before) in (int, float) and type(value) not in (int, float, type(None)):
        raise ConfigError(f"--set {path}: expected a number in place of {before}, not {value!r}")
    if last == "class_name":
        check_code(f"--set {path}", value)
    target[last] = value


def _known_names(c, parents):
    """Names that may be set in the dict at c.<parents>, as a set."""
    if not parents:
        from training.training_loop import DEFAULTS

        of_their_own = {"run_dir", "exact_resume", "num_gpus", "device", "resume_pkl", "resume_trust"}
        return set(DEFAULTS) - of_their_own  # which have options
    target = c
    for name in parents:
        target = target[name]
    if "class_name" in target:
        return argument_names(dnnlib.util.get_obj_by_name(target["class_name"])) | set(target)
    owner = c[parents[0]].get("class_name")  # options of its parts: synthesis_kwargs, mapping_kwargs, ...
    if owner is None:
        return set(target) | {"num_workers", "pin_memory", "prefetch_factor", "detector"}
    module, _name = dnnlib.util.get_module_from_obj_name(owner)
    parts = [each for each in vars(module).values() if isinstance(each, type)]
    return set(target).union(*map(argument_names, parts))


def argument_names(cls):
    """Names of all constructor arguments of a class and of those it derives from."""
    names = set()
    for each in cls.__mro__:
        if "__init__" in vars(each) and each is not object:
            parameters = inspect.signature(each.__init__).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return names - {"self"}


def check_shape(c, opts):
    """Pictures that are not square need networks that know them."""
    height, width = opts.img_shape
    for class_name in [c.G_kwargs.class_name, c.D_kwargs.class_name]:
        if height != width and "img_shape" not in argument_names(dnnlib.util.get_obj_by_name(class_name)):
            raise ConfigError(
                f"--data: pictures are {width}x{height} pixels, and {class_name} knows square ones only"
            )


def check_numbers(c):
    """Numbers that are none, and those of the loop that must be positive."""
    for path, value in _values(c):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path} must be a finite number, not {value}")
    for path, (least, most, kinds) in LIMITS.items():
        value = _at(c, path)
        if value is MISSING or (value is None and "null" in kinds):
            continue
        number = type(value) is int or (type(value) is float and "whole" not in kinds)
        if not number or not least <= value <= most or (value == least and "above" in kinds):
            raise ConfigError(f"{path} must be {_wanted(least, most, kinds)}, not {value}")
    for path in SWITCHES:
        if _at(c, path) not in (True, False, MISSING):
            raise ConfigError(f"{path} must be true or false, not {_at(c, path)}")


MISSING = object()


def _at(c, path):
    """The value under a dotted name; MISSING where it is not there."""
    for name in path.split("."):
        c = c.get(name, MISSING) if isinstance(c, dict) else MISSING
    return c


def _wanted(least, most, kinds):
    """A limit in words."""
    noun = "whole number" if "whole" in kinds else "number"
    if "above" in kinds:
        text = f"a positive {noun}"
    else:
        text = f"a {noun} from {least} " + ("on" if most == math.inf else f"to {most}")
    return text + " or null" * ("null" in kinds)


def check_names(c):
    """Lists of names, and names of code, that are none."""
    from training import running

    for key in ["metrics", "tick_hooks", "log", "allow_partial"]:
        value = c.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{key} must be a list of names, not {json.dumps(value)}")
    running.check_metrics(c.metrics)
    running.check_trackers(c.get("log", []))
    for key in [*c.tick_hooks, c.get("transfer")]:
        if key is not None:
            check_code(key, key)


def check_code(path, name):
    """ConfigError unless `name` is a dotted name of something that exists; path: the option to blame."""
    try:
        dnnlib.util.get_obj_by_name(name)
    except (ImportError, AttributeError, TypeError, ValueError) as err:
        raise ConfigError(f"{path}: there is no {name!r} to import ({err})") from err


def _values(c, path=""):
    """(dotted path, value) of all that stands in nested dicts and lists."""
    items = c.items() if isinstance(c, dict) else enumerate(c)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _values(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _mbstd_group(c):
    """Members of a group of the minibatch statistics; None: the whole batch."""
    return c.D_kwargs.get("epilogue_kwargs", {}).get("mbstd_group_size", 4)


def check_batch(c):
    """The batch must be shared by the processes, and by the groups of the minibatch statistics."""
    if c.batch_size % c.num_gpus:
        raise ConfigError(
            f"the batch of {c.batch_size} cannot be shared by {c.num_gpus} processes; give --batch"
        )
    share = c.batch_size // c.num_gpus
    c.batch_gpu = min(c.batch_gpu, share)
    if share % c.batch_gpu:
        raise ConfigError(f"batch_gpu {c.batch_gpu} must divide the {share} pictures of each process")
    group = _mbstd_group(c)
    if group and c.batch_gpu % min(group, c.batch_gpu):
        raise ConfigError(
            f"--batch, --batch-gpu: {c.batch_gpu} pictures at a time must be a multiple of the"
            f" minibatch-std group of {group}"
        )


def smaller_batch_gpu(c):
    """The largest batch_gpu that is allowed and at most half of the present one; None where there is none."""
    group = _mbstd_group(c)
    share = c.batch_size // c.num_gpus
    fits = [n for n in range(1, c.batch_gpu // 2 + 1) if share % n == 0 and n % min(group or n, n) == 0]
    return max(fits, default=None)
