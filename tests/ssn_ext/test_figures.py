# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.figures: sizes, places and colours that a reader relies on."""

import numpy as np
import pytest

from ssn_ext import figures
from ssn_ext.blocks import union_mask


def faces(count, size=(32, 32), channels=3):
    return list(np.random.RandomState(0).randint(0, 256, [count, *size, channels], dtype=np.uint8))


def test_heat_gets_brighter_with_the_value_and_clips():
    colours = figures.heat(np.linspace(0, 1, 200)).astype(int)
    brightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > -0.5).all() and brightness[-1] - brightness[0] > 200
    assert (figures.heat(np.array([-1.0, 9.0, np.nan])) == figures.heat(np.array([0.0, 1.0, 0.0]))).all()


def test_rms_change_in_closed_form():
    before = np.zeros((2, 2, 3), dtype=np.uint8)
    after = before.copy()
    after[0, 1] = [255, 0, 0]  # one of three channels changes by the whole range of 2
    expected = np.array([[0, 2 / np.sqrt(3)], [0, 0]])
    np.testing.assert_allclose(figures.rms_change(before, after), expected)


@pytest.mark.parametrize(("shape", "factor"), [((32, 32), 6), ((256, 256), 1), ((16, 64), 3), ((193, 10), 1)])
def test_small_pictures_are_enlarged_by_whole_factors(shape, factor):
    assert figures.enlargement(shape) == factor
    picture = faces(1, shape)[0]
    assert figures.magnify(picture, factor).shape == (shape[0] * factor, shape[1] * factor, 3)
    assert (figures.enlarge(picture, factor)[::factor, ::factor] == picture).all()


def test_magnify_keeps_the_colour_of_plain_pictures_and_takes_grey_and_rgba():
    plain = np.full((8, 8, 1), 77, dtype=np.uint8)
    assert (figures.magnify(plain, 4) == 77).all()
    assert figures.magnify(faces(1, channels=4)[0], 2).shape == (64, 64, 3)


def test_outline_marks_both_sides_of_the_border_and_nothing_else():
    mask = np.zeros((12, 12), dtype=bool)
    mask[4:8, 0:5] = True  # touches the left side of the picture
    picture = np.full((12, 12, 3), 128, dtype=np.uint8)
    marked = figures.outline(picture, mask)
    touched = (marked != picture).any(axis=2)
    assert not touched[5:7, 1:4].any() and not touched[:3].any() and not touched[:, 6:].any()
    assert (marked[4, 0:5] == figures.ACCENT).all() and (marked[5, 0] == figures.ACCENT).all()
    assert (marked[3, 0:6] == 0).all() and (marked[4:8, 5] == 0).all()
    assert (picture == 128).all()


def test_candidate_sheet_shows_every_picture_in_its_place():
    pictures = faces(9, (64, 64))
    mask = union_mask([5], (4, 4), (64, 64)).numpy()
    labels = [str(i) for i in range(9)]
    sheet = figures.candidate_sheet(pictures[0], pictures[1:], mask, labels, "A title", max_columns=5)
    cell = 64 * 3
    assert sheet.shape[1] == figures.GAP + 5 * (cell + figures.GAP)  # 8 candidates: two rows of 4
    places = [find(sheet, figures.magnify(each, 3)) for each in pictures]
    assert all(len(place) == 1 for place in places)
    (top, left), second_row = places[0][0], [place[0] for place in places[5:]]
    assert [place[0] for place in places[1:5]] == [
        (top, left + i * (cell + figures.GAP)) for i in range(1, 5)
    ]
    assert [x for _, x in second_row] == [left + i * (cell + figures.GAP) for i in range(1, 5)]


def test_an_unchanged_candidate_has_a_black_change_map():
    face = faces(1)[0]
    mask = np.zeros((32, 32), dtype=bool)
    sheet = figures.candidate_sheet(face, [face], mask, ["original", "same"])
    black = np.tile(figures.heat(np.zeros(1)), (192, 192, 1))
    assert len(find(sheet, black)) == 1


def test_change_sheet_has_a_row_a_picture_and_a_column_a_block():
    pictures = faces(6)
    sheet = figures.change_sheet(pictures[:2], [pictures[2:4], pictures[4:6]], [0, 15], (4, 4))
    cell = 4 * 32
    assert sheet.shape[1] == figures.GAP + 4 * (cell + figures.GAP)
    assert all(len(find(sheet, figures.magnify(each, 4))) == 1 for each in pictures[:2])


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (32, 32)), ((2, 3), (64, 96)), ((8, 8), (256, 256))])
def test_numbering_and_influence_are_drawn_for_any_grid(grid, size):
    face = np.full((*size, 3), 90, dtype=np.uint8)
    numbered = figures.numbering_picture(face, grid, [0, 1])
    assert max(numbered.shape) >= 256 and numbered.shape[0] % size[0] == 0
    blocks = grid[0] * grid[1]
    height, width = numbered.shape[0] // grid[0], numbered.shape[1] // grid[1]
    for block in range(blocks):  # every block has a bright number on it
        r, k = divmod(block, grid[1])
        tile = numbered[r * height : (r + 1) * height, k * width : (k + 1) * width]
        assert (tile[4:-4, 4:-4] > 220).all(axis=2).any()
    picture = figures.influence_picture(np.eye(blocks) * 0.25, grid)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def test_influence_picture_of_nothing_is_drawn_too():
    assert figures.influence_picture(np.zeros((4, 4)), (2, 2)).ndim == 3


def find(sheet, picture):
    """All (top, left) at which the sheet holds the picture."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, picture.shape)[:, :, 0]
    corner = (sheet[: windows.shape[0], : windows.shape[1]] == picture[0, 0]).all(axis=2)
    return [(y, x) for y, x in np.argwhere(corner).tolist() if (windows[y, x] == picture).all()]
