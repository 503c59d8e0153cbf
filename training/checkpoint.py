# SPDX-License-Identifier: Apache-2.0
"""checkpoint.pt: everything that an exact continuation needs, in plain tensors and containers
(weights_only)."""

import json
import os
import re

import torch

from dnnlib.util import open_atomic
from training.formats import torch_file

FILE_NAME = "checkpoint.pt"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another make."""


class Checkpoint:
    """A set of named parts, each with state_dict() and load_state_dict(), saved and restored together."""

    def __init__(self, **parts):
        self.parts = parts

    def save(self, run_dir):
        """Writes run_dir/checkpoint.pt through a temporary name."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        data = {"version": VERSION, "state": state}
        with open_atomic(os.path.join(run_dir, FILE_NAME)) as f:
            torch.save(data, f)

    def load(self, run_dir):
        """Restores every part from run_dir/checkpoint.pt; CheckpointError where that is not possible."""
        state = read(run_dir)
        if state.keys() != self.parts.keys():
            raise CheckpointError(
                f"{run_dir}/{FILE_NAME} holds {', '.join(state)}, expected {', '.join(self.parts)}: other options?"
            )
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as err:
                raise CheckpointError(
                    f"{name} in {run_dir}/{FILE_NAME} does not fit this run; has its data set changed?"
                    f" ({' '.join(str(err).split())[:300]})"
                ) from err


def read(run_dir):
    """The state of run_dir/checkpoint.pt: a dict of tensors and plain values, on the CPU."""
    path = os.path.join(run_dir, FILE_NAME)
    if not os.path.isfile(path):
        raise CheckpointError(f"no {FILE_NAME} in {run_dir}: nothing to continue from")
    try:
        with open(path, "rb") as f:
            data = torch_file.load(f)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}") from err
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a checkpoint of version {VERSION}")
    return data["state"]


class Counters:
    """Plain numbers of the loop: images seen, ticks, seconds spent."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def state_dict(self):
        """The numbers."""
        return dict(self.__dict__)

    def load_state_dict(self, state):
        """Takes the numbers over."""
        self.__dict__.update(state)


def cut_back_logs(run_dir, kimg):
    """Drops from the run's JSON-lines files what lies past `kimg` thousand images, and half-written last
    lines.

    A line of stats.jsonl is dated by its Progress/kimg, a line of metric-*.jsonl by the number in its
    snapshot_pkl. Lines without a date stay.
    """
    for name in sorted(os.listdir(run_dir)):
        if name != "stats.jsonl" and not re.fullmatch(r"metric-.*\.jsonl", name):
            continue
        path = os.path.join(run_dir, name)
        with open(path, "rb") as f:
            lines = f.readlines()
        kept = [
            line.rstrip(b"\n") + b"\n" for line in lines if _line_kimg(line) <= kimg * (1 + 1e-6)
        ]  # statistics are summed in float32
        if kept != lines:
            with open_atomic(path) as f:
                f.write(b"".join(kept))


def _line_kimg(line):
    """The line's date in kimg; -inf where it has none, +inf where the line is broken."""
    try:
        entry = json.loads(line)
        if "Progress/kimg" in entry:
            return float(entry["Progress/kimg"]["mean"])
        found = re.search(r"network-snapshot-(\d+)\.pkl", str(entry.get("snapshot_pkl")))
    except (AttributeError, KeyError, TypeError, ValueError):
        return float("inf")
    return int(found[1]) if found else float("-inf")
