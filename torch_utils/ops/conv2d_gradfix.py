# SPDX-License-Identifier: Apache-2.0
"""Convolutions with gradients of any order, and the switch that says whether weight gradients are wanted.

Autograd in today's PyTorch differentiates convolutions any number of times, and leaves out the weight
gradient by itself where `torch.autograd.grad` is asked for other inputs only. So these are the plain
functions, and the two flags are kept for the scripts and pickles that set them.
"""

import contextlib

import torch.nn.functional as F

from . import winograd

enabled = False
weight_gradients_disabled = False


@contextlib.contextmanager
def no_weight_gradients(disable=True):
    """Marks a block of code that needs no gradients of convolution weights; never changes a result."""
    global weight_gradients_disabled
    previous = weight_gradients_disabled
    weight_gradients_disabled = previous or disable
    try:
        yield
    finally:
        weight_gradients_disabled = previous


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """torch.nn.functional.conv2d: input [N,C,H,W], weight [O,C/groups,kh,kw] -> [N,O,H',W']."""
    if winograd.pays(input, weight, stride, padding, dilation, groups):
        return winograd.conv2d(input, weight, bias, padding)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """torch.nn.functional.conv_transpose2d: input [N,C,H,W], weight [C,O/groups,kh,kw] -> [N,O,H',W']."""
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
