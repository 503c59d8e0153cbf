# SPDX-License-Identifier: Apache-2.0
"""The SSN loss: StyleGAN2's and lambda_d times the distortion regulariser R_D, one more term and one more
phase."""

import functools

import torch

from ssn_ext import blocks, distortion, grids
from torch_utils import distributed, training_stats
from torch_utils.ops import conv2d_gradfix
from training.loss import PhaseRow, StyleGAN2Loss, check_number


class DistortionRegularizedLoss(StyleGAN2Loss):
    """StyleGAN2's loss + lambda_d * R_D, eq. (2) of the SSN paper divided by B (B - 1).

    R_D = E sum_a sum_{b != a} MSE(g(z)_b, g(z^a)_b) / (B (B - 1)) over pictures in [-1, 1] that are not
    clamped, where z^a is z with block a drawn anew; of several grids, the mean of each one's R_D. It is
    estimated without bias: per sample one uniform block a (dist_blocks of them, averaged), the same noise in
    both pictures, no style mixing. The phase runs every dist_interval iterations on 1/dist_batch_shrink of the
    batch, weighted by the interval; at lambda_d = 0 there is no such phase. `distortion` names what stands in the
    MSE's place (ssn_ext.distortion): 'mse', 'emd', or 'features', which are those of D as it is at that step: no
    other network has to be had, and a checkpoint and all processes hold it anyway. D sees both pictures without
    augmentation and is not trained by it.
    """

    TERMS = {**StyleGAN2Loss.TERMS, "Gdist": ["distortion"]}

    def __init__(
        self, *args, lambda_d=100, dist_interval=4, dist_batch_shrink=2, dist_blocks=1,
        distortion="mse", **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        check_number("lambda_d", lambda_d)
        for name, value in dict(
            dist_interval=dist_interval, dist_batch_shrink=dist_batch_shrink, dist_blocks=dist_blocks
        ).items():
            check_number(name, value, least=1, whole=True)
        self.lambda_d = lambda_d
        self.dist_interval = dist_interval
        self.dist_batch_shrink = dist_batch_shrink
        self.dist_blocks = dist_blocks
        self.measure = choose_distortion(distortion, grids.grids_of(self.G_synthesis), self.D)

    def phase_rows(self, G_reg_interval=4, D_reg_interval=16):
        """StyleGAN2's phases and, unless lambda_d is 0, Gdist after the other phases of G."""
        rows = super().phase_rows(G_reg_interval, D_reg_interval)
        if self.lambda_d != 0 and grids.grids_with_outside(grids.grids_of(self.G_synthesis)):
            after = sum(row.net == "G" for row in rows)
            rows.insert(after, PhaseRow("Gdist", "G", self.dist_interval))
        return rows

    def distortion(self, batch):
        """lambda_d * the estimate of R_D, [N']."""
        size = max(batch.gen_z.shape[0] // self.dist_batch_shrink, 1)
        z, c = batch.gen_z[:size], batch.gen_c[:size]
        value = estimate_distortion(self.G_mapping, self.G_synthesis, z, c, self.dist_blocks, self.measure)
        training_stats.report("Loss/distortion", value)
        return training_stats.report("Loss/G/dist", value * self.lambda_d)


def choose_distortion(name, grid, D):
    """The function (before, after, mask) -> [N] of a name in distortion.NAMES; ValueError for another name."""
    if name not in distortion.NAMES:
        raise ValueError(f"distortion {name!r} is not known; there are {', '.join(distortion.NAMES)}")
    return distortion.choose(grid, functools.partial(distortion.discriminator_features, D))[name]


def estimate_distortion(G_mapping, G_synthesis, z, c, num_blocks=1, measure=distortion.masked_mse):
    """One unbiased draw of R_D per sample -> [N]: the distortion outside a random block a of g(z) and g(z^a),
    `num_blocks` draws averaged. z [N, z_dim]; a is drawn before z', and both before the noise, which all
    pictures share. measure: (before, after, mask) -> [N], the change where the mask is True."""
    grid = grids.grids_of(G_synthesis)
    ws = G_mapping(z, c, skip_w_avg_update=True)
    picks = grids.random_blocks(grid, [num_blocks, z.shape[0]], device=z.device)
    fresh = [G_mapping(torch.randn_like(z), c, skip_w_avg_update=True) for _ in range(num_blocks)]
    noise = NoiseReplay(z.device)
    before = noise.run(G_synthesis, ws)
    masks = blocks.block_masks(grid, before.shape[2:], device=before.device)  # [B, H, W]
    total = 0
    for block, other in zip(picks, fresh, strict=True):
        after = noise.run(G_synthesis, blocks.replace_blocks(ws, other, block, grid))
        total = total + measure(before, after, ~masks[block])
    return total / num_blocks


class BlockPathLengthLoss(DistortionRegularizedLoss):
    """The same with path lengths weighted by block, appendix B of the SSN paper, in place of StyleGAN2's.

    Its eq. (15) is lost in every copy of the paper that we have; this is a reconstruction from its text. With a block a
    drawn per sample, m = 1 on the pixels of block a and 1 / pl_block_beta elsewhere, and y white noise:

        pl_weight * (|J_a^T (m y)| - running mean)^2,     J_a = d image / d w_a

    So w_a moves its own block at an even rate, and for pl_block_beta < 1 the others at pl_block_beta of that rate. For
    1 it is StyleGAN2's path length for the directions of one block. `pl_block_mean` is the running mean.
    """

    TERMS = {
        **DistortionRegularizedLoss.TERMS,
        "Greg": ["block_path_length"],
        "Gboth": ["adversarial", "block_path_length"],
    }

    def __init__(self, *args, pl_block_beta=1, **kwargs):
        super().__init__(*args, **kwargs)
        check_number("pl_block_beta", pl_block_beta)
        self.pl_block_beta = pl_block_beta
        self.pl_block_mean = torch.zeros([], device=self.device)

    def block_path_length(self, batch):
        """The penalty of the class's description, [N']. Random draws after those of run_G: blocks, then y."""
        if self.pl_weight == 0:
            return None
        size = max(batch.gen_z.shape[0] // self.pl_batch_shrink, 1)
        img, ws = self.run_G(batch.gen_z[:size], batch.gen_c[:size])
        lengths = block_path_lengths(img, ws, grids.grids_of(self.G_synthesis), self.pl_block_beta)
        mean = self.pl_block_mean.lerp(lengths.mean(), self.pl_decay)
        self.pl_block_mean = distributed.average(mean)  # one for all processes, as pl_mean
        penalty = training_stats.report("Loss/pl_penalty", (lengths - mean).square())
        return training_stats.report("Loss/G/reg", penalty * self.pl_weight)

    def state_dict(self):
        """The running means."""
        return {**super().state_dict(), "pl_block_mean": self.pl_block_mean}

    def load_state_dict(self, state):
        """Restores the running means."""
        super().load_state_dict(state)
        self.pl_block_mean = state["pl_block_mean"].to(self.device)


def block_path_lengths(img, ws, grid, beta):
    """|J_a^T (m y)| of one random block a (of all grids) per sample -> [N]; see BlockPathLengthLoss.

    img [N, C, H, W] was made of ws [N, num_ws, w_dim]; layers count as in StyleGAN2: the mean over them of squared
    norms. Gradients flow.
    """
    count, height, width = img.shape[0], *img.shape[2:]
    num_blocks = sum(grids.block_counts(grid))
    picks = torch.randint(num_blocks, [count], device=img.device)
    noise = torch.randn_like(img) / (height * width) ** 0.5
    inside = blocks.block_masks(grid, [height, width], device=img.device)[picks]  # [N, H, W]
    noise = torch.where(inside[:, None], noise, noise / beta)
    with conv2d_gradfix.no_weight_gradients():
        (jacobian,) = torch.autograd.grad([(img * noise).sum()], [ws], create_graph=True)
    by_block = jacobian.reshape(count, ws.shape[1], -1, num_blocks)  # [N, num_ws, C, B]
    own = by_block[torch.arange(count, device=img.device), :, :, picks]  # [N, num_ws, C]
    return own.square().sum(dim=2).mean(dim=1).sqrt()


class NoiseReplay:
    """Runs functions from one and the same state of the device's random numbers, so that they draw the same
    noise."""

    def __init__(self, device):
        self.get, self.set = torch.get_rng_state, torch.set_rng_state
        if device.type == "cuda":
            self.get = lambda: torch.cuda.get_rng_state(device)
            self.set = lambda state: torch.cuda.set_rng_state(state, device)
        self.state = self.get()

    def run(self, function, *args, **kwargs):
        """function(*args, **kwargs) from the remembered state; the state goes on from the latest run."""
        self.set(self.state)
        return function(*args, **kwargs)
