# SPDX-License-Identifier: Apache-2.0
"""Sums over taps against the formula, with autograd's gradients."""

import pytest
import torch

from torch_utils.ops.tap_energy import tap_energy


def test_values_and_three_derivatives():
    w = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = []
    for result in (tap_energy(w), w.square().sum(dim=[2, 3])):
        row = [result.sin() * upstream]
        for _ in range(3):
            row += torch.autograd.grad(row[-1].cos().sum(), [w, upstream], create_graph=True)
        rows.append(row)
    for mine, plain in zip(*rows, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wanted", [True, False])
def test_onlookers(wanted):
    w = torch.randn(4, 3, 3, 3, requires_grad=wanted)
    tangent = torch.func.jvp(tap_energy, (w,), (w,))[1]
    torch.testing.assert_close(tangent, 2 * w.square().sum(dim=[2, 3]))
    batch = torch.stack([w.detach(), 2 * w.detach()])
    torch.testing.assert_close(torch.func.vmap(tap_energy)(batch), batch.square().sum(dim=[3, 4]))
