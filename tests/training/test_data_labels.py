# SPDX-License-Identifier: Apache-2.0
"""Labels from dataset.json, tables and folders: what becomes a class, what a vector, and what is refused."""

import pytest

from training.data_labels import describe, find_labels, number_labels
from training.data_sources import Source


def source(*names, labels=None, kind="folder", **extra):
    return Source(kind, "pictures", list(names), lambda name: None, labels, extra)


@pytest.mark.parametrize(
    "raw, values, classes",
    [
        ([3, 0, 3], [3, 0, 3], None),
        (["3", "0", " 12 "], [3, 0, 12], None),
        ([1.0, 2.0], [1, 2], None),
        ([0.5, 2], [[0.5], [2]], None),
        (["-1", "4"], [[-1], [4]], None),
        (["1e-3", "4"], [[0.001], [4]], None),
        (["red", "blue", "red"], [1, 0, 1], {"blue": 0, "red": 1}),
        (["10", "9", "x"], [0, 1, 2], {"10": 0, "9": 1, "x": 2}),  # in the order of text
        (["1_0", "2"], [0, 1], {"1_0": 0, "2": 1}),  # Python would read ten
        (["inf", "b"], [1, 0], {"b": 0, "inf": 1}),
        ([[1, 2.5], [0, 1]], [[1, 2.5], [0, 1]], None),
        ([], [], None),
    ],
)
def test_numbers_are_classes_or_vectors_and_text_is_numbered(raw, values, classes):
    named = {f"{i}.png": value for i, value in enumerate(raw)}
    assert number_labels(named, "here") == ({f"{i}.png": v for i, v in enumerate(values)}, classes)


@pytest.mark.parametrize("empty", ["", " ", "nan", "NaN", None, float("nan")])
def test_empty_labels_are_missing(empty):
    assert number_labels({"a": "x", "b": empty}, "here") == ({"a": 0}, {"x": 0})


@pytest.mark.parametrize(
    "raw, message",
    [
        ([[1, 2], [1]], "The labels of here must be lists of numbers of one length"),
        ([[1, "2"], [1, 2]], "lists of numbers of one length"),
        ([[1, float("inf")], [1, 2]], "lists of numbers of one length"),
        ([1, [1]], "must be all finite numbers, all lists of them or all text; found int, list"),
        (["a", 1], "all text; found int, str"),
        ([{"a": 1}], "all text; found dict"),
        ([float("inf"), 1.0], "must be all finite numbers"),
    ],
)
def test_unusable_labels_say_why(raw, message):
    with pytest.raises(ValueError, match=message):
        number_labels(dict(enumerate(raw)), "here")


def test_the_sources_own_labels():
    found = find_labels(source("a", "b", labels={"a": 1}))
    assert (found.values, found.origin, found.required) == ({"a": 1}, "dataset.json", False)
    assert find_labels(source("a")).values is None
    known = {"cat": 0, "dog": 1}
    assert find_labels(source("a", labels={"a": 1}, classes=known)).classes == known
    assert find_labels(source("a", labels={"a": 1}, classes="of our own")).classes is None
    assert find_labels(source("a", labels={"a": "dog"}, classes=known)).classes == {"dog": 0}
    assert find_labels(source("a", labels={"a": 1}, kind="mnist")).origin == "mnist"


def test_folders_are_classes():
    found = find_labels(source("dog/x/1.png", "cat/1.png", "dog/2.png", "3.png"), "folders")
    assert found.values == {"dog/x/1.png": 1, "cat/1.png": 0, "dog/2.png": 1}
    assert found.classes == {"cat": 0, "dog": 1} and found.required
    with pytest.raises(ValueError, match="--labels=folders needs a folder or a zip of pictures, not mnist"):
        find_labels(source("a", kind="mnist"), "folders")


@pytest.fixture
def table(tmp_path):
    def write(text, encoding="utf-8"):
        (tmp_path / "looks.csv").write_bytes(text.encode(encoding))
        return str(tmp_path / "looks.csv")

    return write


TABLE = 'file,hair,age,height\nsub\\a.png,red,30,1.8\nb.png,"fair, dyed",41,1.6\nc.png,red,9,\n'
NAMES = ["sub/a.png", "b.png", "c.png"]


@pytest.mark.parametrize("change", [("", ""), (",", ";"), (",", "\t"), ("\n", "\r\n"), ("\n", "\n\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_column_of_a_table(table, change, encoding):
    path = table('"the file",hair\nsub\\a.png,red\nb.png, fäir\nd.png,red\n'.replace(*change), encoding)
    found = find_labels(source(*NAMES), path)
    assert found.values == {"sub/a.png": 1, "b.png": 0, "d.png": 1}
    assert found.classes == {"fäir": 0, "red": 1}
    assert (found.origin, found.required, found.unused) == ("looks.csv, column hair", True, ("d.png",))


def test_excels_mark_at_the_beginning_is_no_part_of_the_table(table):
    path = table('"file, as stored",hair\nb.png,red\n', "utf-8-sig")
    assert find_labels(source(*NAMES), path).values == {"b.png": 0}


def test_label_columns_pick(table):
    hair = find_labels(source(*NAMES), table(TABLE), ["hair"])
    assert hair.values == {"sub/a.png": 1, "b.png": 0, "c.png": 1} and hair.unused == ()
    assert find_labels(source(*NAMES), table(TABLE), ["age"]).values == dict(
        zip(NAMES, [30, 41, 9], strict=True)
    )
    height = find_labels(source(*NAMES), table(TABLE), ["height"])
    assert height.values == {"sub/a.png": [1.8], "b.png": [1.6]}  # and c.png has none
    both = find_labels(source(*NAMES), table(TABLE), ["height", "age"])
    assert both.values == {"sub/a.png": [1.8, 30], "b.png": [1.6, 41]} and both.classes is None
    assert both.origin == "looks.csv, column height and age"


@pytest.mark.parametrize(
    "text, columns, message",
    [
        (TABLE, [], "^looks.csv has the columns file, hair, age, height: choose with --label-column$"),
        (TABLE, ["eyes"], "--label-column: looks.csv has no column 'eyes' after the first"),
        (TABLE, ["file"], "--label-column: looks.csv has no column 'file' after the first"),
        (TABLE, ["age", "hair"], "make vectors of numbers; sub/a.png has .'30', 'red'. in looks.csv"),
        ("b.png,3\nc.png,4\n", [], "begin with a line that names its columns, not with 'b.png'"),
        (
            "file,x\nother.png,1\n",
            [],
            "looks.csv names no picture of pictures: .*'other.png', .*'sub/a.png'$",
        ),
        ("file,x\n", [], "looks.csv names no picture of pictures: it begins with nothing"),
        ("file,x\nb.png,1\nb.png,2\n", [], "looks.csv, row 3: a second, different row for 'b.png'"),
        ("file,x\nb.png,1,2\n", [], "looks.csv, row 2: 3 cells under 2 columns"),
        ("file\nb.png\n", [], "looks.csv must have two columns or more"),
        ("", [], "looks.csv must have two columns or more"),
    ],
)
def test_unusable_tables_say_why(table, text, columns, message):
    with pytest.raises(ValueError, match=message):
        find_labels(source(*NAMES), table(text), columns)


def test_tables_in_another_encoding(table):
    with pytest.raises(ValueError, match="looks.csv does not read as a table in UTF-8"):
        find_labels(source(*NAMES), table("file,hair\nb.png,fäir\n", "latin-1"))


@pytest.mark.parametrize("choice", [None, "folders"])
def test_columns_need_a_table(choice):
    with pytest.raises(
        ValueError, match="--label-column is a column of the table given with --labels=FILE.csv"
    ):
        find_labels(source(*NAMES), choice, ["hair"])


@pytest.mark.parametrize(
    "labels, classes, text",
    [
        (None, None, "none"),
        ([[1, 2], [3, 4]], None, "vectors of length 2"),
        ([0, 1, 1], None, "2 classes"),
        ([0, 4], None, "5 classes, of which 3 have no picture"),
        ([0, 1], {"dog": 1, "cat": 0}, "2 classes (cat, dog)"),
        (list(range(7)), {c: i for i, c in enumerate("gfedcba")}, "7 classes (g, f, e, d, c, ...)"),
    ],
)
def test_labels_in_words(labels, classes, text):
    assert describe(labels, classes) == text
