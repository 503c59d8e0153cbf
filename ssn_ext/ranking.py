# SPDX-License-Identifier: Apache-2.0
"""Which of many candidates to look at first: the most real, the most different, the most local."""

from collections.abc import Sequence

import torch

from training.generating import map_seed, synthesize

BY = ("realism", "diversity", "locality")
REFERENCE_SEEDS = range(2**32 - 1, 0, -1)  # of pictures that are no candidates: donors' seeds are below 2**31


def references(
    G: torch.nn.Module,
    D: torch.nn.Module,
    label: torch.Tensor | None,
    psi: float,
    noise_mode: str,
    device: torch.device | str,
) -> torch.Tensor:
    """Pictures [size - 1, C, H, W] that fill a group of D's minibatch statistics together with one candidate.

    Always the same ones for a network and its settings. size: D's group, 4 where it has none of its own.
    """
    mbstd = D.b4.mbstd
    size = 1 if mbstd is None else mbstd.group_size or 4
    made = [
        synthesize(G, map_seed(G, seed, label, psi, device), noise_mode, seed)
        for seed in REFERENCE_SEEDS[: size - 1]
    ]
    return torch.cat(made) if made else torch.zeros([0, G.img_channels, 1, 1], device=device)


def realism(
    D: torch.nn.Module, pictures: torch.Tensor, others: torch.Tensor, label: torch.Tensor | None
) -> list[float]:
    """D's logit of each picture [K, C, H, W], each seen together with `others` and nothing else.

    D compares the pictures of a group with each other. Together with other candidates the score of one would depend on
    them; alone it would look like a group without any variety, which D has never seen a real one of. label [1, c_dim].
    """
    scores = []
    for picture in pictures.split(1):
        group = torch.cat([picture, others]) if len(others) else picture
        c = None if label is None else label.expand(len(group), -1)
        scores.append(float(D(group, c)[0, 0]))
    return scores


def farthest_first(
    original: torch.Tensor, pictures: torch.Tensor, mask: torch.Tensor
) -> tuple[list[int], list[float]]:
    """Order in which each picture is as different as can be from the original and from those before it.

    original [1, C, H, W], pictures [K, C, H, W], seen clamped to [-1, 1]; mask bool [H, W]: where they are compared.
    Returns the order, K numbers, and the score of each picture: its mean squared difference to the nearest of those
    before it. Of equally distant ones the first is taken.
    """
    everything = torch.cat([original, pictures]).clamp(-1, 1)[:, :, mask.to(original.device)].flatten(1)
    nearest = (everything[1:] - everything[:1]).square().mean(dim=1)  # [K]
    order, scores = [], [0.0] * len(pictures)
    left = torch.ones(len(pictures), dtype=torch.bool, device=nearest.device)
    for _ in range(len(pictures)):
        pick = int(torch.where(left, nearest, -1.0).argmax())
        order.append(pick)
        scores[pick] = float(nearest[pick])
        left[pick] = False
        nearest = torch.minimum(nearest, (everything[1:] - everything[1 + pick]).square().mean(dim=1))
    return order, scores


def best_first(scores: Sequence[float]) -> list[int]:
    """Numbers of the scores from the highest to the lowest, equal ones and NaN in their order, NaN last."""
    return sorted(
        range(len(scores)),
        key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0),
    )
