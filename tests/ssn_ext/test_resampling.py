# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.resampling on a generator whose locality is known: the algorithm's identities, and brute force."""

import itertools

import numpy as np
import pytest
import torch

from ssn_ext import resampling
from ssn_ext.blocks import block_masks, replace_blocks
from ssn_ext.distortion import block_change
from training import generating

GRID, C = (2, 3), 4
LEAK = 0.1


class Toy(torch.nn.Module):
    """A block-wise mapping, and a synthesis in which every block paints its own pixels and leaks a little."""

    def __init__(self, c_dim=0):
        super().__init__()
        self.latent_grid, self.num_ws, self.c_dim = list(GRID), 3, c_dim
        self.z_dim = self.w_dim = C * 6
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(torch.randn([C, C], generator=generator), requires_grad=False)
        self.register_buffer("w_avg", torch.randn([C], generator=generator).repeat_interleave(6))

    def mapping(self, z, c, truncation_psi=1):
        x = z.to(torch.float32).reshape(-1, C, 6)
        if self.c_dim:
            x = x + c.argmax(dim=1)[:, None, None]
        w = torch.tanh(torch.einsum("oc,ncb->nob", self.weight, x)).flatten(1)
        return self.w_avg.lerp(w, truncation_psi)[:, None].repeat(1, self.num_ws, 1)

    def synthesis(self, ws, noise_mode="const"):
        w = ws.mean(dim=1).reshape(-1, C, *GRID)[:, :3]
        image = torch.nn.functional.interpolate(w, scale_factor=4)  # [N, 3, 8, 12]
        image = image + LEAK * w.mean(dim=(2, 3), keepdim=True)
        return image + (0.5 * torch.randn(image.shape) if noise_mode == "random" else 0)

    def forward(self, z, c=None, truncation_psi=1, noise_mode="const"):
        return self.synthesis(self.mapping(z, c, truncation_psi), noise_mode)


@pytest.fixture
def G():
    return Toy()


def test_a_seed_has_the_latent_that_the_family_gives_it():
    z = generating.seed_latent(7, 24)
    assert z.dtype == torch.float64
    assert np.array_equal(z.numpy(), np.random.RandomState(7).randn(1, 24))


def test_donors_are_reproducible_distinct_and_do_not_depend_on_their_number():
    few, many = (resampling.donor_seeds(0, 3, 0, count) for count in (2, 6))
    assert many[:2] == few and len(set(many)) == 6
    others = [resampling.donor_seeds(*key, 6) for key in [(1, 3, 0), (0, 4, 0), (0, 3, 1)]]
    assert all(set(many).isdisjoint(each) for each in others)
    assert all(0 <= donor < 2**32 for donor in many)


@pytest.mark.parametrize("psi", [1.0, 0.6])
def test_redrawing_in_ws_is_redrawing_in_z(G, psi):
    ws = generating.map_seed(G, 0, None, psi, "cpu")
    edited = resampling.redraw(G, ws, [1, 4], [8, 9], psi=psi)
    for i, donor in enumerate([8, 9]):
        z = replace_blocks(generating.seed_latent(0, 24), generating.seed_latent(donor, 24), [1, 4], GRID)
        torch.testing.assert_close(edited[i : i + 1], G.mapping(z, None, truncation_psi=psi))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (4, 2, 5, 0, 3, 1)])
@pytest.mark.parametrize("psi", [1.0, 0.5])
def test_all_blocks_one_after_the_other_give_the_fresh_picture_bit_for_bit(G, order, psi):
    ws = generating.map_seed(G, 0, None, psi, "cpu")
    for block in order:
        ws = resampling.redraw(G, ws, [block], [123], psi=psi)
    fresh = G(generating.seed_latent(123, 24), truncation_psi=psi)
    assert torch.equal(resampling.render(G, ws), fresh)


def test_the_same_values_change_nothing(G):
    ws = generating.map_seed(G, 5, None, 1.0, "cpu")
    same = resampling.redraw(G, ws, [0, 1, 2], [5])
    pictures = resampling.render(G, torch.cat([ws, same]), "random", 5)
    assert torch.equal(pictures[0], pictures[1])
    assert (
        resampling.measure(pictures[:1], pictures[1:], block_masks(GRID, (8, 12))[0], GRID)[0]["inside"] == 0
    )


def test_random_noise_is_shared_reproducible_and_leaves_the_callers_random_state(G):
    ws = torch.cat([generating.map_seed(G, seed, None, 1.0, "cpu") for seed in (1, 2)])
    state = torch.get_rng_state()
    noise = resampling.render(G, ws, "random", 3) - resampling.render(G, ws)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(noise[0], noise[1])
    assert noise.std() > 0.3
    other = resampling.render(G, ws, "random", 4) - resampling.render(G, ws)
    assert not torch.allclose(noise, other)


def test_measure_agrees_with_numpy(G):
    generator = torch.Generator().manual_seed(0)
    before, after = (2 * torch.randn([n, 3, 8, 12], generator=generator) for n in (1, 2))
    mask = block_masks(GRID, (8, 12))[4]
    square = np.square(np.clip(after.numpy(), -1, 1) - np.clip(before.numpy(), -1, 1)).mean(axis=1)
    for i, change in enumerate(resampling.measure(before, after, mask, GRID)):
        inside, outside = square[i][mask.numpy()].mean(), square[i][~mask.numpy()].mean()
        assert change["inside"] == pytest.approx(inside, rel=1e-5)
        assert change["outside"] == pytest.approx(outside, rel=1e-5)
        assert change["ratio"] == pytest.approx(inside / outside, rel=1e-5)
        assert change["blocks"][4] == pytest.approx(inside, rel=1e-5)
        assert np.mean(change["blocks"]) == pytest.approx(square[i].mean(), rel=1e-5)


def test_measure_says_nan_where_there_is_no_ratio():
    picture = torch.zeros(1, 3, 8, 12)
    everything = torch.ones(8, 12, dtype=torch.bool)
    change = resampling.measure(picture, picture, everything, GRID)[0]
    assert np.isnan(change["outside"]) and np.isnan(change["ratio"])
    assert np.isnan(resampling.measure(picture, picture, block_masks(GRID, (8, 12))[0], GRID)[0]["ratio"])


@pytest.mark.parametrize(("clamp", "batch_size"), [(True, 16), (True, 2), (False, 3)])
def test_influence_is_what_editing_z_block_by_block_does(G, clamp, batch_size):
    z, fresh = 1.5 * torch.randn([2, 5, 24], generator=torch.Generator().manual_seed(2))
    matrix = resampling.influence(G, z, None, fresh, clamp=clamp, batch_size=batch_size)
    masks = block_masks(GRID, (8, 12))
    for n, a in itertools.product(range(5), range(6)):
        pictures = [
            G(each) for each in (z[n : n + 1], replace_blocks(z[n : n + 1], fresh[n : n + 1], [a], GRID))
        ]
        before, after = (each.clamp(-1, 1) if clamp else each for each in pictures)
        torch.testing.assert_close(matrix[n, a], block_change(before, after, masks)[0], atol=1e-5, rtol=1e-4)


def test_influence_of_a_leak_in_closed_form(G):
    z, fresh = torch.randn([2, 4, 24], generator=torch.Generator().manual_seed(3))
    matrix = resampling.influence(G, z, None, fresh, clamp=False)
    diagonal = torch.eye(6, dtype=torch.bool)
    ratio = matrix[:, diagonal] / matrix[:, ~diagonal].reshape(4, 6, 5).mean(dim=2)
    expected = (1 + LEAK / 6) ** 2 / (LEAK / 6) ** 2  # own pixels: d + d * LEAK / 6, others: d * LEAK / 6
    torch.testing.assert_close(ratio, torch.full([4, 6], expected), rtol=2e-3, atol=0)


def test_influence_shares_the_noise_of_every_pair_and_depends_on_the_random_state(G):
    z = torch.randn([3, 24], generator=torch.Generator().manual_seed(4))
    assert resampling.influence(G, z, None, z, noise_mode="random", clamp=False).abs().max() == 0
    fresh = z.flip(0)
    torch.manual_seed(1)
    first = resampling.influence(G, z, None, fresh, noise_mode="random")
    torch.manual_seed(1)
    assert torch.equal(first, resampling.influence(G, z, None, fresh, noise_mode="random"))
    assert not torch.equal(first, resampling.influence(G, z, None, fresh, noise_mode="random"))


def test_labels_reach_both_pictures():
    G = Toy(c_dim=3)
    z = torch.randn([4, 24], generator=torch.Generator().manual_seed(4))
    c = torch.eye(3)[[0, 1, 2, 1]]
    assert resampling.influence(G, z, c, z, batch_size=3).max() == 0
    one = generating.class_label(G, 2, "cpu")
    assert one.tolist() == [[0, 0, 1]]
    ws = generating.map_seed(G, 0, one, 1.0, "cpu")
    assert torch.equal(resampling.redraw(G, ws, [0], [0], one), ws)


@pytest.mark.parametrize(
    ("c_dim", "class_idx", "message"),
    [(0, 1, "unconditional"), (3, None, "must be 0 to 2, not None"), (3, 3, "must be 0 to 2, not 3")],
)
def test_wrong_classes_are_refused(c_dim, class_idx, message):
    with pytest.raises(ValueError, match=message):
        generating.class_label(Toy(c_dim), class_idx, "cpu")


def test_a_network_without_a_grid_is_refused_and_hashes_tell_networks_apart(G):
    with pytest.raises(ValueError, match="no latent_grid"):
        resampling.check_network(torch.nn.Linear(2, 2))
    resampling.check_network(G)
    other, wider = Toy(), Toy()
    assert resampling.network_hash(G) == resampling.network_hash(other)
    other.weight[0, 0] += 1e-6
    wider.latent_grid = [3, 2]
    assert len({resampling.network_hash(each) for each in (G, other, wider)}) == 3


def test_the_real_generator_keeps_the_identities():
    from ssn_ext.networks import SpatialGenerator

    torch.manual_seed(0)
    G = SpatialGenerator(
        z_dim=48,
        c_dim=0,
        w_dim=48,
        img_resolution=16,
        img_channels=3,
        latent_grid=[2, 3],
        mapping_kwargs={"num_layers": 2},
        synthesis_kwargs={"channel_base": 128, "channel_max": 8},
    ).eval()
    G.requires_grad_(False)
    ws = generating.map_seed(G, 0, None, 0.7, "cpu")
    for block in (3, 0, 5, 1, 4, 2):
        ws = resampling.redraw(G, ws, [block], [11], psi=0.7)
    fresh = G(generating.seed_latent(11, 48), None, truncation_psi=0.7, noise_mode="const")
    assert torch.equal(resampling.render(G, ws), fresh)
    z, other = torch.randn(2, 2, 48)
    matrix = resampling.influence(G, z, None, other)
    edited = replace_blocks(z, other, [4], [2, 3])
    before, after = (G(each, None, noise_mode="const").clamp(-1, 1) for each in (z, edited))
    masks = block_masks([2, 3], before.shape[-2:])
    torch.testing.assert_close(matrix[:, 4], block_change(before, after, masks), atol=1e-5, rtol=1e-3)
