# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.ranking: orders known in advance, and scores that do not depend on other candidates."""

import math

import pytest
import torch

from ssn_ext import ranking
from ssn_ext.networks import SpatialGenerator
from training.networks import Discriminator


def greys(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4)


def test_farthest_first_on_a_line():
    """From 0: the farthest is 1, then -0.6 (0.6 from 0), then 0.5, half-way, then what is next to others."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    order, scores = ranking.farthest_first(greys(0.0), greys(0.1, 0.5, -0.6, 1.0), mask)
    assert order == [3, 2, 1, 0]
    assert scores == pytest.approx([0.01, 0.25, 0.36, 1.0])


def test_farthest_first_looks_at_the_mask_alone_and_at_clamped_pictures():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    pictures = greys(0.2, 0.4, 3.0).clone()
    pictures[0, :, 1:] = -1
    order, scores = ranking.farthest_first(greys(0.0), pictures, mask)
    assert order == [2, 1, 0] and scores == pytest.approx([0.04, 0.16, 1.0])


def test_equal_candidates_keep_their_order():
    order, scores = ranking.farthest_first(
        greys(0.0), greys(0.5, 0.5, 0.5), torch.ones(4, 4, dtype=torch.bool)
    )
    assert order == [0, 1, 2] and scores == pytest.approx([0.25, 0, 0])
    assert ranking.best_first([1.0, 3.0, math.nan, 3.0]) == [1, 3, 0, 2]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    widths = dict(channel_base=64, channel_max=8)
    G = SpatialGenerator(
        z_dim=16, c_dim=2, w_dim=16, img_resolution=8, img_channels=3, latent_grid=[2, 2],
        mapping_kwargs=dict(num_layers=1), synthesis_kwargs=widths,
    )  # fmt: skip
    D = Discriminator(
        c_dim=2, img_resolution=8, img_channels=3, epilogue_kwargs=dict(mbstd_group_size=3), **widths
    )
    return G.eval().requires_grad_(False), D.eval().requires_grad_(False)


def test_realism_is_the_logit_within_a_group_of_its_own(networks):
    G, D = networks
    label = torch.eye(2)[:1]
    others = ranking.references(G, D, label, 1.0, "const", "cpu")
    assert others.shape == (2, 3, 8, 8)
    assert torch.equal(others, ranking.references(G, D, label, 1.0, "const", "cpu"))
    pictures = torch.randn(5, 3, 8, 8)
    scores = ranking.realism(D, pictures, others, label)
    group = torch.cat([pictures[3:4], others])
    assert scores[3] == pytest.approx(float(D(group, label.expand(3, -1))[0]))
    backwards = ranking.realism(D, pictures.flip(0)[:2], others, label)
    assert backwards == [scores[4], scores[3]]  # bit for bit, whoever else is a candidate
    assert scores != ranking.realism(D, pictures, others, torch.eye(2)[1:])


def test_realism_without_minibatch_statistics_needs_no_group(networks):
    G, _D = networks
    D = Discriminator(
        c_dim=0, img_resolution=8, img_channels=3, channel_base=64, channel_max=8,
        epilogue_kwargs=dict(mbstd_num_channels=0),
    ).requires_grad_(False)  # fmt: skip
    others = ranking.references(G, D, None, 1.0, "const", "cpu")
    pictures = torch.randn(3, 3, 8, 8)
    assert len(others) == 0
    assert ranking.realism(D, pictures, others, None) == pytest.approx(
        D(pictures, None)[:, 0].tolist(), abs=1e-5
    )
