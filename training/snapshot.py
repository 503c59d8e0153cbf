# SPDX-License-Identifier: Apache-2.0
"""network-snapshot-*.pkl: the family's pickles of G, D, G_ema and the augmentation pipe; written and read
here only."""

import contextlib
import copy
import io
import os
import pickle

import torch

import dnnlib
from dnnlib.plugins import load_plugins
from torch_utils import misc
from training.formats import reading
from training.formats.persistent import RebuildError
from training.formats.safe_pickle import UnsafePickleError


class SnapshotError(ValueError):
    """A file that cannot be opened as a network snapshot."""


def network_for_snapshot(module):
    """A copy of `module` as snapshots hold it: on the CPU, in eval mode, without gradients."""
    if module is None:
        return None
    return copy.deepcopy(module).eval().requires_grad_(False).cpu()


def save_network_pkl(path, *, G, D, G_ema, augment_pipe=None, training_set_kwargs=None):
    """Writes the family's snapshot dict with pickle protocol 4, through a temporary name."""
    data = dict(training_set_kwargs=None if training_set_kwargs is None else dict(training_set_kwargs))
    for name, module in [("G", G), ("D", D), ("G_ema", G_ema), ("augment_pipe", augment_pipe)]:
        data[name] = network_for_snapshot(module)
    with dnnlib.util.open_atomic(path) as f:
        pickle.dump(data, f, protocol=4)


def load_network_pkl(source, trust=False, force_fp16=False, only=None):
    """Reads networks from any kind of file that the family's users have: dict with G, D, G_ema (modules, on the
    CPU, eval mode, no gradients), training_set_kwargs and augment_pipe (each may be None).

    source: a path, a URL or an open binary file: a pickle of stylegan2-ada-pytorch, of stylegan3's StyleGAN2, of
    TensorFlow's StyleGAN2, or of ours, a checkpoint of rosinality's, or a safetensors file of ours. The file is
    read as data: known classes are rebuilt by our own code from their arguments and tensors, and nothing in the
    file is run. trust=True unpickles as Python does instead, which runs what the file says. force_fp16: the four
    highest resolutions compute in float16 (on CUDA). only: names of the networks that are wanted, such as
    ['G_ema']; the others are left out and may be missing, as G and D may in a safetensors file, which is made to
    hold what is to be shared. Raises SnapshotError with one line for anything else.
    """
    load_plugins()  # their network classes
    is_file = hasattr(source, "read")
    name = str(getattr(source, "name", "the file") if is_file else source)
    with contextlib.ExitStack() as stack:
        try:
            file = source
            if not is_file:
                file = stack.enter_context(dnnlib.util.open_url(name, verbose=False))
            if not file.seekable():
                file = io.BytesIO(file.read())
            shared = only is None and reading.kind_of(file) == "safetensors"
            data = reading.read_networks(file, name, trust, only)
        except OSError as err:
            raise SnapshotError(f"cannot read {name}: {err.strerror or err}") from err
        except UnsafePickleError as err:
            raise SnapshotError(f"{name} asks for {err}: nothing was run; {reading.TRUST_HINT}") from err
        except RebuildError as err:
            raise SnapshotError(f"{name} cannot be rebuilt safely: {err}; {reading.TRUST_HINT}") from err
        except ImportError as err:  # of an optional package; the message names it
            raise SnapshotError(f"{name} cannot be opened: {err}") from err
        except Exception as err:  # a wrong file can raise anything
            text = str(err) if isinstance(err, ValueError) else f"{type(err).__name__}: {err}"
            raise SnapshotError(f"{name} is not a network snapshot: {' '.join(text.split())[:300]}") from err
    wanted = ["G_ema"] if shared else only if only is not None else reading.NETWORK_KEYS
    data = check_snapshot(data, name, wanted)
    return with_fp16(data) if force_fp16 else data


_planned = {}  # (path, trust, size and time of change) -> networks that were read to plan a run, for that run


def load_planned(path, trust=False):
    """What load_network_pkl reads, all networks, kept for the `take_planned` of this process that follows. One file at
    a time."""
    data = check_snapshot(load_network_pkl(path, trust=trust), path)
    _planned.clear()
    _planned[_version(path, trust)] = data
    return data


def take_planned(path, trust=False):
    """The networks that load_planned read, which keeps them no longer; read now where it did not."""
    data = _planned.pop(_version(path, trust), None)
    return check_snapshot(load_network_pkl(path, trust=trust), path) if data is None else data


def forget_planned():
    """Frees what load_planned kept, where other processes will read for themselves."""
    _planned.clear()


def _version(path, trust):
    stat = os.stat(path) if os.path.isfile(path) else None
    return str(path), bool(trust), stat and (stat.st_size, stat.st_mtime_ns)


def check_snapshot(data, name, networks=tuple(reading.NETWORK_KEYS)):
    """The snapshot dict, completed and checked; SnapshotError says what is missing or of the wrong kind."""
    for key in networks:
        if not isinstance(data.get(key), torch.nn.Module):
            raise SnapshotError(f"{name} is not a network snapshot: {key} is missing or not a network")
    data.setdefault("training_set_kwargs", None)
    data.setdefault("augment_pipe", None)
    for key, kind in [("training_set_kwargs", dict), ("augment_pipe", torch.nn.Module)]:
        if not isinstance(data[key], (kind, type(None))):
            raise SnapshotError(f"{name} is not a network snapshot: {key} is a {type(data[key]).__name__}")
    return data


def with_fp16(data):
    """The snapshot dict with networks that compute their four highest resolutions in float16, with a clamp of 256."""
    options = dict(num_fp16_res=4, conv_clamp=256)
    for key in reading.NETWORK_KEYS:
        old = data.get(key)
        if old is None:
            continue
        kwargs = copy.deepcopy(old.init_kwargs)
        if key != "D":
            kwargs.setdefault("synthesis_kwargs", dnnlib.EasyDict())
        target = kwargs if key == "D" else kwargs["synthesis_kwargs"]
        if any(target.get(option) != value for option, value in options.items()):
            target.update(options)
            data[key] = type(old)(**kwargs).eval().requires_grad_(False)
            misc.copy_params_and_buffers(old, data[key], require_all=True)
    return data
