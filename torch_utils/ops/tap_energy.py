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
