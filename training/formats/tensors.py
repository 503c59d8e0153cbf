# SPDX-License-Identifier: Apache-2.0
"""Snapshots as safetensors: a file that holds tensors and text, and that nothing in can run.

Tensors have the networks' own names under the name of the network (`G_ema.synthesis.b4.const`), float32. What the
constructors were given is JSON in the file's metadata, key `snapshot`, and once more in `<file>.json`, for people:

    {"format_version": 1, "networks": {"G_ema": {"class_name": "Generator", "init_kwargs": {...}}, ...},
     "training_set_kwargs": {...} or null}

Class names are those of training.formats.NETWORKS; reading builds these classes of ours and no others.
"""

import json

import numpy as np
import torch

import dnnlib
from dnnlib.plugins import load_plugins
from torch_utils import misc
from training import formats
from training.formats.building import build_from_tensors, one_line

INSTALL = "pip install safetensors"
VERSION = 1
KEY = "snapshot"
LONGEST_HEADER = 2**23  # bytes; those of the largest networks have some 100,000
NAMES = ("G", "D", "G_ema", "augment_pipe")


def save(path, data, only=None):
    """Writes a snapshot dict (as training.snapshot.load_network_pkl returns it) to `path` and `path`.json.

    only: names of the networks to write, e.g. ["G_ema"] for a small file to share, which does not tell
    `training_set_kwargs` either; default: all that `data` has. ValueError, and no file, for a network that
    `load` could not build again.
    """
    safetensors = _safetensors()
    load_plugins()
    present = [name for name in NAMES if data.get(name) is not None]
    names = present if only is None else list(only)
    missing = [name for name in names if name not in present]
    if missing or not names:
        wanted = ", ".join(missing) or "no networks"
        raise ValueError(f"cannot write {wanted}: the snapshot has {', '.join(present) or 'no networks'}")
    about = dict(format_version=VERSION, networks={}, training_set_kwargs=None)
    if only is None:
        about["training_set_kwargs"] = _as_json("training_set_kwargs", data.get("training_set_kwargs"))
    tensors = {}
    for name in names:
        about["networks"][name], own = _taken_apart(name, data[name])
        tensors.update({f"{name}.{key}": tensor for key, tensor in own.items()})
    content = safetensors.torch.save(tensors, metadata={"format": "pt", KEY: json.dumps(about)})
    with dnnlib.util.open_atomic(path) as f:
        f.write(content)
    with dnnlib.util.open_atomic(f"{path}.json") as f:
        f.write((json.dumps(about, indent=2) + "\n").encode())


def load(file):
    """Reads such a file (open, binary): dict with the networks that it has, on the CPU, in eval mode, without
    gradients, and training_set_kwargs.

    Executes nothing that the file says. ValueError, in one line, for a file of another kind, a damaged one,
    classes that are not known, and arguments or tensors that do not fit each other.
    """
    safetensors = _safetensors()
    load_plugins()
    content = file.read()
    length = int.from_bytes(content[:8], "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"it is not a safetensors file: a header of {length:,} bytes")
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as err:  # KeyError: a type of numbers that torch lacks
        raise ValueError(f"it is not a safetensors file: {one_line(err)}") from err
    header = json.loads(content[8 : 8 + length])
    about = _description(header.get("__metadata__") or {})
    own = {name: {} for name in about["networks"]}
    for key, tensor in tensors.items():
        name, _dot, rest = key.partition(".")
        if name not in own:
            raise ValueError(f"{key!r:.80} belongs to none of its networks")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{key} holds {tensor.dtype}, such files hold torch.float32")
        own[name][rest] = tensor
    data = {name: _put_together(name, about["networks"][name], own[name]) for name in own}
    return dict(data, training_set_kwargs=about["training_set_kwargs"])


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as err:
        raise formats.MissingPackageError(
            f"files of tensors need a package that is not installed: {INSTALL}"
        ) from err
    return safetensors


def _class_of(name):
    if name not in formats.NETWORKS:
        known = ", ".join(formats.NETWORKS.names())
        raise ValueError(f"unknown network class {name!r:.80}; known: {known}")
    return formats.NETWORKS.resolve(name)


# ----------------------------------------------------------------------------------------
# Writing


def _taken_apart(name, network):
    """({"class_name", "init_kwargs"}, name -> tensor) of a network; ValueError unless our class of that name
    takes both."""
    class_name = type(network).__name__
    try:
        cls = _class_of(class_name)
        if type(network) is not cls:
            raise ValueError(
                f"its class {class_name} is not the one of this program;"
                " opened by training.snapshot.load_network_pkl it would be"
            )
        if network.init_args:
            raise ValueError("it was built with positional arguments; only keyword arguments have names")
        kwargs = _as_json("an argument", network.init_kwargs)
        own = {key: t.detach().cpu().contiguous() for key, t in misc.named_params_and_buffers(network)}
        for key, tensor in own.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"{key} is {tensor.dtype}, such files hold torch.float32")
        build_from_tensors(cls, kwargs, own)
    except ValueError as err:
        raise ValueError(f"{name} cannot be written as tensors: {err}") from err
    return dict(class_name=class_name, init_kwargs=kwargs), own


def _as_json(what, value):
    """What `value` is after a trip through JSON; NumPy's numbers become Python's, tuples become lists."""

    def plain(part):
        if isinstance(part, np.generic):
            return part.item()
        raise TypeError(f"{what} holds a {type(part).__name__}, which JSON has no word for")

    try:
        return json.loads(json.dumps(value, default=plain))
    except TypeError as err:
        raise ValueError(str(err)) from err


# ----------------------------------------------------------------------------------------
# Reading


def _description(metadata):
    """The checked JSON of a file; ValueError where it is not what `save` writes."""
    if KEY not in metadata:
        raise ValueError("it holds tensors, but nothing says what networks they are of")
    try:
        about = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as err:
        raise ValueError(f"its description is not JSON ({one_line(err)})") from err
    if not isinstance(about, dict) or about.get("format_version") != VERSION:
        found = about.get("format_version") if isinstance(about, dict) else None
        raise ValueError(f"its description has format version {found!r:.20}, this program reads {VERSION}")
    networks = about.get("networks")
    if set(about) != {"format_version", "networks", "training_set_kwargs"} or not _all_dicts(networks):
        raise ValueError("its description lacks a part, or has one that is not known")
    if not isinstance(about["training_set_kwargs"], (dict, type(None))):
        raise ValueError("its training_set_kwargs are not a dict")
    for name, network in networks.items():
        if name not in NAMES:
            raise ValueError(f"it names a network {name!r:.80}; known: {', '.join(NAMES)}")
        kinds = {key: type(value) for key, value in network.items()}
        if kinds != dict(class_name=str, init_kwargs=dict):
            raise ValueError(f"its description of {name} is not a class_name and its init_kwargs")
    return about


def _all_dicts(value):
    """Whether it is a dict, not empty, of dicts."""
    return isinstance(value, dict) and bool(value) and all(isinstance(v, dict) for v in value.values())


def _put_together(name, network, tensors):
    """The network, as snapshots hold it: in eval mode, without gradients."""
    try:
        cls = _class_of(network["class_name"])
        return build_from_tensors(cls, network["init_kwargs"], tensors).eval().requires_grad_(False)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err
