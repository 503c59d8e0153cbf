# SPDX-License-Identifier: Apache-2.0
"""From what the family's pickles hold (class name, constructor arguments, state) to networks of our own classes.

The source code that travels in such a file is never run. A class of a known name (NETWORKS) is built from the
arguments, gets the tensors, strictly, and must then agree with the file in every setting that both have: the same
name does not always mean the same defaults.
"""

import hashlib
import inspect
import math
import sys
from typing import Any

import torch

import dnnlib
from training.formats import NETWORKS
from training.formats.building import MOST_TENSORS, build_from_tensors, shown
from training.formats.safe_pickle import Persistent

VERSION = 6  # of the format of torch_utils.persistence
MAX_MODULES = 5000
LONGEST_NAME = 100  # of a part or a tensor

# sha256 of sources that earlier versions of this project put into files, the shipped network's among them
OUR_EARLIER_SOURCES = {
    "cc84d9225584e8650b4bb4e3e9141290af4b23803a49fbd85e2f8e5772d35ca2": "the networks of a plug-in, 0.1",
    "b10019e27b8596f0a704e00fdf4d02f0e04848cf6a0bc827a7b9fd913bc0b4dd": "training/networks.py of 0.1",
    "d4b2bbce75e96a9a05e576ef4eab0d94e7687facab4be100369cf396c34b89a1": "training/augment.py of 0.1",
}


class RebuildError(ValueError):
    """A network in a file that cannot be rebuilt by our classes. The message says why."""


def rebuild(found: Persistent, where: str) -> torch.nn.Module:
    """The network that a persistent object describes: eval mode, no gradients, CPU.

    where: its name in messages. RebuildError for an unknown class, for arguments and tensors that do not fit, and for
    settings in the file that our class would not reproduce.
    """
    meta, state = _checked_meta(found, where)
    name = meta["class_name"]
    if name not in NETWORKS:
        known = ", ".join(NETWORKS.names())
        raise RebuildError(f"{where} is of the class {name!r:.80}, which is not one of {known}")
    cls = NETWORKS.resolve(name)
    modules = _modules(found, where)
    kwargs = _all_by_name(cls, state, where)
    kwargs = _as_ours(name, kwargs, modules)
    tensors = _tensors(modules, where)
    try:
        network = build_from_tensors(cls, kwargs, tensors)
    except ValueError as err:
        raise RebuildError(f"{where}: {err}") from err
    _compare_settings(network, modules, where)
    return network.eval().requires_grad_(False)


def foreign_sources(found: list[Persistent]) -> list[str]:
    """Names of the classes whose source in the file is neither the present one of ours nor an earlier one."""
    ours = {_sha256(text) for text in map(_present_source, NETWORKS.names())} | set(OUR_EARLIER_SOURCES)
    names = {}
    for each in found:
        source, name = each.meta.get("module_src"), each.meta.get("class_name")
        if isinstance(source, str) and isinstance(name, str) and _sha256(source) not in ours:
            names[name[:LONGEST_NAME]] = None
    return list(names)


def _sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _present_source(name):
    return inspect.getsource(sys.modules[NETWORKS.resolve(name).__mro__[1].__module__])


def _checked_meta(found, where):
    if not isinstance(found, Persistent):
        raise RebuildError(f"{where} is a {type(found).__name__}, not a network")
    meta = found.meta
    if meta.get("type") != "class" or meta.get("version") != VERSION:
        raise RebuildError(
            f"{where} is of version {shown(meta.get('version'))} of the format, {VERSION} is known"
        )
    if not isinstance(meta.get("class_name"), str) or not isinstance(meta.get("state"), dict):
        raise RebuildError(f"{where} has no class name or no state")
    return meta, meta["state"]


def _dict(state, key, where):
    value = state.get(key, {})
    if not isinstance(value, dict):
        raise RebuildError(f"{where}: {key} is a {type(value).__name__}")
    return value


def _named(state, key, where):
    """(name, value) of all that is there in a dict of parts or tensors."""
    for name, value in _dict(state, key, where).items():
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise RebuildError(f"{where}: {shown(name)} is not the name of a part")
        if value is not None:
            yield name, value


def _modules(found, where):
    """path -> state of the object and of all its submodules, parents first; '' is the object itself."""
    modules, todo = {}, [("", found)]
    while todo:
        path, each = todo.pop()
        _meta, state = _checked_meta(each, f"{where}.{path}".rstrip("."))
        modules[path] = state
        parts = len(modules) + len(todo) + len(_dict(state, "_modules", where))
        if parts > MAX_MODULES or path.count(".") > 20:
            raise RebuildError(f"{where} has more than {MAX_MODULES} parts, or parts that hold themselves")
        todo += [(f"{path}.{name}".lstrip("."), value) for name, value in _named(state, "_modules", where)]
    return modules


def _tensors(modules, where):
    """path -> tensor of all parameters and buffers."""
    tensors = {}
    for path, state in modules.items():
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(state, kind, where):
                if not isinstance(value, torch.Tensor):
                    raise RebuildError(f"{where} holds parameters that are not tensors")
                tensors[f"{path}.{name}".lstrip(".")] = value
                if len(tensors) > MOST_TENSORS:
                    raise RebuildError(f"{where} has more than {MOST_TENSORS} tensors")
    return tensors


# ----------------------------------------------------------------------------------------
# Constructor arguments


def _all_by_name(cls, state, where):
    """The constructor's arguments with those given by position under their names."""
    args, kwargs = state.get("_init_args", ()), _dict(state, "_init_kwargs", where)
    parameters = list(inspect.signature(cls.__mro__[1].__init__).parameters)[1:]
    if not isinstance(args, (tuple, list)) or len(args) > len(parameters):
        raise RebuildError(f"{where}: {cls.__name__} takes {len(parameters)} arguments")
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def _as_ours(name, kwargs, modules):
    """Arguments in stylegan2-ada-pytorch's form that give what the file's own class gave.

    stylegan3's StyleGAN2 takes the options of the synthesis network flat and has other defaults for the number of
    half-precision resolutions, the clamp and w_avg_beta. Which they were is seen from the state.
    """
    if name not in ("Generator", "Discriminator"):
        return kwargs
    kwargs = dict(kwargs)
    if name == "Generator":
        own = inspect.signature(NETWORKS.resolve(name).__mro__[1].__init__).parameters
        flat = {key: kwargs.pop(key) for key in list(kwargs) if key not in own}
        flat.pop("fused_modconv_default", None)  # when to fold styles into weights: no change of the result
        kwargs.setdefault("mapping_kwargs", {})
        kwargs.setdefault("synthesis_kwargs", {})
        synthesis = kwargs["synthesis_kwargs"] = dnnlib.EasyDict({**kwargs["synthesis_kwargs"], **flat})
        synthesis.pop("fused_modconv_default", None)
        _fill_in(synthesis, "num_fp16_res", 0, _num_fp16(modules))
        _fill_in(synthesis, "conv_clamp", None, modules.get("synthesis.b4.conv1", {}).get("conv_clamp"))
        beta = modules.get("mapping", {}).get("w_avg_beta", 0.995)
        mapping = kwargs["mapping_kwargs"] = dnnlib.EasyDict(kwargs["mapping_kwargs"])
        _fill_in(mapping, "w_avg_beta", 0.995, beta)
    else:
        _fill_in(kwargs, "num_fp16_res", 0, _num_fp16(modules))
        _fill_in(kwargs, "conv_clamp", None, modules.get("b4.conv", {}).get("conv_clamp"))
    return kwargs


def _fill_in(kwargs, key, default, value):
    """Sets an argument that was not given, where the class of the file had another default than ours."""
    if key not in kwargs and value != default:
        kwargs[key] = value


def _num_fp16(modules):
    return sum(state.get("use_fp16") is True for state in modules.values())


# ----------------------------------------------------------------------------------------
# Settings


def _compare_settings(network, modules, where):
    """RebuildError where a plain attribute that both have differs: the result would be another network."""
    for path, state in modules.items():
        for key, ours in vars(network.get_submodule(path)).items():
            if key.startswith("_") or key == "training" or key not in state:
                continue
            theirs = state[key]
            if _is_plain(theirs) and _is_plain(ours) and not _same(theirs, ours):
                raise RebuildError(
                    f"{where}{'.' if path else ''}{path}: {key} is {shown(theirs)} in the file, and our class of that"
                    f" name makes it {shown(ours)}"
                )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _same(a, b):
    if isinstance(a, float) or isinstance(b, float):
        return (
            a is not None
            and b is not None
            and not isinstance(a, str)
            and not isinstance(b, str)
            and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
        )
    return a == b
