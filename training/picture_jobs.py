# SPDX-License-Identifier: Apache-2.0
"""What generate.py and style_mixing.py do: check a call, make its pictures, write them."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch

from dnnlib.cli import progress
from torch_utils.distributed import choose_device
from torch_utils.images import write_png
from torch_utils.video import check_video_path, write_video
from training import generating

DEFAULT_STYLES = range(7)
FRAMES, FPS = 60, 30


@dataclass(frozen=True)
class Options:
    """The options of generate.py under their own names; None is 'not given'."""

    network: str
    outdir: str
    seeds: list[int] | None = None
    projected_w: str | None = None
    rows: list[int] | None = None
    cols: list[int] | None = None
    styles: list[int] | None = None
    trunc: float = 1.0
    noise_mode: str = "const"
    class_idx: int | None = None
    grid: str | None = None
    video: str | None = None
    frames: int | None = None
    fps: int | None = None
    device: str = "auto"
    trust_pickle: bool = False
    overwrite: bool = False


def run(o: Options) -> None:
    """Makes the pictures of one call. ValueError or OSError, one clear line, for every mistake; nothing is written
    before all of the call is known to be right."""
    mixing = bool(o.rows or o.cols)
    _check_combinations(o, mixing)
    device = torch.device(choose_device(1, o.device)[1])
    G = generating.load_generator(o.network, device, trust=o.trust_pickle)
    if G.c_dim == 0 and o.class_idx is not None:
        _warn(f"--class={o.class_idx} is ignored: the network is unconditional")
    label = generating.class_label(G, o.class_idx if G.c_dim else None, device)
    (_mix if mixing else _generate)(o, G, label, device)


def _check_combinations(o: Options, mixing: bool) -> None:
    """Options that exclude or need each other."""
    if mixing and not (o.rows and o.cols):
        raise ValueError("--rows and --cols go together: the seeds whose styles are mixed")
    if o.styles and not mixing:
        raise ValueError("--styles says what is mixed: give --rows and --cols too")
    for name, value in [
        ("seeds", o.seeds),
        ("projected-w", o.projected_w),
        ("video", o.video),
        ("grid", o.grid),
    ]:
        if mixing and value:
            raise ValueError(f"--rows and --cols make pictures and a grid of their own: leave out --{name}")
    if not (mixing or o.seeds or o.projected_w):
        raise ValueError("--seeds option is required when not using --projected-w")
    if (o.frames or o.fps) and not o.video:
        raise ValueError("--frames and --fps are those of a video: give --video=FILE.mp4 or FILE.gif")
    if o.video:
        check_video_path(o.video)


# ----------------------------------------------------------------------------------------
# Pictures of seeds, of projected pictures, and of what lies between them


def _generate(o: Options, G: torch.nn.Module, label: torch.Tensor | None, device: torch.device) -> None:
    """One picture a seed or projected w; a sheet of them, and a video through them, where asked for."""
    size = generating.batch_size(G)
    if o.projected_w:
        if o.seeds:
            _warn("--seeds is ignored when using --projected-w")
        ws = generating.read_projected_w(o.projected_w, G).to(device)
        names, noise_seeds = [f"proj{i:02d}.png" for i in range(len(ws))], range(len(ws))
        batches = ws.split(size)
    else:
        names, noise_seeds = [f"seed{seed:04d}.png" for seed in o.seeds], o.seeds
        each = (generating.map_seed(G, seed, label, o.trunc, device) for seed in o.seeds)
        batches = map(torch.cat, generating.batches(each, size))
    shape = _grid_shape(o.grid, len(names)) if o.grid else None
    if o.video and len(names) < 2:
        raise ValueError("--video moves from picture to picture: give two or more seeds")
    video = _video_path(o)
    files = [*names, *["grid.png"] * bool(o.grid)]
    paths = [os.path.join(o.outdir, name) for name in files]
    generating.check_free([*paths, *[video] * bool(video)], o.overwrite)
    os.makedirs(o.outdir, exist_ok=True)
    if video:
        os.makedirs(os.path.dirname(video), exist_ok=True)

    kept_ws, kept = [], []
    made = generating.pictures(G, _keep(batches, kept_ws if video else None), o.noise_mode, noise_seeds)
    with torch.no_grad(), progress(made, len(names), "Pictures") as bar:
        for path, picture in zip(paths, bar, strict=False):
            write_png(path, picture)
            if shape:
                kept.append(picture)
    if shape:
        write_png(paths[-1], generating.picture_grid(kept, *shape))
    _say_written(o.outdir, files)
    if video:
        _write_video(o, G, torch.cat(kept_ws), video, size)


def _keep(batches: Any, kept: list | None) -> Iterator[torch.Tensor]:
    """The batches, each also appended to `kept` where that is a list."""
    for batch in batches:
        if kept is not None:
            kept.append(batch)
        yield batch


def _grid_shape(text: str, count: int) -> tuple[int, int]:
    """(columns, rows) from 'CxR', or 'auto': about as many columns as rows. ValueError where `count` does not fit."""
    if text == "auto":
        columns = math.ceil(math.sqrt(count))
        return columns, math.ceil(count / columns)
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not match:
        raise ValueError(f"--grid={text}: give columns x rows, as --grid=4x2, or --grid alone")
    columns, rows = int(match[1]), int(match[2])
    if columns * rows < count:
        raise ValueError(f"--grid={text} has {columns * rows} places for {count} pictures")
    return columns, rows


def _video_path(o: Options) -> str | None:
    """Where the video goes: a bare name is put into the folder of the pictures."""
    if not o.video or os.path.dirname(o.video):
        return o.video
    return os.path.join(o.outdir, o.video)


def _write_video(o: Options, G: torch.nn.Module, keys: torch.Tensor, path: str, size: int) -> None:
    """The way through the keys [K, num_ws, w_dim] and back to the first as a video."""
    frames, fps = o.frames or FRAMES, o.fps or FPS
    path_of_ws = generating.interpolate(keys, frames)
    made = generating.pictures(G, map(torch.stack, generating.batches(path_of_ws, size)), o.noise_mode)
    count = len(keys) * frames
    with progress(made, count, "Video") as bar:
        write_video(path, bar, fps)
    click.echo(f"Wrote {path}: {count} frames, {count / fps:.1f} s, a closed loop")


# ----------------------------------------------------------------------------------------
# Style mixing


def _mix(o: Options, G: torch.nn.Module, label: torch.Tensor | None, device: torch.device) -> None:
    """All seeds, all pairs of a row's and a column's seed, and the sheet of them."""
    styles = o.styles or [style for style in DEFAULT_STYLES if style < G.num_ws]
    pairs = generating.style_pairs(o.rows, o.cols)
    files = [*(f"{row}-{col}.png" for row, col in pairs), "grid.png"]
    paths = [os.path.join(o.outdir, name) for name in files]
    table = generating.style_table(
        G, o.rows, o.cols, styles, label=label, psi=o.trunc, noise_mode=o.noise_mode, device=device
    )
    generating.check_free(paths, o.overwrite)
    os.makedirs(o.outdir, exist_ok=True)
    images = {}
    with torch.no_grad(), progress(table, len(pairs), "Pictures") as bar:
        for path, (pair, picture) in zip(paths, bar, strict=False):
            write_png(path, picture)
            images[pair] = picture
    write_png(paths[-1], generating.style_grid(images, o.rows, o.cols))
    _say_written(o.outdir, files)


# ----------------------------------------------------------------------------------------
# What is said


def _warn(text: str) -> None:
    click.echo(f"Warning: {text}", err=True)


def _say_written(outdir: str, files: Sequence[str]) -> None:
    """The folder and its files, the middle ones left out where there are many."""
    shown = list(files) if len(files) <= 4 else [*files[:2], "...", *files[-2:]]
    click.echo(f"Wrote {os.path.join(outdir, '')}  {' '.join(shown)}")
