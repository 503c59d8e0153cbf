# SPDX-License-Identifier: Apache-2.0
"""Multiply and add in one pass."""

import torch


def fma(a, b, c):
    """a * b + c with broadcasting, in one pass over the result; gradients have the operands' own shapes."""
    return torch.addcmul(c, a, b)
