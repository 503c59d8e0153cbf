# SPDX-License-Identifier: Apache-2.0
"""network-snapshot-*.pkl: the family's pickles of G, D, G_ema and the augmentation pipe; written and read
here only."""

import copy
import pickle

import torch

import dnnlib


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


def load_network_pkl(source, trust=False):
    """Reads a snapshot: dict with G, D, G_ema (modules), training_set_kwargs and augment_pipe (each may be
    None).

    source: a path, a URL or an open binary file. Plain pickle loading runs what the file says: open only
    files that you trust. trust: allows a file to run its own code. Raises SnapshotError with one line for
    anything that is not a snapshot.
    """
    name = getattr(source, "name", source)
    try:
        if hasattr(source, "read"):
            data = pickle.load(source)
        else:
            with dnnlib.util.open_url(str(source), verbose=False) as f:
                data = pickle.load(f)
    except OSError as err:
        raise SnapshotError(f"cannot read {name}: {err.strerror or err}") from err
    except Exception as err:  # unpickling a wrong file can raise anything
        raise SnapshotError(f"{name} is not a network snapshot ({type(err).__name__}: {err})") from err
    return check_snapshot(data, name)


def check_snapshot(data, name):
    """The snapshot dict, completed and checked; SnapshotError says what is missing or of the wrong kind."""
    if not isinstance(data, dict):
        raise SnapshotError(
            f"{name} is not a network snapshot: it holds a {type(data).__name__}, expected a dict"
        )
    for key in ["G", "D", "G_ema"]:
        if not isinstance(data.get(key), torch.nn.Module):
            raise SnapshotError(f"{name} is not a network snapshot: {key} is missing or not a network")
    data.setdefault("training_set_kwargs", None)
    data.setdefault("augment_pipe", None)
    return data


class CoverageError(ValueError):
    """Networks whose tensors do not match one to one."""


def copy_networks(source, target, fresh=lambda name: False):
    """Copies all tensors of `source` into `target` by name and says what happened: rows of (name, shape,
    what).

    fresh(name) tells which tensors of the target may keep their own values. Any other tensor that has no
    counterpart of its shape, on either side, is an error, and nothing is copied then.
    """
    theirs = dict([*source.named_parameters(), *source.named_buffers()])
    ours = dict([*target.named_parameters(), *target.named_buffers()])
    rows, wrong = [], []
    for name, tensor in ours.items():
        shape = list(tensor.shape)
        if name in theirs and list(theirs[name].shape) == shape:
            rows.append((name, shape, "copied"))
        elif name not in theirs and fresh(name):
            rows.append((name, shape, "new"))
        else:
            wrong.append(
                f"{name} {shape} has {list(theirs[name].shape) if name in theirs else 'nothing'} to take"
            )
    wrong += [
        f"{name} {list(t.shape)} would be left behind" for name, t in theirs.items() if name not in ours
    ]
    if wrong:
        raise CoverageError(f"{len(wrong)} tensors do not match, first: {'; '.join(wrong[:3])}")
    with torch.no_grad():
        for name, _shape, what in rows:
            if what == "copied":
                ours[name].copy_(theirs[name])
    return rows


def coverage_table(rows_by_net):
    """Text of how many tensors and values of each network were copied and which are new."""
    lines = [f"{'network':<10}{'copied':>8}{'values':>12}{'new':>6}{'values':>12}"]
    for net, rows in rows_by_net.items():
        count = {what: [r for r in rows if r[2] == what] for what in ["copied", "new"]}
        size = {what: sum(torch.Size(r[1]).numel() for r in count[what]) for what in count}
        lines.append(
            f"{net:<10}{len(count['copied']):>8}{size['copied']:>12,}{len(count['new']):>6}{size['new']:>12,}"
        )
    return "\n".join(lines)


def transfer(source, G, D, G_ema):
    """Default start from a snapshot: every tensor of G, D and G_ema by name, all of them. Returns rows by
    network."""
    return {
        name: copy_networks(source[name], module) for name, module in [("G", G), ("D", D), ("G_ema", G_ema)]
    }
