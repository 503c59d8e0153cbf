# SPDX-License-Identifier: Apache-2.0
"""Sums of the squares of convolution kernels over their taps, which demodulation needs."""

import torch

from torch_utils import custom_ops


def tap_energy(weight):
    """weight [O,I,kh,kw] -> [O,I]: sum over kh,kw of weight^2; gradients of any order, in one pass over the weights
    where autograd's take four."""
    if torch.is_grad_enabled() and weight.requires_grad and not custom_ops.is_watched(weight):
        return _TapEnergy.apply(weight)
    return _sum_of_squares(weight)


def energy_through(weight, energy):
    """energy [N,I] of a convolution's input channels -> [N,O]: sum over I of energy times `tap_energy`.

    On a CPU without gradients the squares never leave the cache: reading the weights is all that is left."""
    few = energy.shape[0] <= _FEW and weight.device.type == "cpu" and not torch.is_grad_enabled()
    if not few or custom_ops.is_watched(weight):
        return torch.matmul(energy, tap_energy(weight).t())
    rows = weight.flatten(1)
    step = max(_STRIP // rows.shape[1], 1)
    squares = rows.new_empty([step, rows.shape[1]])
    energy = energy.repeat_interleave(weight[0, 0].numel(), dim=1)  # for every tap
    out = energy.new_empty([energy.shape[0], len(rows)])
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        part = torch.mul(part, part, out=squares[: len(part)])
        out[:, first : first + step] = torch.mm(energy, part.t())
    return out


_FEW, _STRIP = 16, 2**18  # samples; values


def _sum_of_squares(weight):
    squares = (weight * weight).flatten(2)
    return torch.matmul(squares, squares.new_ones(squares.shape[2]))  # faster than a sum over few values


class _TapEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return _sum_of_squares(weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return weight * (2 * grad)[:, :, None, None]
