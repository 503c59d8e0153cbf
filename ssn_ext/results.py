# SPDX-License-Identifier: Apache-2.0
"""What resample.py leaves behind, and how to go on from it: numbered folders, one JSON and one .npz a
picture.

    out/00000-blocks5_6/seed0000.json            settings, numbers, history: how this picture came about
    out/00000-blocks5_6/seed0000.npz             ws [1 + K, num_ws, w_dim] and, where known, z [1 + K, z_dim]
    out/00001-row0-from00000-pick3/seed0000.json     a call that went on from candidate 3 of the first

Number 0 is the original, 1..K are the candidates. A call with settings that a folder has already goes into
that folder (it would write the same files, or those of further seeds); any other call gets a folder of its
own.
"""

import contextlib
import glob
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.util import open_atomic
from training.generating import read_npz

FORMAT = "ssn-resample/1"


def _has(value: Any, **kinds: type | tuple) -> bool:
    """Whether it is a dict with entries of these kinds."""
    return isinstance(value, dict) and all(isinstance(value.get(k), kind) for k, kind in kinds.items())


# What is written where: names become names of files, so that they must not lead elsewhere.
_FORMS = {
    "name": lambda v: isinstance(v, str) and re.fullmatch(r"[a-z0-9]{1,40}", v),
    "seed": lambda v: type(v) is int and 0 <= v < 2**32,
    "settings": lambda v: _has(v, blocks=list, trunc=(int, float), noise_mode=str) and "class" in v,
    "network": lambda v: _has(v, source=str),
    "network_hash": lambda v: isinstance(v, str),
    "candidates": lambda v: isinstance(v, list) and all(_has(each, donor=int) for each in v),
    "files": lambda v: _has(v, latents=str) and re.fullmatch(r"[a-z0-9]{1,40}\.npz", v["latents"]),
    "history": lambda v: isinstance(v, list) and all(_has(step, result=str, pick=int) for step in v),
}


@dataclass(frozen=True)
class Start:
    """Where an edit starts: ws float32 [1, num_ws, w_dim], z [1, z_dim] where it has one."""

    name: str  # of its files: seed0000, or proj00 for a projected picture
    seed: int  # of its first latent and of its noise
    ws: np.ndarray
    z: np.ndarray | None
    history: list[dict]  # the edits so far, each {blocks, donor, pick, result}


# Reading.


def find_results(path: str) -> list[str]:
    """The result files meant by a JSON file or by the folder of a call; ValueError where there are none."""
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.json"))) if os.path.isdir(path) else [path]
    if not files or not os.path.isfile(files[0]):
        inner = sorted(glob.glob(os.path.join(glob.escape(path), "*", "*.json")))
        hint = (
            f"for example {os.path.dirname(inner[-1])}"
            if inner
            else "give a .json that resample.py wrote, or its folder"
        )
        raise ValueError(f"--from={path} holds no result: {hint}")
    return files


def read_record(path: str) -> dict[str, Any]:
    """The content of a result's JSON; ValueError, in one line, for a file of any other kind."""
    try:
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"Cannot read the result {path}: {err}") from err
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of resample.py (format {FORMAT!r} is missing)")
    missing = [key for key in _FORMS if key not in record]
    if missing:
        raise ValueError(f"{path} is damaged: {', '.join(missing)} missing")
    for key, fits in _FORMS.items():
        if not fits(record[key]):
            raise ValueError(f"{path} is damaged: {key} is not as resample.py writes it")
    return record


def continue_from(path: str, record: dict[str, Any], pick: int) -> Start:
    """The picture number `pick` of a result as the start of the next edit, its history one step longer."""
    count = len(record["candidates"])
    if not 0 <= pick <= count:
        accepted = (
            f"0 (the original) or 1 to {count}" if count else "0 (the original: there are no candidates)"
        )
        raise ValueError(f"--pick={pick} is not in {path}: it must be {accepted}")
    folder = os.path.dirname(os.path.abspath(path))
    path_of_arrays = os.path.join(folder, record["files"]["latents"])
    arrays = read_npz(path_of_arrays)
    if "ws" not in arrays or any(len(each) != count + 1 for each in arrays.values() if each.ndim):
        raise ValueError(
            f"Cannot read the latents in {path_of_arrays}: {path} has {count} candidates, it has not"
        )
    step = {
        "blocks": record["settings"]["blocks"] if pick else [],
        "donor": record["candidates"][pick - 1]["donor"] if pick else None,
        "pick": pick,
        "result": os.path.abspath(path),
    }
    earlier = [
        {**each, "result": os.path.normpath(os.path.join(folder, each["result"]))}
        for each in record["history"]
    ]
    part = slice(pick, pick + 1)
    z = arrays["z"][part] if "z" in arrays else None
    return Start(record["name"], record["seed"], arrays["ws"][part], z, [*earlier, step])


# Writing.


def run_folder(outdir: str, label: str, same: dict[str, Any]) -> str:
    """The folder in outdir for a call: one whose results agree in all of `same`, else a new one."""
    os.makedirs(outdir, exist_ok=True)
    numbers = [-1]
    for name in sorted(os.listdir(outdir)):
        folder = os.path.join(outdir, name)
        match = re.match(r"(\d+)-", name)
        if match and os.path.isdir(folder):
            numbers.append(int(match[1]))
            if _is_same(folder, same):
                return folder
    folder = os.path.join(outdir, f"{max(numbers) + 1:05d}-{label}")
    os.makedirs(folder)
    return folder


@contextlib.contextmanager
def removed_if_empty(folder: str) -> Iterator[None]:
    """Context that leaves no folder behind in which nothing was written."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            os.rmdir(folder)


def _is_same(folder: str, same: dict[str, Any]) -> bool:
    """Whether the results in a folder agree in all keys of `same`."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.json"))[:1]:
        try:
            return all(read_record(path).get(key) == value for key, value in same.items())
        except ValueError:  # somebody else's file: not our folder
            return False
    return False


def write_record(path: str, record: dict[str, Any]) -> None:
    """Writes a result's JSON: paths in its history relative to it, numbers that are not finite as null."""
    folder = os.path.dirname(os.path.abspath(path))
    history = [{**step, "result": relative(step["result"], folder)} for step in record["history"]]
    text = json.dumps(finite({"format": FORMAT, **record, "history": history}), indent=2, allow_nan=False)
    with open_atomic(path) as f:
        f.write((text + "\n").encode())


def write_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as an .npz that opens with allow_pickle=False."""
    with open_atomic(path) as f:
        np.savez(f, **arrays)


def relative(path: str, folder: str) -> str:
    """path as seen from folder, with forward slashes; absolute where there is no way (another drive)."""
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:
        return os.path.abspath(path)


def finite(value: Any) -> Any:
    """value with every NaN or infinity, which JSON does not know, replaced by None."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
