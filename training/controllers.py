# SPDX-License-Identifier: Apache-2.0
"""Objects that steer training from one iteration to the next: the weight average and the ADA controller."""

import torch

from torch_utils import misc, training_stats


class WeightAverage:
    """Exponential moving average of a network's parameters; its buffers are copied.

    Half-life `kimg` thousand images, or `rampup` times the images seen so far where that is less
    (StyleGAN2-ADA, arXiv:2006.06676). kimg = 0 keeps a plain copy.
    """

    def __init__(self, source, average, kimg=10, rampup=None):
        self.source = source
        self.average = average
        self.kimg = kimg
        self.rampup = rampup

    @torch.no_grad()
    def update(self, batch_size, nimg):
        """Takes in the weights after one step of `batch_size` images, `nimg` images having been seen before
        it."""
        half_life = self.kimg * 1000
        if self.rampup is not None:
            half_life = min(half_life, nimg * self.rampup)
        keep = 0.5 ** (batch_size / max(half_life, 1e-8))
        ours, theirs = list(self.average.parameters()), list(self.source.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - keep)
        for to, of in zip(self.average.buffers(), self.source.buffers(), strict=True):
            to.copy_(of)


class FixedAugment:
    """Augmentation of constant strength, or none at all; the interface of AdaptiveAugment."""

    def __init__(self, pipe=None, p=0):
        self.pipe = pipe
        if pipe is not None:
            pipe.p.copy_(torch.as_tensor(p))

    @property
    def strength(self):
        """Present probability of the transforms."""
        return 0.0 if self.pipe is None else float(self.pipe.p)

    def update(self, batch_size, batch_idx):
        """Called once an iteration."""

    def state_dict(self):
        """Strength and pending sums, for an exact continuation."""
        return {} if self.pipe is None else {"p": self.pipe.p}

    def load_state_dict(self, state):
        """Restores what state_dict gave."""
        if self.pipe is not None:
            self.pipe.p.copy_(state["p"])


class AdaptiveAugment(FixedAugment):
    """ADA: moves the strength so that the mean sign of D's output on real pictures stays at `target`.

    Every `interval` iterations: p <- max(p + sign(r - target) * batch_size * interval / (kimg * 1000), 0),
    where r is the mean of `Loss/signs/real` since the last update (arXiv:2006.06676, section 3).
    """

    def __init__(self, pipe, p=0, target=0.6, interval=4, kimg=500):
        super().__init__(pipe, p)
        self.target = target
        self.interval = interval
        self.kimg = kimg
        self._signs = training_stats.Collector(regex="Loss/signs/real")

    @torch.no_grad()
    def update(self, batch_size, batch_idx):
        """Adjusts the strength when its turn has come."""
        if batch_idx % self.interval != 0:
            return
        self._signs.update()
        r = self._signs["Loss/signs/real"]
        if r == r:  # not NaN: something was reported
            direction = (r > self.target) - (r < self.target)
            step = direction * (batch_size * self.interval) / (self.kimg * 1000)
            self.pipe.p.copy_((self.pipe.p + misc.constant(step, device=self.pipe.p.device)).clamp(min=0))

    def state_dict(self):
        """Strength and the collector's pending sums."""
        return {**super().state_dict(), "signs": self._signs.state_dict()}

    def load_state_dict(self, state):
        """Restores what state_dict gave."""
        super().load_state_dict(state)
        self._signs.load_state_dict(state["signs"])
