# SPDX-License-Identifier: Apache-2.0
"""The SSN loss: StyleGAN2's, lambda_d times the distortion regulariser R_D, and lambda_interaction times R_I; one more
term and one more phase."""

import functools

import torch

from ssn_ext import blocks, distortion, grids
from torch_utils import distributed, training_stats
from torch_utils.ops import conv2d_gradfix
from training.loss import PhaseRow, StyleGAN2Loss, check_number, finite_or


class DistortionRegularizedLoss(StyleGAN2Loss):
    """StyleGAN2's loss + lambda_d * R_D, eq. (2) of the SSN paper divided by B (B - 1), + lambda_interaction * R_I.

    R_D = E sum_a sum_{b != a} MSE(g(z)_b, g(z^a)_b) / (B (B - 1)) over pictures in [-1, 1] that are not
    clamped, where z^a is z with block a drawn anew; of several grids, the mean of each one's R_D. It is
    estimated without bias: per sample one uniform block a (dist_blocks of them, averaged), the same noise in
    both pictures, no style mixing. The phase runs every dist_interval iterations on 1/dist_batch_shrink of the
    batch, weighted by the interval; where both weights are 0 there is no such phase. `distortion` names what stands
    in the MSE's place (ssn_ext.distortion): 'mse', 'emd', or 'features', which are those of D as it is at that step: no
    other network has to be had, and a checkpoint and all processes hold it anyway. D sees both pictures without
    augmentation and is not trained by it.

    R_I is the part of a re-drawn block's change that hangs on the other blocks (estimate_interaction, docs/limit.md):
    what R_D could be spared without losing any covariance. Where it is weighed, the phase makes four pictures for a
    latent instead of two, and both of their pairs estimate R_D.
    """

    TERMS = {**StyleGAN2Loss.TERMS, "Gdist": ["distortion"]}

    def __init__(
        self, *args, lambda_d=100, dist_interval=4, dist_batch_shrink=2, dist_blocks=1,
        distortion="mse", lambda_interaction=0, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        for name, value in dict(lambda_d=lambda_d, lambda_interaction=lambda_interaction).items():
            check_number(name, value)
        for name, value in dict(
            dist_interval=dist_interval, dist_batch_shrink=dist_batch_shrink, dist_blocks=dist_blocks
        ).items():
            check_number(name, value, least=1, whole=True)
        self.lambda_d, self.lambda_interaction = lambda_d, lambda_interaction
        self.dist_interval = dist_interval
        self.dist_batch_shrink = dist_batch_shrink
        self.dist_blocks = dist_blocks
        self.measure = choose_distortion(distortion, grids.grids_of(self.G_synthesis), self.D)

    def phase_rows(self, G_reg_interval=4, D_reg_interval=16):
        """StyleGAN2's phases and, unless both weights are 0, Gdist after the other phases of G."""
        rows = super().phase_rows(G_reg_interval, D_reg_interval)
        if (self.lambda_d or self.lambda_interaction) and grids.grids_with_outside(
            grids.grids_of(self.G_synthesis)
        ):
            after = sum(row.net == "G" for row in rows)
            rows.insert(after, PhaseRow("Gdist", "G", self.dist_interval))
        return rows

    def distortion(self, batch):
        """lambda_d * the estimate of R_D + lambda_interaction * that of R_I, [N']."""
        size = max(batch.gen_z.shape[0] // self.dist_batch_shrink, 1)
        given = self.G_mapping, self.G_synthesis, batch.gen_z[:size], batch.gen_c[:size], self.dist_blocks
        if self.lambda_interaction:
            value, interaction = estimate_interaction(*given, self.measure)
            training_stats.report("Loss/interaction", interaction)
            weighted = value * self.lambda_d + interaction * self.lambda_interaction
        else:
            value = estimate_distortion(*given, self.measure)
            weighted = value * self.lambda_d
        training_stats.report("Loss/distortion", value)
        return training_stats.report("Loss/G/dist", weighted)


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
    edited = [blocks.replace_blocks(ws, w, block, grid) for block, w in zip(picks, fresh, strict=True)]
    before, *after = synthesize_alike(G_synthesis, [ws, *edited])
    masks = blocks.block_masks(grid, before.shape[2:], device=before.device)  # [B, H, W]
    return (
        sum(measure(before, img, ~masks[block]) for block, img in zip(picks, after, strict=True)) / num_blocks
    )


def estimate_interaction(G_mapping, G_synthesis, z, c, num_blocks=1, measure=distortion.masked_mse):
    """One unbiased draw each of R_D and R_I per sample -> ([N], [N]).

    With a random block a, z_a and z'_a two draws of it, r and r' two draws of all others (of all grids),

        R_I = 1/2 E mean over all values of ( g(z_a, r) - g(z'_a, r) - g(z_a, r') + g(z'_a, r') )^2

    It is the part of the mean squared change, inside and outside, that depends on r: in the Hoeffding parts of
    docs/limit.md 2 / B * sum of |S| tr C_S over the sets S of two blocks or more, by the number of values. R_D is the
    mean of its estimates at r and at r'. `num_blocks` draws of (a, z'_a) are averaged; all pictures share one noise,
    which is drawn after a, z' and r'. z [N, z_dim]; measure as in estimate_distortion.
    """
    grid = grids.grids_of(G_synthesis)
    ws = G_mapping(z, c, skip_w_avg_update=True)
    picks = grids.random_blocks(grid, [num_blocks, z.shape[0]], device=z.device)
    *fresh, others = (
        G_mapping(torch.randn_like(z), c, skip_w_avg_update=True) for _ in range(num_blocks + 1)
    )
    edited = [
        blocks.replace_blocks(around, own, block, grid)
        for block, other in zip(picks, fresh, strict=True)
        for around, own in [(ws, other), (others, ws), (others, other)]
    ]
    before, *after = synthesize_alike(G_synthesis, [ws, *edited])
    masks = blocks.block_masks(grid, before.shape[2:], device=before.device)  # [B, H, W]
    totals = [0, 0]
    for i, block in enumerate(picks):
        before_edited, second, second_edited = after[3 * i : 3 * i + 3]
        outside = ~masks[block]
        value = measure(before, before_edited, outside) + measure(second, second_edited, outside)
        difference = (before - before_edited) - (second - second_edited)
        totals = [totals[0] + value / 2, totals[1] + difference.square().mean(dim=[1, 2, 3]) / 2]
    return totals[0] / num_blocks, totals[1] / num_blocks


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
        # one for all processes, as pl_mean
        self.pl_block_mean = finite_or(distributed.average(mean), self.pl_block_mean)
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


def synthesize_alike(G_synthesis, ws):
    """Pictures of each ws of a list, all with the same noise: of one large batch where the network can do that
    (`shares_noise`; not where a batch's samples act on each other), which costs less than several batches."""
    if getattr(G_synthesis, "shares_noise", False):
        return G_synthesis(torch.cat(ws), noise_copies=len(ws)).chunk(len(ws))
    noise = NoiseReplay(ws[0].device)
    return [noise.run(G_synthesis, each) for each in ws]


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
