# SPDX-License-Identifier: Apache-2.0
"""Sizes of pictures as a small size and a number of doublings."""

import re

import pytest

from training.shapes import split_shape


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
