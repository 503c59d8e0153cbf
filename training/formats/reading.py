# SPDX-License-Identifier: Apache-2.0
"""Tells the kinds of network files apart and opens each with its reader."""

import logging
import pickle
from collections.abc import Collection
from typing import Any, BinaryIO

from training.formats import persistent, safe_pickle, torch_file
from training.formats.building import plain_values

NETWORK_KEYS = ["G", "D", "G_ema"]
MOST_NETWORKS = 16
TRUST_HINT = "if you trust the file, --trust-pickle (in Python trust=True) runs the code that it holds"

log = logging.getLogger(__name__)


def kind_of(file: BinaryIO) -> str | None:
    """What a seekable file is, by how it begins: 'checkpoint' (of torch.save), 'safetensors', 'pickle', or None."""
    start = file.read(16)
    file.seek(-len(start), 1)
    if torch_file.recognises(start):
        return "checkpoint"
    if start[8:9] == b"{":
        return "safetensors"
    return "pickle" if start[:1] == b"\x80" else None


def read_networks(
    file: BinaryIO, name: str, trust: bool = False, only: Collection[str] | None = None
) -> dict[str, Any]:
    """The dict of a snapshot from a seekable binary file, whatever kind it is: a pickle of the family, of TensorFlow, a
    checkpoint of rosinality's, or a safetensors file.

    name: of the file, for messages. trust: unpickle as Python does. only: the networks that are wanted, others may be
    missing or broken. ValueError, in one line, for what cannot be read.
    """
    kind = kind_of(file)
    if kind == "checkpoint":
        from training.formats import rosinality

        return rosinality.convert(rosinality.read_checkpoint(file), only=only)
    if kind == "safetensors":
        from training.formats import tensors

        return tensors.load(file)
    if kind != "pickle":
        raise ValueError("it is neither a pickle, nor a PyTorch checkpoint, nor a safetensors file")
    if trust:
        log.warning("Note: %s is opened by running whatever code it holds, as asked", name)
        data = _Trusting(file).load()
    else:
        data = safe_pickle.read(file)
    if isinstance(data, tuple) and len(data) == 3 and all(isinstance(n, safe_pickle.TFNetwork) for n in data):
        from training.formats import tensorflow

        return tensorflow.convert(*data, only=only)
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}, expected a dict with {', '.join(NETWORK_KEYS)}")
    return data if trust else _rebuild_all(data, name, only)


class _Trusting(pickle.Unpickler):
    """Python's unpickler, which also opens TensorFlow's networks without TensorFlow."""

    def find_class(self, module, name):
        if (module, name) == ("dnnlib.tflib.network", "Network"):
            return safe_pickle.TFNetwork
        return super().find_class(module, name)


def _rebuild_all(data, name, only):
    """The dict with networks of our classes in place of what describes them."""
    skipped = [] if only is None else [key for key in [*NETWORK_KEYS, "augment_pipe"] if key not in only]
    data = {key: value for key, value in data.items() if key not in skipped}
    found = {key: value for key, value in data.items() if isinstance(value, safe_pickle.Persistent)}
    if len(found) > MOST_NETWORKS:
        raise ValueError(f"it holds {len(found)} networks, the most is {MOST_NETWORKS}")
    if isinstance(data.get("training_set_kwargs"), dict):
        data["training_set_kwargs"] = plain_values("training_set_kwargs", data["training_set_kwargs"])
    foreign = persistent.foreign_sources(list(found.values()))
    if foreign:
        log.warning(
            "Note: %s carries source code of its own for %s; it was not run, our classes of these names are used",
            name, ", ".join(foreign),
        )  # fmt: skip
    return {**data, **{key: persistent.rebuild(value, key) for key, value in found.items()}}
