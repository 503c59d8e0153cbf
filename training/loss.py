# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2's losses as terms (methods that return tensors) and a table that maps phases to terms.

A further loss adds a method and a row; nothing else changes.
Sources: non-saturating logistic loss (Goodfellow et al. 2014), R1 (Mescheder et al. 2018, arXiv:1801.04406),
path length regularisation, lazy regularisation and style mixing (Karras et al. 2020, arXiv:1912.04958).
"""

import math
from collections import namedtuple

import torch
from torch.nn.functional import softplus

from torch_utils import distributed, training_stats
from torch_utils.ops import conv2d_gradfix

Batch = namedtuple("Batch", "real_img real_c gen_z gen_c")
PhaseRow = namedtuple(
    "PhaseRow", "name net interval"
)  # what runs, on which network ('G' or 'D'), every how many steps


def check_number(name, value, most=math.inf, least=0, whole=False):
    """ValueError unless an argument of a loss is a number from `least` to `most`."""
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        limits = f"from {least} " + ("on" if most == math.inf else f"to {most}")
        raise ValueError(f"{name} must be a {'whole ' * whole}number {limits}, not {value!r}")


class Loss:
    """Interface of a training loss: accumulate the gradients of one phase over one round of images."""

    def phase_rows(self, G_reg_interval, D_reg_interval):
        """The phases of one training step, in order: a list of PhaseRow."""
        raise NotImplementedError

    def accumulate_gradients(self, phase, real_img, real_c, gen_z, gen_c, sync=True, gain=1):
        """Adds gain * d(loss)/d(parameters) of `phase` to the .grad of the parameters that require it."""
        raise NotImplementedError

    def state_dict(self):
        """What an exact continuation needs."""
        return {}

    def load_state_dict(self, state):
        """Restores what `state_dict` gave."""


class StyleGAN2Loss(Loss):
    """Logistic loss + R1 (weight r1_gamma / 2) + path length regularisation (weight pl_weight).

    Arguments as in the StyleGAN2-ADA family: `G_mapping`, `G_synthesis` and `D` are the two halves of the
    generator and the discriminator, `augment_pipe` (or None) augments every picture that D sees.
    `style_mixing_prob` is the probability that the layers from a random cut on take their w from a second z.

    `pl_mean` is the running mean of the path lengths (part of `state_dict`).
    """

    TERMS = {
        "Gmain": ["adversarial"],
        "Greg": ["path_length"],
        "Gboth": ["adversarial", "path_length"],
        "Dmain": ["generated", "real"],
        "Dreg": ["r1"],
        "Dboth": ["generated", "real_and_r1"],
    }

    def __init__(
        self,
        device,
        G_mapping,
        G_synthesis,
        D,
        augment_pipe=None,
        style_mixing_prob=0.9,
        r1_gamma=10,
        pl_batch_shrink=2,
        pl_decay=0.01,
        pl_weight=2,
    ):
        super().__init__()
        check_number("r1_gamma", r1_gamma)
        check_number("pl_weight", pl_weight)
        check_number("pl_decay", pl_decay, most=1)
        check_number("style_mixing_prob", style_mixing_prob, most=1)
        check_number("pl_batch_shrink", pl_batch_shrink, least=1, whole=True)
        self.device = torch.device(device)
        self.G_mapping, self.G_synthesis, self.D = G_mapping, G_synthesis, D
        self.augment_pipe = augment_pipe
        self.r1_gamma, self.style_mixing_prob = r1_gamma, style_mixing_prob
        self.pl_weight, self.pl_decay, self.pl_batch_shrink = pl_weight, pl_decay, pl_batch_shrink
        self.pl_mean = torch.zeros([], device=self.device)

    # --- phases ---------------------------------------------------------------------------------------------

    def phase_rows(self, G_reg_interval=4, D_reg_interval=16):
        """Main and lazy regularisation phases of both networks; an interval of None joins the two into
        one."""
        rows = []
        for net, interval in [("G", G_reg_interval), ("D", D_reg_interval)]:
            if interval is None:
                rows += [PhaseRow(f"{net}both", net, 1)]
            else:
                rows += [PhaseRow(f"{net}main", net, 1), PhaseRow(f"{net}reg", net, interval)]
        return rows

    def accumulate_gradients(self, phase, real_img, real_c, gen_z, gen_c, sync=True, gain=1):
        """Adds the gradients of `phase` (a key of TERMS); `sync` is accepted for the family's callers and not
        needed.

        Each term is a mean over its batch, scaled by `gain`, and is propagated on its own, so that the memory
        of one term is free before the next begins.
        """
        del sync  # the loop reduces gradients itself, once per phase
        if phase not in self.TERMS:
            raise ValueError(f"unknown phase {phase!r}: expected one of {', '.join(self.TERMS)}")
        batch = Batch(real_img, real_c, gen_z, gen_c)
        for name in self.TERMS[phase]:
            value = getattr(self, name)(batch)
            if value is not None:
                value.mean().mul(gain).backward()

    # --- running the networks -------------------------------------------------------------------------------

    def run_G(self, z, c):
        """Pictures and ws of z with style mixing. The order of random draws is: cut, coin, second z,
        noise."""
        ws = self.G_mapping(z, c)  # [N, num_ws, w_dim]
        if self.style_mixing_prob > 0:
            num_ws = ws.shape[1]
            cut = torch.empty([], dtype=torch.int64, device=ws.device).random_(1, num_ws)
            keep_all = torch.rand([], device=ws.device) >= self.style_mixing_prob
            cut = torch.where(keep_all, torch.full_like(cut, num_ws), cut)
            other = self.G_mapping(torch.randn_like(z), c, skip_w_avg_update=True)
            from_other = torch.arange(num_ws, device=ws.device) >= cut  # [num_ws]
            ws = torch.where(from_other[None, :, None], other, ws)
        return self.G_synthesis(ws), ws

    def run_D(self, img, c):
        """Logits [N, 1] of pictures as D is shown them: augmented where a pipe is set."""
        return self.D(img if self.augment_pipe is None else self.augment_pipe(img), c)

    # --- terms ----------------------------------------------------------------------------------------------

    def adversarial(self, batch):
        """softplus(-D(G(z))): the generator's non-saturating loss, [N, 1]."""
        img, _ws = self.run_G(batch.gen_z, batch.gen_c)
        logits = self.run_D(img, batch.gen_c)
        _report_scores("fake", logits)
        return training_stats.report("Loss/G/loss", softplus(-logits))

    def path_length(self, batch):
        """pl_weight * (|J^T y| - running mean)^2, J = d image / d ws, y white noise of unit expected norm,
        [N']."""
        if self.pl_weight == 0:
            return None
        size = max(batch.gen_z.shape[0] // self.pl_batch_shrink, 1)
        img, ws = self.run_G(batch.gen_z[:size], batch.gen_c[:size])
        noise = torch.randn_like(img) / (img.shape[2] * img.shape[3]) ** 0.5
        with conv2d_gradfix.no_weight_gradients():
            (jacobian,) = torch.autograd.grad(
                [(img * noise).sum()], [ws], create_graph=True
            )  # [N', num_ws, w_dim]
        lengths = jacobian.square().sum(dim=2).mean(dim=1).sqrt()
        ours = lengths.mean()
        everyones = distributed.average(ours)
        # one for all processes; it moves with the lengths, so a part of the gradient goes through it
        mean = self.pl_mean.lerp(everyones, self.pl_decay)
        self.pl_mean = finite_or(mean, self.pl_mean)
        through_mean = (
            (everyones - mean) * (2 * self.pl_decay) * (ours - ours.detach())
        )  # 0 but for its gradient
        penalty = training_stats.report("Loss/pl_penalty", (lengths - mean).square() - through_mean)
        return training_stats.report("Loss/G/reg", penalty * self.pl_weight)

    def generated(self, batch):
        """softplus(D(G(z))): the discriminator's loss on generated pictures, [N, 1]."""
        with torch.no_grad():
            img, _ws = self.run_G(batch.gen_z, batch.gen_c)
        logits = self.run_D(img, batch.gen_c)
        _report_scores("fake", logits)
        loss = softplus(logits)
        self._generated_loss = loss.detach()
        return loss

    def real(self, batch):
        """softplus(-D(x)): the discriminator's loss on real pictures, [N, 1]."""
        return self._on_real(batch, score=True, penalise=False)

    def r1(self, batch):
        """r1_gamma / 2 * |d D(x) / d x|^2 on the real pictures before augmentation, [N, 1]."""
        return self._on_real(batch, score=False, penalise=True)

    def real_and_r1(self, batch):
        """Both terms on real pictures from one pass of D, [N, 1]."""
        return self._on_real(batch, score=True, penalise=True)

    def _on_real(self, batch, score, penalise):
        penalise = penalise and self.r1_gamma != 0
        if not (score or penalise):
            return None
        img = batch.real_img.detach().requires_grad_(penalise)
        logits = self.run_D(img, batch.real_c)
        _report_scores("real", logits)
        loss = torch.zeros_like(logits)
        if score:
            loss = softplus(-logits)
            training_stats.report("Loss/D/loss", self._generated_loss + loss.detach())
        if penalise:
            with conv2d_gradfix.no_weight_gradients():
                (slope,) = torch.autograd.grad([logits.sum()], [img], create_graph=True)
            penalty = training_stats.report("Loss/r1_penalty", slope.square().sum([1, 2, 3]))
            weighted = training_stats.report("Loss/D/reg", penalty * (self.r1_gamma / 2))
            loss = loss + weighted[:, None]
        return loss

    # --- continuation ---------------------------------------------------------------------------------------

    def state_dict(self):
        """The running mean of path lengths."""
        return {"pl_mean": self.pl_mean}

    def load_state_dict(self, state):
        """Restores the running mean of path lengths."""
        self.pl_mean = state["pl_mean"].to(self.device)


def finite_or(new, old):
    """A running mean: the new value, or the old one where half precision overflowed, which would stay in it for
    ever."""
    return torch.where(new.isfinite(), new, old)


def _report_scores(kind, logits):
    training_stats.report(f"Loss/scores/{kind}", logits)
    training_stats.report(f"Loss/signs/{kind}", logits.sign())
