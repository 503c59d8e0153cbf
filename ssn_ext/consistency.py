# SPDX-License-Identifier: Apache-2.0
"""Does the rest stay the same person? Attributes read before and after every block of a picture was re-drawn.

A Reader (ssn_ext.attributes) reads the re-drawn block alone and the picture without it. For one attribute

    change   the distance of two readings p, q, half the sum of |p - q|: 0 for the same reading however unsure it
             is, 1 for another value that is sure
    blocks   those that show the attribute: on real pictures it is read rightly from the block alone for at least
             SHOWS of what the whole picture adds to knowing the most frequent value
    tie      how often block and rest agree, where both are sure (a probability of SURE and more): one colour of
             hair and beard, one skin. Before the edit, and after those edits that surely changed what the block
             shows: there the tie survives if the rest has followed. (After all edits it is the same as before, in
             law, whatever the network does: an edited picture is again a picture of independent latents.)

Numbers are means over latents with standard errors; all blocks of a latent count as one sample.
"""

import numpy as np
import torch

from ssn_ext import attributes, blocks, resampling
from ssn_ext.grids import blocks_of_grid, grids_of, grids_with_outside
from torch_utils.images import to_float
from training.generating import batches
from training.shapes import shape_of

SHOWS, SURE = 0.5, 0.65
LEAST_PAIRS = 30  # a tie is not stated from fewer readings that are sure
LEARNT = (
    0.25  # an attribute of which the reader gets no more than this beyond the most frequent value is left out
)


def visibility(reader: attributes.Reader, table: attributes.Table, grid) -> dict[str, np.ndarray]:
    """How much of each attribute a block alone shows, measured on held-out real pictures -> {name: [B]}.

    (share read rightly from the block - that of the most frequent value) / (the same from the whole picture).
    Attributes that cannot be read from the whole either are left out.
    """
    majority = attributes.majorities(table)
    masks = blocks.block_masks(grid, table.pictures.shape[2:])
    whole = attributes.accuracies(reader, table, torch.ones_like(masks[0]))
    gained = {name: whole[name] - majority[name] for name in whole}
    learnt = [name for name in whole if gained[name] > LEARNT * (1 - majority[name])]
    each = [attributes.accuracies(reader, table, mask) for mask in masks]
    return {name: np.array([(one[name] - majority[name]) / gained[name] for one in each]) for name in learnt}


def draw_latents(G: torch.nn.Module, seed: int, numbers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, fresh z, labels) of the pictures of these numbers, each from (seed, number) alone; random classes."""
    drawn = [np.random.default_rng([seed, number]) for number in numbers]
    z = np.stack([rnd.standard_normal([2, G.z_dim], dtype=np.float32) for rnd in drawn])
    c = np.zeros([len(drawn), G.c_dim], dtype=np.float32)
    if G.c_dim:
        c[np.arange(len(drawn)), [rnd.integers(G.c_dim) for rnd in drawn]] = 1
    return torch.from_numpy(z[:, 0]), torch.from_numpy(z[:, 1]), torch.from_numpy(c)


def grids_read(G: torch.nn.Module) -> list:
    """The grids whose blocks are re-drawn one at a time: those of more than one block."""
    return [grids_of(G)[number] for number in grids_with_outside(grids_of(G))]


class Samples:
    """Per latent: sums over re-drawn blocks of changes and of agreements, for one attribute."""

    KEYS = (
        "inside",
        "here",
        "elsewhere",
        "unrelated",
        "sure_before",
        "agree_before",
        "sure_after",
        "agree_after",
    )

    def __init__(self, shown: np.ndarray):
        self.shown = shown  # bool [B]
        self.sums = {key: [] for key in self.KEYS}
        self.outside = []  # [N, B]

    def add(self, rest, block, unrelated) -> None:
        """rest, block: readings (before, after) [N, B, values] outside and inside each block; unrelated [N]."""
        changed, inside = distance(*rest), distance(*block)  # [N, B]
        self.outside.append(changed)
        self.sums["inside"].append(inside[:, self.shown].sum(dim=1))
        self.sums["here"].append(changed[:, self.shown].sum(dim=1))
        self.sums["elsewhere"].append(changed[:, ~self.shown].sum(dim=1))
        self.sums["unrelated"].append(unrelated)
        moved = agreement(*block)  # both sure, and the same value
        for when, one, other, counted in zip(
            ("before", "after"), rest, block, (1, moved[0] - moved[1]), strict=True
        ):
            sure, agree = (each * counted for each in agreement(one, other))
            self.sums[f"sure_{when}"].append(sure.sum(dim=1))
            self.sums[f"agree_{when}"].append(agree.sum(dim=1))

    def result(self) -> dict:
        """Means and their standard errors."""
        sums = {key: torch.cat(parts).double().numpy() for key, parts in self.sums.items()}
        ones = np.ones(len(sums["inside"]))
        found = {}
        for key, over in [("inside", self.shown.sum()), ("here", self.shown.sum()),
                          ("elsewhere", (~self.shown).sum()), ("unrelated", 1)]:  # fmt: skip
            found[key], found[f"{key}_stderr"] = ratio(sums[key], ones * over)
        for when in ("before", "after"):
            found[f"tie_{when}"], found[f"tie_{when}_stderr"] = ratio(
                sums[f"agree_{when}"], sums[f"sure_{when}"], LEAST_PAIRS
            )
            found[f"sure_{when}"] = float(sums[f"sure_{when}"].sum() / (len(ones) * len(self.shown)))
        found["outside_by_block"] = torch.cat(self.outside).double().mean(dim=0).tolist()
        return found


def distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Total variation of two readings [..., values] -> [...], 0 to 1."""
    return (p - q).abs().sum(dim=-1) / 2


def agreement(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(both readings are sure, and they name the same value), floats 0 or 1, of readings [..., values]."""
    (sure_p, value_p), (sure_q, value_q) = p.max(dim=-1), q.max(dim=-1)
    sure = (sure_p >= SURE) & (sure_q >= SURE)
    return sure.float(), (sure & (value_p == value_q)).float()


def ratio(values: np.ndarray, weights: np.ndarray, least: float = 1) -> tuple[float, float]:
    """sum(values) / sum(weights) over samples [N], and its standard error by linearisation.

    NaN where the weights add up to less than `least`.
    """
    total = weights.sum()
    if total < least:
        return float("nan"), float("nan")
    mean = values.sum() / total
    spread = np.square(values - mean * weights).sum() * len(values) / max(len(values) - 1, 1)
    return float(mean), float(np.sqrt(spread) / total)


def readings(
    reader: attributes.Reader, pictures: torch.Tensor, masks: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Every picture [N, C, H, W] read through every mask [M, H, W] -> {attribute: [N, M, values]}."""
    found = [reader.read(pictures, mask) for mask in masks]
    return {name: torch.stack([each[name] for each in found], dim=1) for name in reader.values}


@torch.no_grad()
def check(G, reader, shown, count=256, seed=0, batch=32, progress=lambda done: None) -> dict[str, dict]:
    """Reads `count` pictures of G before and after each block was re-drawn -> {attribute: numbers}.

    shown: {attribute: [B]}, from visibility. For each attribute: inside (change within re-drawn blocks that show it),
    here and elsewhere (change of the rest, when such a block was re-drawn and when another was), unrelated (change
    between two independent pictures), tie_before and tie_after (an edit that changed the block); each with _stderr;
    sure_before and sure_after (share of pairs the ties are taken from), outside_by_block [B].
    Of several grids the blocks of those that have more than one are numbered in one row.
    """
    masks = blocks.block_masks(grids_read(G), shape_of(G))
    redrawn = [block for n in grids_with_outside(grids_of(G)) for block in blocks_of_grid(grids_of(G), n)]
    samples = {name: Samples(each >= SHOWS) for name, each in shown.items()}
    device = next(G.parameters()).device
    reader = reader.to(device)
    done = 0
    for numbers in batches(range(count), batch):
        z, fresh, c = (each.to(device) for each in draw_latents(G, seed, numbers))
        pictures = resampling.resample_each(G, z, c, fresh, redrawn)
        before = next(pictures)
        other = G(fresh, c, noise_mode="const")
        everything = torch.ones_like(masks[:1])
        whole = [readings(reader, each, everything) for each in (before, other)]
        rest = [readings(reader, before, ~masks), []]
        block = [readings(reader, before, masks), []]
        for mask, after in zip(masks, pictures, strict=True):
            rest[1].append(readings(reader, after, ~mask[None]))
            block[1].append(readings(reader, after, mask[None]))
        for name, sample in samples.items():
            later = [torch.cat([each[name] for each in part[1]], dim=1) for part in (rest, block)]
            unrelated = distance(whole[0][name], whole[1][name])[:, 0]
            sample.add((rest[0][name], later[0]), (block[0][name], later[1]), unrelated)
        done += len(numbers)
        progress(done)
    return {name: sample.result() for name, sample in samples.items()}


def real_ties(reader: attributes.Reader, table: attributes.Table, grid) -> dict[str, float]:
    """How often block and rest agree on held-out real pictures, where both readings are sure -> {attribute: share}."""
    pictures = to_float(table.pictures[table.held_out()])
    masks = blocks.block_masks(grid, pictures.shape[2:])
    inside, outside = readings(reader, pictures, masks), readings(reader, pictures, ~masks)
    found = {}
    for name in reader.values:
        sure, agree = agreement(inside[name], outside[name])
        found[name] = ratio(agree.sum(dim=1).double().numpy(), sure.sum(dim=1).double().numpy(), LEAST_PAIRS)[
            0
        ]
    return found


def overall(results: dict[str, dict]) -> dict[str, float]:
    """The numbers of a table's last line.

    kept: 1 - (change of the rest, mean over re-drawn blocks) / (change between unrelated pictures), both added up over
    attributes: 1 where the rest always stays the same person, 0 where it becomes another; tie_before, tie_after: means
    over the attributes that have both. NaN where there is nothing to tell.
    """
    changed = sum(np.mean(each["outside_by_block"]) for each in results.values())
    unrelated = sum(each["unrelated"] for each in results.values())
    ties = np.array([[each["tie_before"], each["tie_after"]] for each in results.values()]).reshape(-1, 2)
    ties = ties[np.isfinite(ties).all(axis=1)]
    before, after = ties.mean(axis=0).tolist() if len(ties) else (float("nan"), float("nan"))
    return {
        "kept": float(1 - changed / unrelated) if unrelated else float("nan"),
        "tie_before": before,
        "tie_after": after,
    }
