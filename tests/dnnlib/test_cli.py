# SPDX-License-Identifier: Apache-2.0
"""What the command lines share."""

import io
import sys

import click
import pytest

from dnnlib.cli import Finite, FiniteRange, progress, user_errors
from dnnlib.plugins import PluginError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_only_and_passes_the_items_on(monkeypatch):
    shown = {}
    for kind in (io.StringIO, Terminal):
        monkeypatch.setattr(sys, "stderr", kind())
        seen = []
        with progress(iter("abc"), 3, "Pictures", lambda item: item and f"item {item}") as bar:
            for each in bar:
                seen.append(each)
        assert seen == ["a", "b", "c"]
        shown[kind] = sys.stderr.getvalue()
    assert shown[io.StringIO] == ""
    assert all(text in shown[Terminal] for text in ("Pictures", "3/3", "item b"))


@pytest.mark.parametrize(
    "error", [ValueError("x is wrong"), OSError("x is wrong"), PluginError("x is wrong")]
)
def test_what_a_user_causes_is_one_line(error):
    with pytest.raises(click.ClickException, match="^x is wrong$"), user_errors():
        raise error


def test_what_we_cause_is_not_hidden():
    with pytest.raises(TypeError), user_errors():
        raise TypeError


@pytest.mark.parametrize("kind", [Finite(), FiniteRange(0, 10), FiniteRange(min=0)])
def test_numbers_that_are_none_are_refused(kind):
    assert kind.convert("2.5", None, None) == 2.5
    for text in ("nan", "inf", "-inf", "x"):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def test_a_finite_range_is_a_range():
    with pytest.raises(click.BadParameter, match="not in the range"):
        FiniteRange(0, 1, max_open=True).convert("1", None, None)
    with pytest.raises(click.BadParameter, match="^nan is not a finite number"):
        FiniteRange(0, 1).convert("nan", None, None)
