# SPDX-License-Identifier: Apache-2.0
"""From seeds and files to latents, and from latents to pictures: what all scripts that make pictures share.

Latents are ws [N, num_ws, w_dim], one vector a layer. They work alike for every generator of the family, also those
with a grid of latents, whose flat vectors hold all blocks.
"""

import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from torch_utils.images import make_grid, picture_pixels
from training.snapshot import load_network_pkl

PIXELS_AT_A_TIME = 2**22  # four pictures of 1024x1024
MOST_AT_A_TIME = 32
MOST_LATENTS = 2**30  # bytes of a file of latents

# ----------------------------------------------------------------------------------------
# Networks and labels


def load_generator(source: str, device: torch.device | str, trust: bool = False) -> torch.nn.Module:
    """G_ema of a snapshot (path or URL) on a device: eval mode, no gradients.

    trust: passed on to training.snapshot.load_network_pkl. ValueError for a file that holds no such network.
    """
    G = load_network_pkl(source, trust=trust, only=["G_ema"])["G_ema"]
    for name in ("z_dim", "c_dim", "w_dim", "num_ws", "mapping", "synthesis"):
        if not hasattr(G, name):
            kind = type(G).__name__
            raise ValueError(
                f"--network={source}: its G_ema ({kind}) is no generator of this family: it has no {name}"
            )
    return G.eval().requires_grad_(False).to(device)


def class_label(G: torch.nn.Module, class_idx: int | None, device: torch.device | str) -> torch.Tensor | None:
    """One-hot label [1, c_dim] of a class, or None for an unconditional network.

    ValueError where a conditional network gets no class, an unconditional one gets one, or it is out of range.
    """
    if G.c_dim == 0:
        if class_idx is not None:
            raise ValueError("--class is of no use here: the network is unconditional")
        return None
    if class_idx is None or not 0 <= class_idx < G.c_dim:
        raise ValueError(
            "Must specify class label with --class when using a conditional network:"
            f" it must be 0 to {G.c_dim - 1}, not {class_idx}"
        )
    return torch.nn.functional.one_hot(torch.tensor([class_idx], device=device), G.c_dim).float()


# ----------------------------------------------------------------------------------------
# Latents


def seed_latent(seed: int, z_dim: int) -> torch.Tensor:
    """The z that all scripts of this family give to a seed -> float64 [1, z_dim]."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim))


def map_seed(
    G: torch.nn.Module, seed: int, label: torch.Tensor | None, psi: float, device: torch.device | str
) -> torch.Tensor:
    """The ws of a seed, truncated by psi -> [1, num_ws, w_dim]; label [1, c_dim] or None."""
    return G.mapping(seed_latent(seed, G.z_dim).to(device), label, truncation_psi=psi)


def read_projected_w(path: str, G: torch.nn.Module) -> torch.Tensor:
    """The ws in an .npz of projector.py, key 'w' -> float32 [n, num_ws, w_dim] on the CPU.

    ValueError, in one line, for any other file and for ws of another network's shape. Nothing is unpickled.
    """
    w = read_npz(path).get("w")
    if w is None or w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim) or not len(w) or w.dtype.kind != "f":
        raise ValueError(f"--projected-w={path} must hold 'w' of shape [n, {G.num_ws}, {G.w_dim}]")
    return torch.from_numpy(w.astype(np.float32))


def read_npz(path: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz of latents, read without pickle; ValueError, in one line, for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MOST_LATENTS:
            raise ValueError(f"it unpacks to {size:,} bytes, the most is {MOST_LATENTS:,}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as err:  # a damaged archive raises whatever its reader meets first
        raise ValueError(f"Cannot read the latents in {path}: {' '.join(str(err).split())}") from err


def mix_styles(ws: torch.Tensor, styles_from: torch.Tensor, styles: Sequence[int]) -> torch.Tensor:
    """ws [..., num_ws, w_dim] with the layers `styles` taken from styles_from, of the same shape; a new tensor.

    ValueError for a layer that is not there.
    """
    count = ws.shape[-2]
    for style in styles:
        if not 0 <= style < count:
            raise ValueError(f"--styles: there is no layer {style}, the network's are 0 to {count - 1}")
    mixed = ws.clone()
    mixed[..., list(styles), :] = styles_from[..., list(styles), :]
    return mixed


def interpolate(keys: torch.Tensor, frames: int) -> Iterator[torch.Tensor]:
    """A smooth closed curve through keys [K, num_ws, w_dim] -> yields K * frames ws [num_ws, w_dim].

    A periodic cubic spline: frame i * frames is key i, and after the last frame comes the first one again.
    """
    points = keys.detach().cpu().numpy().astype(np.float64)
    closed = np.concatenate([points, points[:1]])
    import scipy.interpolate  # slow to import, and few need it

    spline = scipy.interpolate.CubicSpline(np.arange(len(closed)), closed, bc_type="periodic")
    for i in range(len(points) * frames):
        yield torch.from_numpy(spline(i / frames).astype(np.float32)).to(keys.device)


# ----------------------------------------------------------------------------------------
# Pictures


def batch_size(G: torch.nn.Module) -> int:
    """How many pictures are made at a time: few large ones, many small ones. Not chosen by the user."""
    return max(1, min(MOST_AT_A_TIME, PIXELS_AT_A_TIME // G.img_resolution**2))


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items each, the last one possibly shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def synthesize(
    G: torch.nn.Module, ws: torch.Tensor, noise_mode: str = "const", noise_seed: int = 0
) -> torch.Tensor:
    """synthesis(ws) -> float32 [N, C, H, W]; random noise is drawn from noise_seed, and torch's own random state is
    left as it was."""
    if noise_mode != "random":
        return G.synthesis(ws, noise_mode=noise_mode).to(torch.float32)
    with torch.random.fork_rng(devices=[ws.device] if ws.device.type == "cuda" else []):
        torch.manual_seed(noise_seed)
        return G.synthesis(ws, noise_mode=noise_mode).to(torch.float32)


@torch.no_grad()
def pictures(
    G: torch.nn.Module,
    ws_batches: Iterable[torch.Tensor],
    noise_mode: str = "const",
    noise_seeds: Iterable[int] | None = None,
) -> Iterator[np.ndarray]:
    """Yields a uint8 picture [H, W, C] for every w in batches of ws [n, num_ws, w_dim].

    noise_mode 'random' makes one at a time, each with the noise of its own seed (default: 0 for all), so that no
    picture depends on its neighbours.
    """
    seeds = iter(itertools.repeat(0) if noise_seeds is None else noise_seeds)
    for batch in ws_batches:
        for ws in batch.split(1 if noise_mode == "random" else len(batch)):
            seed = next(seeds) if noise_mode == "random" else 0
            images = synthesize(G, ws, noise_mode, seed)
            yield from picture_pixels(images).permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(images: Sequence[np.ndarray], columns: int, rows: int) -> np.ndarray:
    """uint8 pictures [H, W, C], row by row -> one picture [rows * H, columns * W, C]; places left over are black."""
    blank = np.zeros_like(images[0])
    cells = np.stack([*images, *[blank] * (columns * rows - len(images))])
    return make_grid(cells.transpose(0, 3, 1, 2), (columns, rows))


def style_pairs(rows: Sequence[int], cols: Sequence[int]) -> list[tuple[int, int]]:
    """(row seed, column seed) of all pictures of a style mixing: each seed with itself, then every row with every
    column."""
    own = [(seed, seed) for seed in dict.fromkeys([*rows, *cols])]
    return own + [(row, col) for row in rows for col in cols if row != col]


def style_table(
    G: torch.nn.Module,
    rows: Sequence[int],
    cols: Sequence[int],
    styles: Sequence[int],
    *,
    label: torch.Tensor | None = None,
    psi: float = 1.0,
    noise_mode: str = "const",
    device: torch.device | str = "cpu",
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """(row seed, column seed) and uint8 picture [H, W, C] of all style_pairs, made one after the other.

    The picture of a pair is that of the row's seed with the layers `styles` of the column's; random noise is the row's.
    ValueError, before anything is made, for a layer that is not there.
    """
    own = {seed: map_seed(G, seed, label, psi, device)[0] for seed in [*rows, *cols]}
    pairs = style_pairs(rows, cols)
    mixed = [mix_styles(own[row], own[col], styles) for row, col in pairs]
    stacks = map(torch.stack, batches(mixed, batch_size(G)))
    return zip(pairs, pictures(G, stacks, noise_mode, [row for row, _col in pairs]), strict=True)


def style_grid(images: dict, rows: Sequence[int], cols: Sequence[int]) -> np.ndarray:
    """The sheet of a style_table -> uint8 picture: the columns' seeds on top, the rows' at the left, a black corner."""
    table = [np.zeros_like(images[rows[0], rows[0]]), *(images[col, col] for col in cols)]
    for row in rows:
        table += [images[row, row], *(images[row, col] for col in cols)]
    return picture_grid(table, len(cols) + 1, len(rows) + 1)


# ----------------------------------------------------------------------------------------
# Files


def check_free(paths: Iterable[str | os.PathLike], overwrite: bool) -> None:
    """ValueError if any of the files is there already and `overwrite` does not allow to replace it."""
    there = [os.fspath(path) for path in paths if os.path.exists(path)]
    if there and not overwrite:
        others = f" and {len(there) - 1} more would be replaced" if len(there) > 1 else " would be replaced"
        raise ValueError(f"{there[0]}{others}: choose another --outdir, or allow it with --overwrite")
