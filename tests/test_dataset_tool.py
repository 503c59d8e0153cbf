# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py: what each option does to what is written, and that nothing is written where it says so."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import dataset_tool
from training import data_convert
from training.data_images import Recipe, make_picture
from training.data_labels import find_labels
from training.data_sources import open_source
from training.dataset import ImageFolderDataset

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZE = (40, 48)  # height, width of the pictures here


def pixels(i, shape=(*SIZE, 3)):
    return np.random.RandomState(i).randint(256, size=shape).astype(np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Seven pictures in two folders."""
    for i in range(7):
        save(tmp_path / "photos" / ("dogs" if i < 3 else "cats") / f"{i}.png", pixels(i))
    return tmp_path / "photos"


ORDER = [3, 4, 5, 6, 0, 1, 2]  # cats before dogs


@pytest.fixture
def run(tmp_path, photos):
    """Converts `photos` (or another --source) and returns (what was written, output)."""

    def call(*args, source=photos, dest="set.zip", ok=True):
        dest = str(tmp_path / dest)
        result = CliRunner().invoke(
            dataset_tool.main, [f"--source={source}", f"--dest={dest}", *map(str, args)]
        )
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert (result.exit_code == 0) == ok, result.output
        return dest if ok else None, result.output

    return call


def read(dest):
    """(name -> pixels in order, dataset.json)"""
    with zipfile.ZipFile(dest) as archive:
        names = archive.namelist()
        assert names[-1] == "dataset.json"
        images = {}
        for name in names[:-1]:
            with PIL.Image.open(io.BytesIO(archive.read(name))) as image:
                images[name] = np.array(image)
        return images, json.loads(archive.read("dataset.json"))


def leftovers(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


# ----------------------------------------------------------------------------------------
# Layout


def test_a_zip_of_the_familys_layout(run, photos):
    dest, output = run()
    images, info = read(dest)
    assert list(images) == [f"00000/img{i:08d}.png" for i in range(7)]
    for (_, image), i in zip(images.items(), ORDER, strict=True):
        np.testing.assert_array_equal(image, pixels(i))
    assert info["labels"] is None
    with zipfile.ZipFile(dest) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # not today
    assert "Found     RGB 7\n" in output and f"{dest}: 7 pictures, 48x40, rgb\nLabels    none\n" in output


def test_a_folder_holds_the_same_files(run, tmp_path):
    zipped, _ = run()
    (tmp_path / "empty").mkdir()
    for name in ["new/deeper", "empty"]:
        dest, _ = run(dest=name)
        with zipfile.ZipFile(zipped) as archive:
            for entry in archive.namelist():
                with open(os.path.join(dest, entry), "rb") as f:
                    assert f.read() == archive.read(entry)
        assert sum(len(files) for _, _, files in os.walk(dest)) == 8
    assert leftovers(tmp_path) == ["empty", "new", "photos", "set.zip"]
    assert leftovers(tmp_path / "new") == ["deeper"]


def test_training_reads_the_result(run):
    for dest in ["set.zip", "folder"]:
        path, _ = run("--labels=folders", "--resolution=32x32", "--transform=center-crop", dest=dest)
        data = ImageFolderDataset(path, resolution=32, use_labels=True)
        assert len(data) == 7 and data.label_dim == 2
        assert [int(data.get_details(i).raw_label) for i in range(7)] == [0, 0, 0, 0, 1, 1, 1]


def test_names_count_thousands_by_folder(run, tmp_path):
    """Index 1000 lies in the folder of the first five of its eight digits."""
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        stream = io.BytesIO()
        PIL.Image.fromarray(pixels(0, (4, 4))).save(stream, "png")
        for i in range(1001):
            archive.writestr(f"{i:05d}.png", stream.getvalue())
    images, _ = read(run(source=tmp_path / "many.zip")[0])
    assert list(images)[999:] == ["00000/img00000999.png", "00001/img00001000.png"]


def test_the_same_call_writes_the_same_bytes(run):
    sums = set()
    for i, workers in enumerate([1, 1, 4]):
        dest, _ = run(f"--workers={workers}", "--resolution=16x16", dest=f"{i}.zip")
        with open(dest, "rb") as f:
            sums.add(hashlib.sha256(f.read()).hexdigest())
    assert len(sums) == 1


def test_no_more_is_read_than_the_threads_need(tmp_path, photos):
    """Reading a whole data set before the first picture is written would fill the memory."""
    opened = []
    with open_source(str(photos)) as source:
        one, source.names = source.names[0], [source.names[0]] * 500

        def opening(name):
            opened.append(name)
            return open(photos / one, "rb")

        source.open = opening
        recipe = Recipe(channels="rgb", width=33)  # a size that is refused at the first picture
        with pytest.raises(ValueError, match="choose a size"):
            data_convert.convert(source, str(tmp_path / "x.zip"), recipe, find_labels(source), workers=2)
    assert len(opened) < 15


def test_max_images_takes_the_first(run):
    images, info = read(run("--max-images=3")[0])
    for (_, image), i in zip(images.items(), ORDER[:3], strict=True):
        np.testing.assert_array_equal(image, pixels(i))
    assert (info["made_by"]["max_images"], info["made_by"]["count"]) == (3, 3)


# ----------------------------------------------------------------------------------------
# Sizes, filters, channels


@pytest.mark.parametrize("args", [["--width=24", "--height=20"], ["--resolution=24x20"]])
@pytest.mark.parametrize("resample", ["box", "lanczos", None])
def test_size_and_filter(run, args, resample):
    images, info = read(run(*args, *([f"--resize-filter={resample}"] if resample else []))[0])
    kind = getattr(PIL.Image.Resampling, (resample or "lanczos").upper())
    for (_, image), i in zip(images.items(), ORDER, strict=True):
        np.testing.assert_array_equal(image, PIL.Image.fromarray(pixels(i)).resize((24, 20), kind))
    made_by = info["made_by"]
    assert (made_by["width"], made_by["height"], made_by["resize_filter"]) == (24, 20, resample or "lanczos")
    assert (made_by["resized"], made_by["stretched"], made_by["transform"]) == (7, 0, None)


def test_stretching_is_said(run):
    dest, output = run("--resolution=32x32")
    assert "7 stretched to other proportions (--transform=center-crop would keep them)" in output
    assert read(dest)[1]["made_by"]["stretched"] == 7


@pytest.mark.parametrize(
    "size, part", [("32x32", np.s_[:, 4:44]), ("40x40", np.s_[:, 4:44]), ("16x32", np.s_[:, 14:34])]
)
def test_center_crop(run, size, part):
    dest, output = run("--transform=center-crop", f"--resolution={size}")
    images, info = read(dest)
    width, height = map(int, size.split("x"))
    for (_, image), i in zip(images.items(), ORDER, strict=True):
        expected = PIL.Image.fromarray(pixels(i)[part]).resize((width, height), PIL.Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, expected)
    assert info["made_by"]["transform"] == "center-crop" and "stretched" not in output


def test_center_crop_wide(run, photos):
    save(photos / "cats" / "narrow.png", pixels(8, (40, 39, 3)))
    dest, output = run("--transform=center-crop-wide", "--width=40", "--height=30")
    images, info = read(dest)
    assert len(images) == 7 and list(images)[-1] == "00000/img00000007.png"  # the one left out leaves a gap
    assert "00000/img00000004.png" not in images
    assert "Left out  smaller than the result: 1 (cats/narrow.png)" in output
    rows = pixels(3)[3:36]  # round(40 * 40 / 48) = 33 rows
    expected = PIL.Image.fromarray(rows).resize((40, 30), PIL.Image.Resampling.LANCZOS)
    first = images["00000/img00000000.png"]
    assert first.shape == (40, 40, 3) and not first[:5].any() and not first[35:].any()
    np.testing.assert_array_equal(first[5:35], expected)
    assert info["made_by"]["too_small"] == 1


@pytest.mark.parametrize("transform", ["center-crop", "center-crop-wide"])
@pytest.mark.parametrize("size", [[], ["--width=32"], ["--height=32"]])
def test_transforms_need_both_sides(run, tmp_path, transform, size):
    _, output = run(f"--transform={transform}", *size, ok=False)
    assert f"Error: must specify --width and --height when using {transform} transform" in output
    assert leftovers(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--resolution=1000x1000"], "992x992 would do"),
        (["--width=2", "--height=32"], "pictures must be at least 4 pixels a side, not 2x32"),
        (
            ["--width=33"],
            "cats/3.png: pictures of 33x40 pixels .* would do; choose a size with --width and --height",
        ),
        (["--transform=center-crop-wide", "--width=1000", "--height=4"], "1000x1000 pixels"),
        (
            ["--transform=center-crop-wide", "--width=32", "--height=48"],
            "--height=48 is more than --width=32",
        ),
    ],
)
def test_sizes_that_no_network_makes(run, tmp_path, args, message):
    _, output = run(*args, ok=False)
    assert re.search(f"^Error: .*{message}", output)
    assert leftovers(tmp_path) == ["photos"]


def test_resolution_or_sides_not_both(run):
    for args, message in [
        (["--resolution=32x32", "--width=32"], "--resolution says both --width and --height"),
        (["--resolution=32"], "'32' is not like 256x256"),
        (["--resolution=0x4"], "'0x4' is not like 256x256"),
        (["--width=0"], "0 is not in the range x>=1"),
    ]:
        assert message in run(*args, ok=False)[1]


def test_channels(run, tmp_path):
    grey = tmp_path / "grey"
    save(grey / "a.png", pixels(0, SIZE))
    save(grey / "b.png", np.dstack([pixels(1, SIZE), np.full(SIZE, 255, np.uint8)]))
    mixed = tmp_path / "mixed"
    save(mixed / "a.png", pixels(0, SIZE))
    save(mixed / "b.png", pixels(1))
    for i, (source, args, shape, word) in enumerate(
        [
            (grey, [], (40, 48), "grey"),
            (grey, ["--background=red"], (40, 48, 3), "rgb"),  # which b.png is on
            (grey, ["--channels=rgb"], (40, 48, 3), "rgb"),
            (mixed, [], (40, 48, 3), "rgb"),
            (mixed, ["--channels=grey"], (40, 48), "grey"),
        ]
    ):
        images, info = read(run(*args, source=source, dest=f"{i}.zip")[0])
        assert {image.shape for image in images.values()} == {shape}
        assert info["made_by"]["channels"] == word
        first = images["00000/img00000000.png"].reshape(*SIZE, -1)
        np.testing.assert_array_equal(first, np.repeat(pixels(0, SIZE)[..., None], first.shape[-1], -1))
    luma = pixels(1) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(images["00000/img00000001.png"].astype(float), luma, atol=0.6)


@pytest.mark.parametrize(
    "args, colour",
    [([], (255, 255, 255)), (["--background=#102030"], (16, 32, 48)), (["--background=navy"], (0, 0, 128))],
)
def test_background(run, tmp_path, args, colour):
    save(tmp_path / "icons" / "a.png", np.zeros([8, 8, 4], np.uint8))
    dest, output = run(*args, source=tmp_path / "icons")
    images, info = read(dest)
    assert (images["00000/img00000000.png"] == colour).all()
    assert info["made_by"]["background"] == list(colour) and info["made_by"]["transparent"] == 1
    assert "1 with transparency, put on #" + bytes(colour).hex() in output


def test_background_must_be_a_colour(run):
    assert (
        "'nocolour' is no colour: use a name such as white, or #rrggbb"
        in run("--background=nocolour", ok=False)[1]
    )


def test_what_was_found_is_counted(run, tmp_path, photos):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    save(photos / "turned.png", pixels(7).swapaxes(0, 1).copy(), exif=exif)
    save(photos / "deep.png", np.full(SIZE, 65535, np.uint16))
    PIL.Image.fromarray(pixels(8)).convert("P").save(photos / "few.png")
    (photos / "._few.png").write_bytes(b"macOS")
    (photos / "photo.heic").write_bytes(b"")
    dest, output = run()
    assert (
        "Found     RGB 8, 16-bit grey 1, palette 1\n" in output or "RGB 8, palette 1, 16-bit grey 1" in output
    )
    assert "1 turned upright, as their EXIF data says" in output
    assert "Left out  not pictures, by their names: .heic 1\n" in output
    made_by = read(dest)[1]["made_by"]
    assert made_by["source_kinds"] == {"RGB": 8, "16-bit grey": 1, "palette": 1}
    assert (made_by["turned"], made_by["first_frame"], made_by["skipped"]) == (1, 0, [])
    assert (made_by["source"], made_by["source_name"], made_by["tool"]) == (
        "folder",
        "photos",
        "dataset_tool.py",
    )


# ----------------------------------------------------------------------------------------
# Pictures that cannot be used


@pytest.fixture
def bad(photos):
    """Four of eleven pictures cannot be used."""
    whole = (photos / "cats" / "4.png").read_bytes()
    (photos / "cats" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dogs" / "text.jpg").write_bytes(b"no picture")
    save(photos / "dogs" / "small.png", pixels(9, (8, 8, 3)))
    (photos / "zzz.gif").write_bytes(b"")
    return ["cats/cut.png", "dogs/small.png", "dogs/text.jpg", "zzz.gif"]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dest", ["set.zip", "set"])
def test_all_bad_files_are_listed_and_nothing_is_written(run, bad, tmp_path, workers, dest):
    _, output = run(f"--workers={workers}", dest=dest, ok=False)
    head, *lines = output.splitlines()
    assert head == (
        "Error: 4 of 11 pictures cannot be used; nothing was written (--on-error=skip leaves them out):"
    )
    assert len(lines) == 4 and lines[0].startswith("  cats/cut.png: damaged (")
    assert lines[1:] == [
        "  dogs/text.jpg: not a picture of a known format",
        "  zzz.gif: not a picture of a known format",
        "  1 (dogs/small.png): Image dogs/small.png attributes must be equal across all images of the dataset."
        "  Got: 8x8 pixels, and 48x40 of cats/3.png; --width and --height give all one size",
    ]
    assert leftovers(tmp_path) == ["photos"]


def test_skipping_leaves_them_out_and_says_so(run, bad):
    dest, output = run("--on-error=skip")
    images, info = read(dest)
    assert [int(name[-12:-4]) for name in images] == [0, 1, 2, 3, 5, 6, 7]  # cut.png is number 4
    for image, i in zip(images.values(), ORDER, strict=True):
        np.testing.assert_array_equal(image, pixels(i))
    assert "Skipped   4:" in output and all(f"{name}: " in output for name in bad if "small" not in name)
    assert "1 (dogs/small.png): Image dogs/small.png attributes" in output
    assert sorted(info["made_by"]["skipped"]) == bad and info["made_by"]["count"] == 7


def test_mistakes_that_concern_many_are_one_line(run, photos):
    for i in range(5):
        save(photos / "birds" / f"{i}.png", pixels(i, (8, 8, 3)))
    _, output = run("--max-images=3", "--on-error=skip")
    assert output.startswith("Found     RGB 3\n")
    _, output = run(dest="b.zip", ok=False)
    assert len(output.splitlines()) == 2
    assert (
        "7 of 12 pictures" in output
        and "  7 (cats/3.png, cats/4.png, cats/5.png, ...): Image cats/3.png" in output
    )
    assert "Got: 48x40 pixels, and 8x8 of birds/0.png" in output


def test_resizing_makes_the_small_one_usable(run, bad):
    assert "Error: 3 of 11 pictures" in run("--resolution=32x32", ok=False)[1]


@pytest.mark.parametrize("on_error", ["skip", "fail"])
def test_nothing_left(run, tmp_path, on_error):
    save(tmp_path / "tiny" / "a.png", pixels(0))
    args = ["--transform=center-crop-wide", "--width=64", "--height=32", f"--on-error={on_error}"]
    _, output = run(*args, source=tmp_path / "tiny", ok=False)
    assert output == "Error: No picture is left: 1 are too small, 0 cannot be used\n"
    (tmp_path / "tiny" / "a.png").write_bytes(b"no picture")
    _, output = run(*args, source=tmp_path / "tiny", ok=False)
    last = (
        " (--on-error=skip leaves them out):" if on_error == "fail" else "0 are too small, 1 cannot be used"
    )
    assert output.endswith(last + "\n  a.png: not a picture of a known format\n")
    assert leftovers(tmp_path) == ["photos", "tiny"]


@pytest.mark.parametrize("limit, usable", [(1500, True), (900, False)])
def test_large_pictures_pass_and_bombs_do_not(run, monkeypatch, limit, usable):
    """Pillow warns above its limit and refuses above twice its limit; 48x40 pixels are 1920."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    _, output = run(ok=usable)
    if not usable:
        assert (
            "  cats/3.png: too large to be safe: Image size (1920 pixels) exceeds limit of 1800 pixels"
            in output
        )
    assert len(output.splitlines()) == (3 if usable else 8)


def test_a_damaged_zip_entry_is_a_bad_file(run, tmp_path):
    dest, _ = run()
    with open(dest, "rb") as f:
        data = bytearray(f.read())
    data[3000] ^= 255  # within the first picture
    (tmp_path / "damaged.zip").write_bytes(data)
    _, output = run(source=tmp_path / "damaged.zip", dest="other.zip", ok=False)
    assert "1 of 7 pictures" in output and "img00000000.png: cannot be read (Bad CRC-32" in output


# ----------------------------------------------------------------------------------------
# Labels


def labels(dest):
    return [label for _, label in read(dest)[1]["labels"]]


def test_labels_from_folders(run, photos):
    dest, output = run("--labels=folders")
    info = read(dest)[1]
    assert info["labels"] == [[f"00000/img{i:08d}.png", int(i > 3)] for i in range(7)]
    assert info["classes"] == {"cats": 0, "dogs": 1} and info["made_by"]["labels"] == "folders"
    assert "Labels    2 classes (cats, dogs)\n" in output
    save(photos / "stray.png", pixels(8))
    _, output = run("--labels=folders", dest="b.zip", ok=False)
    assert "1 of 8 pictures" in output and "1 (stray.png): no label\n" in output
    dest, _ = run("--labels=folders", "--on-error=skip", dest="b.zip")
    assert labels(dest) == [0, 0, 0, 0, 1, 1, 1]


def table(path, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


def test_labels_from_a_table(run, tmp_path):
    names = [f"{'dogs' if i < 3 else 'cats'}/{i}.png" for i in range(7)]
    rows = [["file", "coat", "age"], *([name, ["red", "black"][i % 2], i] for i, name in enumerate(names))]
    path = table(tmp_path / "t.csv", [*rows, ["old.png", "grey", 1]])
    assert (
        "t.csv has the columns file, coat, age: choose with --label-column"
        in run(f"--labels={path}", ok=False)[1]
    )
    dest, output = run(f"--labels={path}", "--label-column=coat")
    info = read(dest)[1]
    assert info["classes"] == {"black": 0, "grey": 1, "red": 2}
    assert labels(dest) == [0 if i % 2 else 2 for i in ORDER]
    assert info["made_by"]["labels"] == "t.csv, column coat"
    assert "Unused    rows of the table that no picture has: 1 (old.png)" in output
    assert "Labels    3 classes (black, grey, red), of which 1 have no picture" in output

    dest, output = run(f"--labels={path}", "--label-column=age", dest="age.zip")
    assert labels(dest) == ORDER and "classes" not in read(dest)[1]
    dest, output = run(f"--labels={path}", "--label-column=age,age", dest="vector.zip")
    assert labels(dest) == [[i, i] for i in ORDER] and "Labels    vectors of length 2" in output

    _, output = run(f"--labels={table(path, rows[:-2])}", "--label-column=coat", dest="c.zip", ok=False)
    assert "2 of 7 pictures" in output
    assert "\n  2 (cats/5.png, cats/6.png): no label\n" in output
    assert "No such file or directory" in run("--labels=nowhere.csv", dest="c.zip", ok=False)[1]


def test_labels_of_the_source(run, photos, tmp_path):
    first, _ = run("--labels=folders", "--resolution=32x32", "--resize-filter=box")
    dest, output = run(source=first, dest="again.zip")
    info = read(dest)[1]
    assert labels(dest) == [0, 0, 0, 0, 1, 1, 1] and info["classes"] == {"cats": 0, "dogs": 1}
    assert info["made_by"]["labels"] == "dataset.json"
    assert info["source_made_by"] == read(first)[1]["made_by"]  # how the source was made is not forgotten

    known = [["dogs/0.png", 1], ["dogs\\1.png", 1], ["dogs/2.png", 1]]
    (photos / "dataset.json").write_text(json.dumps({"labels": known}))
    dest, output = run(dest="some.zip")
    assert read(dest)[1]["labels"] is None
    missing = "4 (cats/3.png, cats/4.png, cats/5.png, ...)"
    assert f"Labels    none\n          (dataset.json lacks {missing}; all must have one)" in output


# ----------------------------------------------------------------------------------------
# Nothing is overwritten, nothing is half written


def test_existing_files_stay(run, tmp_path):
    (tmp_path / "set.zip").write_bytes(b"precious")
    (tmp_path / "set").write_bytes(b"precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "folder.zip").mkdir()
    for name in ["set.zip", "set", "folder.zip"]:
        output = run(dest=name, ok=False)[1]
        assert f"Error: --dest: {tmp_path / name} exists already; delete it or give another name\n" == output
    assert run(dest="full", ok=False)[1] == "Error: --dest folder must be empty\n"
    assert (tmp_path / "set.zip").read_bytes() == (tmp_path / "set").read_bytes() == b"precious"


def test_places_that_cannot_be_written_to(run, tmp_path, monkeypatch):
    output = run(dest="photos/new", ok=False)[1]
    assert (
        output == f"Error: --dest: {tmp_path / 'photos/new'} lies in --source, whose pictures it would join\n"
    )
    run(dest="photos/new.zip")  # is no picture
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("mounted"))
    assert "is a mount point and cannot be replaced; name a folder in it" in run(dest="mounted", ok=False)[1]
    (tmp_path / "file").touch()
    assert run(dest="file/set.zip", ok=False)[1].startswith("Error: [Errno ")


@pytest.mark.parametrize("dest", ["set.zip", "set", "empty"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(run, tmp_path, monkeypatch, dest, error):
    (tmp_path / "empty").mkdir()
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return make_picture(*args)

    monkeypatch.setattr(data_convert, "make_picture", interrupted)
    _, output = run("--workers=1", dest=dest, ok=False)
    assert len(calls) >= 5 and ("Aborted!" in output or "Error: No space left on device" in output)
    assert leftovers(tmp_path) == ["empty", "photos"] and not os.listdir(tmp_path / "empty")


def test_messages_of_the_family(run, tmp_path):
    missing = tmp_path / "nowhere"
    assert run(source=missing, ok=False)[1] == f"Error: Missing input file or directory: {missing}\n"
    result = CliRunner().invoke(dataset_tool.main, ["--source=x", "--dest="])
    assert result.exit_code == 2
    assert "--dest output filename or directory must not be an empty string" in result.output


# ----------------------------------------------------------------------------------------
# The command itself


def test_progress_is_for_terminals(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert "Converting" not in run()[1]
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with dataset_tool.progress(list("abc")) as shown:
        assert list(shown) == list("abc")
    assert "Converting" in screen.getvalue() and "3/3" in screen.getvalue()


def test_every_option_is_explained_and_help_is_instant():
    """--help imports neither PyTorch nor NumPy nor Pillow."""
    code = (
        "import sys, dataset_tool\n"
        "from click.testing import CliRunner\n"
        "print(CliRunner().invoke(dataset_tool.main, ['--help']).output)\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'imported'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for param in dataset_tool.main.params:
        assert param.opts[0] in result.stdout and param.help


def test_converting_needs_no_torch(run, photos, tmp_path):
    code = (
        "import sys, dataset_tool\n"
        f"dataset_tool.main([r'--source={photos}', r'--dest={tmp_path / 'x.zip'}'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_commands_of_the_document(run, photos, tmp_path, monkeypatch):
    """Those in docs/data.md, on pictures made here under the names that it uses."""
    with open(os.path.join(ROOT, "docs", "data.md"), encoding="utf-8") as f:
        commands = re.findall(r"^    python dataset_tool.py (.*)$", f.read(), re.M)
    monkeypatch.chdir(tmp_path)
    run(dest="faces64.zip")
    shutil.copytree(photos, "animals")
    names = read("faces64.zip")[0]
    table(tmp_path / "faces64.csv", [["file", "skin", "hair_color"], *([name, "x", "red"] for name in names)])
    assert len(commands) == 4
    for command in commands:
        result = CliRunner().invoke(dataset_tool.main, command.split())
        assert result.exit_code == 0, result.output
    assert labels("animals.zip") == [0, 0, 0, 0, 1, 1, 1] and labels("hair.zip") == [0] * 7
    assert read("wide.zip")[0]["00000/img00000000.png"].shape == (192, 256, 3)
