# SPDX-License-Identifier: Apache-2.0
"""Training phases: which network one optimiser step is for, how often it runs, and its lazy-regularisation
factor."""

import time

import torch

import dnnlib
from torch_utils import distributed, training_stats


def lazy_correction(intervals):
    """The factor c of lazy regularisation for one optimiser: 1 / (steps it makes an iteration).

    intervals: of all its phases, the main one (1) included. An optimiser that also steps every `interval`
    iterations makes 1 + sum 1/interval steps an iteration; with lr * c and betas ** c it moves and forgets as
    if it made one (StyleGAN2, appendix B, for a single interval).
    """
    return 1 / sum(1 / interval for interval in intervals)


def make_optimizer(params, intervals, class_name, **kwargs):
    """An optimiser for phases that run every `intervals` iterations, with lr and betas corrected."""
    c = lazy_correction(intervals)
    kwargs = dict(kwargs)
    kwargs["lr"] = kwargs["lr"] * c
    if "betas" in kwargs:
        kwargs["betas"] = [float(beta) ** c for beta in kwargs["betas"]]
    params = list(params)
    if class_name == "torch.optim.Adam" and all(param.device.type == "cpu" for param in params):
        kwargs.setdefault("fused", True)  # one pass over memory instead of ten
    return dnnlib.util.construct_class_by_name(params, class_name=class_name, **kwargs)


class Phase:
    """One row of a loss's phase table, bound to its network and optimiser."""

    def __init__(self, row, module, optimizer):
        self.name = row.name
        self.net = row.net
        self.interval = row.interval
        self.module = module
        self.optimizer = optimizer
        self.parameters = list(module.parameters())
        self.timer = PhaseTimer(self.parameters[0].device)

    def step(self, loss, rounds):
        """Accumulates the gradients of all rounds (their sum), reduces them over the processes, and steps.

        rounds: sequence of (real_img, real_c, gen_z, gen_c). The gain is the interval, so that a lazy phase
        weighs the same as if it ran in every iteration. `Progress/nonfinite` counts the gradients' values that were
        not finite.
        """
        with self.timer:
            self.optimizer.zero_grad(set_to_none=True)
            self.module.requires_grad_(True)
            for real_img, real_c, gen_z, gen_c in rounds:
                loss.accumulate_gradients(self.name, real_img, real_c, gen_z, gen_c, gain=self.interval)
            self.module.requires_grad_(False)
            mended = distributed.all_reduce_gradients(self.parameters)
            training_stats.report("Progress/nonfinite", mended)
            self.optimizer.step()


class PhaseTimer:
    """Milliseconds of the latest run of a phase: CUDA events on a GPU (no synchronisation), else the
    clock."""

    def __init__(self, device):
        self._cuda = device.type == "cuda"
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else [None, None]
        self._ran = False

    def _mark(self, i):
        if self._cuda:
            self._marks[i].record()
        else:
            self._marks[i] = time.perf_counter()

    def __enter__(self):
        self._mark(0)

    def __exit__(self, *exc):
        self._mark(1)
        self._ran = True

    def milliseconds(self):
        """Duration of the latest run since the last call, or None when there was none."""
        if not self._ran:
            return None
        self._ran = False
        begin, end = self._marks
        if self._cuda:
            end.synchronize()
            return begin.elapsed_time(end)
        return (end - begin) * 1e3


def build_phases(rows, modules, opt_kwargs):
    """Phases for the rows of a loss; the phases of one network share one optimiser.

    modules and opt_kwargs map 'G' and 'D' to the network and to its optimiser's options (class_name, lr,
    betas...). Returns (list of Phase, dict net -> optimiser).
    """
    optimizers = {}
    for net, module in modules.items():
        intervals = [row.interval for row in rows if row.net == net]
        optimizers[net] = make_optimizer(module.parameters(), intervals, **opt_kwargs[net])
    return [Phase(row, modules[row.net], optimizers[row.net]) for row in rows], optimizers
