# SPDX-License-Identifier: Apache-2.0
"""The distortion regulariser: unbiased against the full double sum, and absent at lambda 0."""

import itertools

import pytest
import torch

from ssn_ext import blocks, distortion, transfer
from ssn_ext.loss import (
    DistortionRegularizedLoss,
    choose_distortion,
    estimate_distortion,
    estimate_interaction,
    synthesize_alike,
)
from ssn_ext.networks import SpatialGenerator
from training.loss import Batch, StyleGAN2Loss
from training.networks import Discriminator, Generator


def tiny(grid=(2, 2), noise=0.0):
    torch.manual_seed(0)
    G = SpatialGenerator(
        z_dim=2 * grid[0] * grid[1], c_dim=0, w_dim=4 * grid[0] * grid[1], img_resolution=8, img_channels=1,
        latent_grid=list(grid), mapping_kwargs=dict(num_layers=1),
        synthesis_kwargs=dict(channel_base=64, channel_max=8, encoder_kwargs=dict(channels=4)),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(noise)
            if "encoder_style" in name:
                p.normal_()
    return G.requires_grad_(False)


def full_double_sum(G, z, fresh):
    """eq. (2) of the paper over all ordered pairs of blocks, divided by B (B - 1), for each sample -> [N]."""
    count = G.latent_grid[0] * G.latent_grid[1]
    masks = blocks.block_masks(G.latent_grid, [8, 8])
    before = G(z, None, noise_mode="none")
    total = torch.zeros(len(z))
    for a, b in itertools.permutations(range(count), 2):
        after = G(blocks.replace_blocks(z, fresh, [a], G.latent_grid), None, noise_mode="none")
        total += (after - before)[:, :, masks[b]].square().mean(dim=(1, 2))
    return total / (count * (count - 1))


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_estimator_is_unbiased(num_blocks):
    """Its mean over many draws agrees with the full double sum over as many pairs (z, z'), within 4
    errors."""
    G = tiny()
    torch.manual_seed(1)
    count = 6000
    z, fresh = torch.randn(2, count, G.z_dim)
    truth = full_double_sum(G, z, fresh)
    c = torch.zeros(count, 0)
    draws = estimate_distortion(G.mapping, G.synthesis, torch.randn(count, G.z_dim), c, num_blocks)
    error = (truth.var() / count + draws.var() / count).sqrt()
    assert abs(float(draws.mean() - truth.mean())) < 4 * float(error)
    assert float(error) < 0.03 * float(truth.mean())  # sharp enough to notice a wrong divisor


def test_both_pictures_share_the_noise():
    """Strong noise, and a mapping that gives the same ws for every z: the estimate must be zero exactly."""
    G = tiny(noise=1.0)
    z, c = torch.randn(4, G.z_dim), torch.zeros(4, 0)
    ws = G.mapping(z, c)
    assert not torch.equal(G.synthesis(ws), G.synthesis(ws))

    def same(z, c, **_kwargs):
        return ws

    same.latent_grid = G.latent_grid
    assert torch.equal(estimate_distortion(same, G.synthesis, z, c, num_blocks=2), torch.zeros(4))


def test_one_block_has_no_outside():
    ours, _theirs, _S, _D = losses(30, grid=[1, 1])
    assert "Gdist" not in [row.name for row in ours.phase_rows(4, 16)]


def test_gradients_flow_into_both_pictures():
    """Finite differences of the estimate itself: a gradient that ignored one picture would be off."""
    G = tiny()
    z, c = torch.randn(8, G.z_dim), torch.zeros(8, 0)

    def value():
        torch.manual_seed(5)
        return estimate_distortion(G.mapping, G.synthesis, z, c).mean()

    p = G.synthesis.b8.conv1.weight
    p.requires_grad_(True)
    (grad,) = torch.autograd.grad(value(), p)
    p.requires_grad_(False)
    step = 1e-3 * grad / grad.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            p.add_(sign * step)
            values.append(float(value()))
            p.sub_(sign * step)
    assert (values[0] - values[1]) / 2 == pytest.approx(float((grad * step).sum()), rel=0.02)


class Polynomial:
    """Pictures [N, 1, 4, 4] of one number for each of 2x2 blocks, whose Hoeffding parts are known:

    sum_a z_a A_a  +  z_0 z_1 P  +  z_0 z_1 z_3 Q
    """

    latent_grid = [2, 2]

    def __init__(self):
        gen = torch.Generator().manual_seed(3)
        self.A = torch.randn([4, 4, 4], generator=gen)
        self.P, self.Q = torch.randn([2, 4, 4], generator=gen)

    def mapping(self, z, c, **_kwargs):
        return z[:, None]

    def __call__(self, ws):
        z = ws[:, 0]
        pictures = torch.einsum("na,ahw->nhw", z, self.A)
        for product, part in [(z[:, 0] * z[:, 1], self.P), (z[:, 0] * z[:, 1] * z[:, 3], self.Q)]:
            pictures = pictures + product[:, None, None] * part
        return pictures[:, None]

    def expected(self):
        """(R_D, R_I) from the sums over Hoeffding parts."""
        masks = blocks.block_masks([2, 2], [4, 4])
        parts = [({a}, self.A[a]) for a in range(4)] + [({0, 1}, self.P), ({0, 1, 3}, self.Q)]
        outside = sum(2 * part[~masks[a]].square().mean() for names, part in parts for a in names) / 4
        interaction = (
            sum(len(names) * part.square().mean() for names, part in parts if len(names) > 1) * 2 / 4
        )
        return float(outside), float(interaction)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_interaction_counts_the_parts_that_hang_on_several_blocks(num_blocks):
    """Against the closed form of a polynomial, within 4 errors; R_D is that of the plain estimator, and sharper."""
    G = Polynomial()
    torch.manual_seed(0)
    z, c = torch.randn(40000, 4), torch.zeros(40000, 0)
    distortion_, interaction = estimate_interaction(G.mapping, G, z, c, num_blocks)
    plain = estimate_distortion(G.mapping, G, z, c, num_blocks)
    for draws, truth in zip([distortion_, interaction, plain], [*G.expected(), G.expected()[0]], strict=True):
        error = float(draws.std()) / 200
        assert abs(float(draws.mean()) - truth) < 4 * error and error < 0.05 * truth
    assert float(distortion_.var()) < float(plain.var())


def test_a_sum_over_blocks_has_no_interaction():
    G = Polynomial()
    G.P, G.Q = torch.zeros(2, 4, 4)
    value, interaction = estimate_interaction(G.mapping, G, torch.randn(8, 4), torch.zeros(8, 0))
    assert float(interaction.max()) < 1e-10 < float(value.min())


def test_interaction_is_a_term_of_the_loss():
    """lambda_d R_D + lambda_interaction R_I of one and the same draws; either weight makes the phase."""
    plain, _theirs, S, D = losses(0)
    nets = dict(device="cpu", G_mapping=S.mapping, G_synthesis=S.synthesis, D=D)
    batch = Batch(None, None, torch.randn(6, S.z_dim), torch.zeros(6, 0))
    values = []
    for weights in [(3, 1e-9), (0, 5), (3, 5)]:
        ours = DistortionRegularizedLoss(**nets, lambda_d=weights[0], lambda_interaction=weights[1])
        assert "Gdist" in [row.name for row in ours.phase_rows()]
        torch.manual_seed(4)
        values.append(ours.distortion(batch))
    assert "Gdist" not in [row.name for row in plain.phase_rows()]
    torch.testing.assert_close(values[0] + values[1], values[2])
    assert float(values[1].min()) > 0 and values[2].shape == (3,)
    S.requires_grad_(True)
    ours.accumulate_gradients("Gdist", *batch)
    S.requires_grad_(False)
    assert (
        all(p.grad is None for p in D.parameters())
        and float(S.synthesis.b8.conv0.weight.grad.abs().max()) > 0
    )


def losses(lambda_d, grid=(4, 4)):
    """(SSN loss, StyleGAN2 loss) on the same networks."""
    torch.manual_seed(0)
    G = Generator(
        8,
        0,
        8,
        16,
        3,
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(channel_base=128, channel_max=16),
    )
    S = transfer.from_stylegan2(G, latent_grid=grid).train()
    D = Discriminator(
        c_dim=0, img_resolution=16, img_channels=3, channel_base=128, channel_max=16
    ).requires_grad_(False)
    nets = dict(device="cpu", G_mapping=S.mapping, G_synthesis=S.synthesis, D=D)
    return DistortionRegularizedLoss(**nets, lambda_d=lambda_d), StyleGAN2Loss(**nets), S, D


def test_lambda_0_is_the_stylegan2_loss():
    """The same phases, and the same gradients in each."""
    ours, theirs, S, D = losses(0)
    assert ours.phase_rows(4, 16) == theirs.phase_rows(4, 16)
    real = torch.randn(4, 3, 16, 16).clamp(-1, 1)
    z, c = torch.randn(4, S.z_dim), torch.zeros(4, 0)
    for phase, net in [("Gmain", S), ("Greg", S), ("Dmain", D), ("Dreg", D)]:
        grads = []
        for loss in [ours, theirs]:
            net.requires_grad_(True).zero_grad()
            torch.manual_seed(7)
            loss.accumulate_gradients(phase, real, c, z, c, gain=2)
            net.requires_grad_(False)
            grads.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_phase_row_and_weight():
    ours, _theirs, S, _D = losses(30)
    rows = ours.phase_rows(4, 16)
    assert [row.name for row in rows] == ["Gmain", "Greg", "Gdist", "Dmain", "Dreg"]
    z, c = torch.randn(6, S.z_dim), torch.zeros(6, 0)
    grads = []
    for weight, gain in [(30, 1), (10, 3)]:
        ours.lambda_d = weight
        S.requires_grad_(True).zero_grad()
        torch.manual_seed(2)
        ours.accumulate_gradients("Gdist", None, None, z, c, gain=gain)
        S.requires_grad_(False)
        grads.append(S.synthesis.b8.conv0.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    assert float(grads[0].abs().max()) > 0


@pytest.mark.parametrize("name", distortion.NAMES)
def test_each_distortion_is_measured_outside_the_block_that_was_drawn(name):
    """The term equals the distortion of the two pictures, made by hand from the same draws; all differ."""
    plain, _theirs, S, D = losses(30)
    ours = DistortionRegularizedLoss(
        device="cpu", G_mapping=S.mapping, G_synthesis=S.synthesis, D=D, lambda_d=30, distortion=name
    )
    z, c = torch.randn(6, S.z_dim), torch.zeros(6, 0)
    torch.manual_seed(3)
    value = ours.distortion(Batch(None, None, z, c))
    torch.manual_seed(3)
    block = torch.randint(16, [1, 3])[0]
    fresh = torch.randn(3, S.z_dim)
    before = S.synthesis(S.mapping(z[:3], None))
    after = S.synthesis(S.mapping(blocks.replace_blocks(z[:3], fresh, block, S.latent_grid), None))
    outside = ~blocks.block_masks([4, 4], [16, 16])[block]
    expected = {
        "mse": lambda: distortion.masked_mse(before, after, outside),
        "emd": lambda: distortion.masked_emd(before, after, outside, [4, 4]),
        "features": lambda: distortion.masked_features(
            before, after, outside, lambda pictures: distortion.discriminator_features(D, pictures)
        ),
    }[name]()
    torch.testing.assert_close(value, 30 * expected, rtol=1e-3, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(plain.distortion(Batch(None, None, z, c)), value) == (name == "mse")


@pytest.mark.parametrize("name", ["features", "emd"])
def test_a_distortion_trains_the_generator_alone(name):
    _ours, _theirs, S, D = losses(30)
    nets = dict(device="cpu", G_mapping=S.mapping, G_synthesis=S.synthesis, D=D)
    loss = DistortionRegularizedLoss(**nets, distortion=name)
    S.requires_grad_(True)
    loss.accumulate_gradients("Gdist", None, None, torch.randn(4, S.z_dim), torch.zeros(4, 0), gain=4)
    S.requires_grad_(False)
    grads = [p.grad for p in S.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and max(float(g.abs().max()) for g in grads) > 0
    assert all(p.grad is None for p in D.parameters())


def test_an_unknown_distortion_is_refused():
    with pytest.raises(ValueError, match="distortion 'ssim' is not known; there are mse, features, emd"):
        choose_distortion("ssim", [4, 4], None)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_pictures_of_one_batch_are_those_of_several(num_blocks):
    """With noise: pictures, and the random numbers that are drawn next."""
    G = tiny(noise=1.0)
    ws = [G.mapping(torch.randn(3, G.z_dim), None) for _ in range(num_blocks + 1)]
    found = []
    for together in (True, False):
        torch.manual_seed(5)
        synthesis = (
            G.synthesis if together else lambda each: G.synthesis(each)
        )  # a function says nothing of noise
        found.append((torch.stack(list(synthesize_alike(synthesis, ws))), torch.rand(3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
