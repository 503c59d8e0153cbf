# SPDX-License-Identifier: Apache-2.0
"""Path lengths weighted by block: closed form on a linear generator, brute force with Jacobians, the option."""

import pytest
import torch
from click.testing import CliRunner

from ssn_ext import blocks, loss
from ssn_ext.networks import SpatialGenerator
from tests.helpers import overflow_and_recover
from training.loss import Batch

GRID = [2, 2]


def linear_pictures(ws, own, leak):
    """Grey 4x4 pictures of ws [N, num_ws, B]: a block's pixels are own * w_a + leak * (sum of the others), summed over
    the layers of ws."""
    matrix = leak * torch.ones(4, 4) + (own - leak) * torch.eye(4)
    values = (ws.sum(dim=1) @ matrix).reshape(-1, 1, 2, 2)
    return values.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize("own, leak, beta", [(3.0, 0.0, 0.25), (2.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_linear_generator(own, leak, beta):
    """J_a^T (m y) is Gaussian: own on the 4 pixels of a, leak / beta on the 12 others, y of variance 1 / 16."""
    torch.manual_seed(0)
    ws = torch.randn(20000, 3, 4, requires_grad=True)
    lengths = loss.block_path_lengths(linear_pictures(ws, own, leak), ws, GRID, beta)
    expected = (4 * own**2 + 12 * (leak / beta) ** 2) / 16
    squares = lengths.detach().square()
    error = float(squares.std()) / len(squares) ** 0.5
    assert float(squares.mean()) == pytest.approx(expected, abs=4 * error)
    assert error < 0.02 * expected


def tiny():
    torch.manual_seed(0)
    G = SpatialGenerator(
        z_dim=8, c_dim=0, w_dim=12, img_resolution=8, img_channels=2, latent_grid=GRID,
        mapping_kwargs=dict(num_layers=1),
        synthesis_kwargs=dict(channel_base=64, channel_max=8, use_noise=False, encoder_kwargs=dict(channels=4)),
    )  # fmt: skip
    return G.requires_grad_(False)


def test_brute_force():
    """The same numbers from each sample's whole Jacobian, the same draws replayed in the documented order."""
    G, beta, count = tiny(), 0.3, 5
    ws = G.mapping(torch.randn(count, G.z_dim), None).requires_grad_(True)
    img = G.synthesis(ws)
    torch.manual_seed(3)
    got = loss.block_path_lengths(img, ws, GRID, beta)
    torch.manual_seed(3)
    picks, noise = torch.randint(4, [count]), torch.randn(count, 2, 8, 8)
    masks = blocks.block_masks(GRID, [8, 8])
    for n in range(count):
        jacobian = torch.autograd.functional.jacobian(lambda w: G.synthesis(w[None])[0], ws[n].detach())
        weighted = noise[n] / 8 * torch.where(masks[picks[n]], 1.0, 1 / beta)
        slopes = torch.einsum("cyx,cyxld->ld", weighted, jacobian).reshape(-1, 3, 4)  # [num_ws, C, B]
        expected = slopes[:, :, picks[n]].square().sum(dim=1).mean().sqrt()
        torch.testing.assert_close(got[n].detach(), expected, rtol=1e-4, atol=1e-7)


def test_beta_1_is_the_ordinary_path_length_of_one_block():
    """With a grid of one block and beta 1 nothing is left of the weighting: StyleGAN2's penalty and its gradients."""
    torch.manual_seed(0)
    G = SpatialGenerator(
        8,
        0,
        8,
        8,
        3,
        latent_grid=[1, 1],
        synthesis_kwargs=dict(channel_base=64, channel_max=8, use_noise=False),
    )
    nets = dict(device="cpu", G_mapping=G.mapping, G_synthesis=G.synthesis, D=None, style_mixing_prob=0)
    ours = loss.BlockPathLengthLoss(**nets, pl_block_beta=1)
    theirs = loss.DistortionRegularizedLoss(**nets)
    grads = []
    for each in [ours, theirs]:
        G.requires_grad_(True).zero_grad()
        torch.manual_seed(1)
        z = torch.randn(4, 8)
        torch.manual_seed(2)
        if each is theirs:
            torch.randint(1, [2])  # the draw of the blocks
        each.accumulate_gradients("Greg", None, None, z, torch.zeros(4, 0), gain=4)
        grads.append([p.grad.clone() for p in G.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.pl_block_mean, theirs.pl_mean)
    assert float(ours.pl_mean) == 0  # the other one does not run


def test_term_weight_and_state():
    G = tiny()
    nets = dict(device="cpu", G_mapping=G.mapping, G_synthesis=G.synthesis, D=None, style_mixing_prob=0)
    ours = loss.BlockPathLengthLoss(**nets, pl_block_beta=0.5, pl_weight=3, pl_decay=0.1)
    assert [row.name for row in ours.phase_rows(4, 16)] == ["Gmain", "Greg", "Gdist", "Dmain", "Dreg"]
    assert ours.TERMS["Gboth"] == ["adversarial", "block_path_length"]

    G.requires_grad_(True)
    z = torch.randn(6, G.z_dim)
    torch.manual_seed(4)
    value = ours.block_path_length(Batch(None, None, z, torch.zeros(6, 0)))
    torch.manual_seed(4)
    ws = G.mapping(z[:3], None, skip_w_avg_update=True)
    lengths = loss.block_path_lengths(G.synthesis(ws), ws, GRID, 0.5)
    torch.testing.assert_close(ours.pl_block_mean, 0.1 * lengths.mean().detach())
    torch.testing.assert_close(value, 3 * (lengths - 0.1 * lengths.mean()).square())
    state = ours.state_dict()
    assert set(state) == {"pl_mean", "pl_block_mean"}
    other = loss.BlockPathLengthLoss(**nets)
    other.load_state_dict(state)
    assert torch.equal(other.pl_block_mean, ours.pl_block_mean) and float(other.pl_block_mean) > 0
    ours.pl_weight = 0
    assert ours.block_path_length(Batch(None, None, z, torch.zeros(6, 0))) is None


def test_option(ds, tiny_run, tmp_path):
    """Off by default; given, it replaces the term, and a run goes on with its running mean."""
    import train

    plain = tiny_run("--cfg=ssn", "--latent-grid=2x2", "--set=total_kimg=0.008")
    assert plain.status == 0, plain.output
    assert plain.options()["loss_kwargs"]["class_name"] == "ssn_ext.loss.DistortionRegularizedLoss"
    run = tiny_run("--cfg=ssn", "--latent-grid=2x2", "--pl-block-beta=0.5", "--set=total_kimg=0.008")
    assert run.status == 0, run.output
    assert run.options()["loss_kwargs"]["class_name"] == "ssn_ext.loss.BlockPathLengthLoss"
    assert run.options()["loss_kwargs"]["pl_block_beta"] == 0.5 and "plblock0.5" in run.dir.name
    assert float(run.checkpoint()["loss"]["pl_block_mean"]) > 0
    result = CliRunner().invoke(
        train.build_command(), ["--outdir=x", f"--data={ds}", "--cfg=ssn", "--pl-block-beta=0"]
    )
    assert result.exit_code != 0 and "0.0 is not in the range x>0" in result.output


def test_an_overflow_does_not_stay_in_the_mean():
    widths = dict(channel_base=64, channel_max=8)
    G = SpatialGenerator(8, 0, 8, 8, 3, latent_grid=[2, 2], synthesis_kwargs=widths)
    ours = loss.BlockPathLengthLoss("cpu", G.mapping, G.synthesis, None)
    overflow_and_recover(ours.block_path_length, lambda: ours.pl_block_mean, G)
