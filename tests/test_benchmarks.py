# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks: what it counts, how it reckons, what it says to mistakes."""

import re

import pytest
import torch
from click.testing import CliRunner

from benchmarks import measure, scaling
from benchmarks.__main__ import main
from training import phases


def test_operations_are_counted_forward_and_backward_without_filters():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    weight = torch.randn(4, 16, 3, 3, requires_grad=True)
    taps = torch.randn(16, 1, 3, 3)
    one = 2 * 2 * 4 * 16 * 9 * 8 * 8

    def run():
        filtered = torch.nn.functional.conv2d(x, taps, padding=1, groups=16)
        torch.nn.functional.conv2d(filtered, weight, padding=1).sum().backward()

    assert measure.count_flops(run) == 3 * one  # forward, to the input, to the weight
    small = torch.randn(2, 16, 4, 4)
    up = measure.count_flops(
        lambda: torch.nn.functional.conv_transpose2d(small, torch.randn(16, 4, 3, 3), stride=2)
    )
    assert up == one // 4  # every weight meets every pixel of the small input
    assert measure.count_flops(lambda: torch.randn(3, 4) @ torch.randn(4, 5)) == 2 * 3 * 4 * 5


def test_totals_weigh_phases_and_shares():
    parts = [
        measure.Case("a", None, 2, 100, 1, "step", seconds=[1.0, 2.0], shares=[0.5, 0.25]),
        measure.Case("b", None, 2, 40, 0.25, "step", seconds=[4.0, 4.0], shares=[0.1, 0.1]),
    ]
    (whole,) = measure.totals(parts)
    assert whole.flops == 110 and whole.seconds == [2.0, 3.0] and whole.best == 2.0
    assert whole.shares == pytest.approx([(0.5 + 0.1) / 2, (0.5 + 0.1) / 3])


def test_exponent_of_a_power_law():
    assert scaling.exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_a_table_is_printed_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MATRIX", 64)
    monkeypatch.setattr(measure, "COPY_FLOATS", 1024)
    args = [
        "--quick",
        "--only=dataset,generator",
        "--kinds=ssn",
        "--resolution=16",
        "--batch=2",
        "--channel-base=64",
    ]
    result = CliRunner().invoke(main, [*args, f"--out={tmp_path}", "--default-memory"])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("speed_*.md")
    text = file.read_text()
    assert (
        "| generator ssn 16x16, batch 2 |" in text and "| dataset, demo 32x32 |" in text and "batch=2" in text
    )
    assert "training" not in text
    assert "- command: python -m benchmarks --only=dataset,generator --kinds=ssn --resolution=16" in text
    assert "--quick" in text.split("- commit: ")[0] and "tmp" not in text
    assert re.search(r"- commit: ([0-9a-f]{7,}( with changes)?|unknown)\n", text)
    assert "| generator ssn without demodulation 16x16, batch 2 | generator ssn 16x16, batch 2 |" in text


def test_ratios_are_of_the_best_and_of_paired_rounds():
    base = measure.Case("plain", None, seconds=[2.0, 4.0, 4.0])
    case = measure.Case("ours", None, base="plain", seconds=[3.0, 4.0, 12.0])
    lines = measure.ratio_table([base, case, measure.Case("other", None, base="not timed", seconds=[1.0])])
    assert lines[3:] == ["| ours | plain | 1.500 | 1.500 |"]
    assert measure.ratio_table([base]) == []


@pytest.mark.parametrize("args", [["--only=foo"], ["--kinds=foo"], ["scaling", "--only=foo"]])
def test_unknown_names_are_one_line(args):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1 and "=foo is not known; there are" in result.output


def test_the_optimiser_is_fused_on_cpu_and_steps_alike():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2)]
    options = dict(lr=0.01, betas=[0.0, 0.99], eps=1e-8)
    ours = phases.make_optimizer([weights[0]], [1], "torch.optim.Adam", **options)
    plain = torch.optim.Adam([weights[1]], lr=0.01, betas=(0.0, 0.99), eps=1e-8, fused=False)
    assert ours.defaults["fused"] is True
    for _ in range(3):
        for weight, optimizer in zip(weights, [ours, plain], strict=True):
            weight.grad = weight.detach().sin() + 0.1
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])
