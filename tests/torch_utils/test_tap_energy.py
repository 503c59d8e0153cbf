# SPDX-License-Identifier: Apache-2.0
"""Sums over taps against the formula, with autograd's gradients."""

import pytest
import torch

from torch_utils.ops import tap_energy as module
from torch_utils.ops.tap_energy import energy_through, tap_energy


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


@pytest.mark.parametrize("num", [1, 4, 40])
@pytest.mark.parametrize("strip", [1, 70, 10**6])
def test_energy_through_weights(num, strip, monkeypatch):
    monkeypatch.setattr(module, "_STRIP", strip)
    w, energy = torch.randn(7, 3, 3, 3, dtype=torch.float64), torch.rand(num, 3, dtype=torch.float64)
    want = torch.einsum("ni,oiyx->no", energy, w.square())
    with torch.no_grad():
        torch.testing.assert_close(energy_through(w, energy), want)
    w.requires_grad_()
    got, upstream = energy_through(w, energy), torch.randn(num, 7, dtype=torch.float64)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, w, upstream)[0],
        2 * w * torch.einsum("no,ni->oi", upstream, energy)[:, :, None, None],
    )
