# SPDX-License-Identifier: Apache-2.0
"""Re-draw blocks of a picture: pure functions from a network and latents to pictures and numbers.

The edit is made on ws: block a of ws is replaced by block a of mapping(z'). The mapping works per block, so
this is the same edit as replacing block a of z, and it also serves truncated and projected pictures, whose ws
is all we have. Every fresh latent z' has a seed of its own (its donor), so an edit is fully described by
(blocks, donor).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ssn_ext.blocks import block_masks, replace_blocks
from ssn_ext.distortion import block_change, choose, inside_change, outside_change
from ssn_ext.grids import Grids, block_counts, blocks_of_grid, grids_of
from training.generating import map_seed, synthesize

# Which latents, which networks.


def donor_seeds(candidate_seed: int, seed: int, step: int, count: int) -> list[int]:
    """Seeds of the fresh latents of `count` candidates: the step-th edit of the picture that began with
    `seed`.

    The first k do not depend on count, so asking for more candidates keeps those one has seen.
    """
    stream = np.random.RandomState([candidate_seed, seed, step])
    return [int(stream.randint(2**31)) for _ in range(count)]


def check_network(G: torch.nn.Module) -> None:
    """Raises ValueError if G has no grid of latents, that is, if it is not a Spatially Stochastic Network."""
    if not hasattr(G, "latent_grid"):
        raise ValueError(
            f"This network ({type(G).__name__}) has one latent for the whole picture, not a grid of blocks "
            "(no latent_grid): train one with train.py --cfg=ssn, which can start from a StyleGAN2 pickle"
        )


def network_hash(G: torch.nn.Module) -> str:
    """SHA-256 over the grids and the names, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256(repr([int(n) for n in G.latent_grid]).encode())
    if len(grids_of(G)) > 1:
        digest.update(repr((grids_of(G), [int(n) for n in G.grid_splits])).encode())
    for name, tensor in sorted(G.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(values.shape)}{values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Edits and pictures.


def redraw(
    G: torch.nn.Module,
    ws: torch.Tensor,
    blocks: Sequence[int],
    donors: Sequence[int],
    label: torch.Tensor | None = None,
    psi: float = 1.0,
) -> torch.Tensor:
    """One candidate a donor: ws [1, num_ws, w_dim] with `blocks` taken from the donor's ws -> [K, num_ws,
    w_dim].

    Donors are mapped one at a time, so that a candidate is the same bit for bit however many there are.
    """
    fresh = [map_seed(G, donor, label, psi, ws.device) for donor in donors]
    return torch.cat([replace_blocks(ws, each, blocks, grids_of(G)) for each in fresh])


def render(
    G: torch.nn.Module, ws: torch.Tensor, noise_mode: str = "const", noise_seed: int = 0
) -> torch.Tensor:
    """Pictures [N, C, H, W] of ws [N, num_ws, w_dim], one at a time and all with the same noise.

    One at a time: equal batch shapes are what makes equal latents equal pictures, bit for bit.
    """
    return torch.cat([synthesize(G, each[None], noise_mode, noise_seed) for each in ws])


# Numbers.


def measure(
    before: torch.Tensor,
    after: torch.Tensor,
    mask: torch.Tensor,
    grid: Grids,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[dict]:
    """The change of every candidate, pictures clamped to [-1, 1]: a list of K dicts of floats.

    before [1, C, H, W], after [K, C, H, W], mask bool [H, W]: the pixels that were meant to change.
    Keys: inside, outside (mean squared difference; NaN where there is no such pixel), ratio (inside /
    outside), blocks (the mean squared difference of each of the B pixel blocks), emd_inside, emd_outside
    (distortion.masked_emd), and features_inside, features_outside (masked_features) where features are given.
    """
    before, after = before.clamp(-1, 1), after.clamp(-1, 1)
    inside = inside_change(before, after, mask).tolist()
    outside = outside_change(before, after, mask).tolist()
    blocks = block_change(before, after, block_masks(grid, before.shape[-2:])).tolist()
    others = {}
    for name, distortion in choose(grid, features).items():
        if name != "mse":
            others[f"{name}_inside"] = distortion(before, after, mask).tolist()
            others[f"{name}_outside"] = distortion(before, after, ~mask).tolist()
    return [
        {
            **{"inside": i, "outside": o, "ratio": i / o if o != 0 else float("nan"), "blocks": b},
            **{name: values[number] for name, values in others.items()},
        }
        for number, (i, o, b) in enumerate(zip(inside, outside, blocks, strict=True))
    ]


def resample_each(
    G: torch.nn.Module,
    z: torch.Tensor,
    c: torch.Tensor | None,
    fresh: torch.Tensor,
    blocks: Sequence[int] | None = None,
    *,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
) -> Iterator[torch.Tensor]:
    """Yields g(z), then for each block (default: all) the pictures with that block of z taken from fresh.

    z, fresh: [N, z_dim]; c: [N, c_dim] or None; every item is [N, C, H, W] float32. All share one noise
    (noise_mode 'random': drawn from a seed that advances torch's random state once), and one batch shape.
    Gradients flow.
    """
    noise_seed = int(torch.randint(2**31, [])) if noise_mode == "random" else 0
    ws, fresh_ws = (G.mapping(each, c, truncation_psi=truncation_psi) for each in (z, fresh))
    yield synthesize(G, ws, noise_mode, noise_seed)
    grids = grids_of(G)
    for block in range(sum(block_counts(grids))) if blocks is None else blocks:
        edited = replace_blocks(ws, fresh_ws, [block], grids)
        yield synthesize(G, edited, noise_mode, noise_seed)


@torch.no_grad()
def influence(
    G: torch.nn.Module,
    z: torch.Tensor,
    c: torch.Tensor | None,
    fresh: torch.Tensor,
    *,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    clamp: bool = True,
    batch_size: int = 16,
    grid: int = 0,
) -> torch.Tensor:
    """Which block of a grid moves which pixels -> float32 [N, B, B] on z's device; B: blocks of the grid-th grid.

    [n, a, b] is the mean squared change of pixel block b of picture n when block a of z is taken from fresh.
    z, fresh: [N, z_dim]; c: [N, c_dim] or None. clamp: compare pictures clamped to [-1, 1], as metrics do.
    See distortion.split_influence for the change inside and outside.
    """
    grids, rows = grids_of(G), []
    for start in range(0, len(z), batch_size):
        part = slice(start, start + batch_size)
        pictures = resample_each(
            G,
            z[part],
            None if c is None else c[part],
            fresh[part],
            blocks_of_grid(grids, grid),
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
        )
        pictures = (each.clamp(-1, 1) if clamp else each for each in pictures)
        before = next(pictures)
        masks = block_masks(grids[grid], before.shape[-2:], device=before.device)
        rows.append(torch.stack([block_change(before, after, masks) for after in pictures], dim=1))
    return torch.cat(rows)  # [N, B, B]
