# SPDX-License-Identifier: Apache-2.0
"""Sizes of pictures as a small size and a number of doublings."""

import itertools
import re
from types import SimpleNamespace

import pytest

from ssn_ext import networks as ssn_networks
from training import networks
from training.shapes import shape_of, split_shape


@pytest.mark.parametrize("n", range(9))
def test_powers_of_two_begin_at_four(n):
    assert split_shape(4 * 2**n, 4 * 2**n) == (4, 4, n)


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (128, 192, (4, 6, 5)),
        (288, 512, (9, 16, 5)),
        (96, 128, (6, 8, 4)),
        (160, 160, (5, 5, 5)),
        (7, 9, (7, 9, 0)),
    ],
)
def test_other_shapes(height, width, expected):
    assert split_shape(height, width) == expected


@pytest.mark.parametrize("height", range(4, 33))
def test_the_parts_give_the_whole_and_cannot_be_halved_again(height):
    h0, w0, n = split_shape(height * 8, 128)
    assert (h0 * 2**n, w0 * 2**n) == (height * 8, 128)
    assert h0 % 2 or w0 % 2 or min(h0, w0) < 8


def test_refused_with_a_size_that_would_do():
    with pytest.raises(ValueError, match="1920x1080 pixels are 240x135 doubled 3 times.*") as caught:
        split_shape(1080, 1920)
    width, height = map(int, re.search(r"; (\d+)x(\d+) would do", str(caught.value)).groups())
    assert split_shape(height, width) and height <= 1080 and width <= 1920
    with pytest.raises(ValueError, match="at least 4 pixels"):
        split_shape(2, 64)


def test_shape_of_networks_that_know_squares_only():
    assert shape_of(SimpleNamespace(img_resolution=64)) == [64, 64]
    assert shape_of(SimpleNamespace(img_resolution=64, img_shape=(48, 64))) == [48, 64]


@pytest.mark.parametrize("module", [networks, ssn_networks])
def test_the_modules_that_pickles_carry_hold_the_same_rule(module):
    seen = set()
    for height, width in itertools.product(range(0, 80), [4, 7, 12, 40, 62, 128, 576]):
        try:
            expected = split_shape(height, width)
        except ValueError:
            expected = None
            with pytest.raises(AssertionError, match="h0 x w0 doubled n times"):
                module.split_shape(height, width)
        else:
            assert module.split_shape(height, width) == expected
        seen.add(expected is None)
    assert seen == {True, False}
