# SPDX-License-Identifier: Apache-2.0
"""Order, subsets, mirroring, labels and the refusal of unusable files, on folders and zips made here."""

import io
import json
import multiprocessing
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from training import dataset
from training.dataset import Dataset, ImageFolderDataset

DEMO = Path(__file__).parents[2] / "demo" / "lorelei32.zip"


def encoded(array, kind="png", **options):
    stream = io.BytesIO()
    PIL.Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def pictures(count, shape=(8, 8, 3), seed=0):
    return np.random.RandomState(seed).randint(256, size=[count, *shape]).astype(np.uint8)


def folder(path, count=10, labels=None, shape=(8, 8, 3)):
    """A folder of pictures whose order by name is that of `pictures`."""
    for i, array in enumerate(pictures(count, shape)):
        name = path / f"0000{i % 2}" / f"img{i:08d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(encoded(array))
    if labels is not None:
        (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return path


def names(count):
    return [f"0000{i % 2}/img{i:08d}.png" for i in range(count)]


def zipped(path, source=None, **entries):
    with zipfile.ZipFile(path, "w") as z:
        for name in sorted(source.rglob("*.*")) if source else []:
            z.write(name, name.relative_to(source).as_posix())
        for name, data in entries.items():
            z.writestr(name.replace("__", "."), data)
    return path


class Numbers(Dataset):
    """Ten one-pixel-high images that hold their own index."""

    def __init__(self, labels=None, **kwargs):
        self.labels = labels
        super().__init__(name="numbers", raw_shape=[10, 1, 1, 3], **kwargs)

    def _load_raw_image(self, raw_idx):
        return np.array([[[raw_idx, 0, 255]]], dtype=np.uint8)

    def _load_raw_labels(self):
        return self.labels


def test_subset_is_the_published_one_and_sorted():
    data = Numbers(max_size=4)
    assert [data.get_details(i).raw_idx for i in range(len(data))] == [2, 4, 8, 9]
    other = Numbers(max_size=4, random_seed=1)
    expected = np.arange(10)
    np.random.RandomState(1).shuffle(expected)
    assert [other[i][0][0, 0, 0] for i in range(4)] == sorted(expected[:4])
    assert len(Numbers(max_size=10)) == len(Numbers(max_size=99)) == 10
    with pytest.raises(ValueError, match="max_size must be at least 1, got 0"):
        Numbers(max_size=0)


def test_mirrored_copies_follow_the_originals():
    data = Numbers(max_size=4, xflip=True)
    assert len(data) == 8
    for i in range(4):
        assert data.get_details(i).xflip is False and data.get_details(i + 4).xflip is True
        np.testing.assert_array_equal(data[i + 4][0], data[i][0][:, :, ::-1])
        assert data.get_details(i + 4).raw_idx == data.get_details(i).raw_idx


def test_items_are_copies():
    data = Numbers(np.ones([10, 2], dtype=np.float32), use_labels=True)
    image, label = data[3]
    image[:], label[:] = 7, 7
    assert data[3][0][0, 0, 0] == 3 and data[3][1].tolist() == [1, 1]
    assert data[3][0].flags.c_contiguous and data[3][0].dtype == np.uint8


def test_labels_of_every_kind():
    classes = Numbers(np.array([0, 2, 1, 0, 0, 0, 0, 0, 0, 4]), use_labels=True, xflip=True)
    assert classes.label_shape == [5] and classes.label_dim == 5
    assert classes.has_labels and classes.has_onehot_labels
    assert classes[11][1].tolist() == [0, 0, 1, 0, 0] and classes[11][1].dtype == np.float32
    assert classes.get_details(11).raw_label == 2

    vectors = Numbers(np.arange(20, dtype=np.float32).reshape(10, 2), use_labels=True)
    assert vectors.label_dim == 2 and vectors.has_labels and not vectors.has_onehot_labels
    assert vectors.get_label(3).tolist() == [6, 7]

    matrices = Numbers(np.zeros([10, 2, 2], dtype=np.float32), use_labels=True)
    with pytest.raises(ValueError, match=r"shape \[2, 2\]; they must be vectors"):
        _ = matrices.label_dim

    for unlabelled in (Numbers(), Numbers(np.arange(10)), Numbers(use_labels=True)):
        assert unlabelled.has_labels is False and unlabelled.label_shape == [0]
        assert unlabelled.label_dim == 0 and unlabelled[0][1].shape == (0,)


def test_images_of_another_shape_than_promised_are_our_mistake():
    data = Numbers()
    data._raw_shape = [10, 1, 1, 4]
    with pytest.raises(AssertionError):
        data[0]


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (4, 8, 3)])
def test_folder_and_zip_give_the_same_pixels_in_the_order_of_names(tmp_path, as_zip, shape):
    path = folder(tmp_path / "faces", shape=shape)
    (path / "notes.txt").write_text("not a picture")
    for hidden in (
        "00000/._img00000000.png",
        ".ipynb_checkpoints/0.png",
        "__MACOSX/00000/1.png",
        "00000/.git/2.png",
    ):
        (path / hidden).parent.mkdir(exist_ok=True, parents=True)
        (path / hidden).write_text("not a picture either")
    if as_zip:
        path = zipped(tmp_path / "faces.ZIP", path)
    data = ImageFolderDataset(str(path))
    order = sorted(range(10), key=lambda i: names(10)[i])
    expected = pictures(10, shape).reshape(10, *shape[:2], -1).transpose(0, 3, 1, 2)[order]
    assert data.name == "faces" and len(data) == 10
    assert data.image_shape == list(expected.shape[1:]) and data.num_channels == expected.shape[1]
    np.testing.assert_array_equal(np.stack([data[i][0] for i in range(10)]), expected)
    assert data.resolution == 8  # the longer side
    assert ImageFolderDataset(str(path), resolution=8).resolution == 8
    with pytest.raises(OSError, match="resolution is 4"):
        ImageFolderDataset(str(path), resolution=4)


def test_pillow_alone_decodes_the_same_pixels(tmp_path, monkeypatch):
    path = folder(tmp_path / "faces")
    fast = [image for image, _ in ImageFolderDataset(path)]
    monkeypatch.setattr(dataset, "pyspng", None)
    np.testing.assert_array_equal(fast, [image for image, _ in ImageFolderDataset(path)])


def test_other_formats_are_read(tmp_path):
    gradient = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], [32, 32, 3]).copy()
    for name, options in [("a.bmp", {}), ("b.JPEG", {"quality": 95}), ("c.webp", {"lossless": True})]:
        PIL.Image.fromarray(gradient).save(tmp_path / name, **options)
    data = ImageFolderDataset(tmp_path, resolution=32)
    for (image, _), tolerance in zip(data, [0, 3, 0], strict=True):
        np.testing.assert_allclose(image.transpose(1, 2, 0).astype(int), gradient.astype(int), atol=tolerance)


@pytest.mark.parametrize("as_zip", [False, True])
def test_labels_come_from_dataset_json(tmp_path, as_zip):
    classes = [[name.replace("/", "\\"), i // 4] for i, name in enumerate(names(10))]  # as Windows wrote some
    path = folder(tmp_path / "faces", labels=classes)
    if as_zip:
        path = zipped(tmp_path / "faces.zip", path)
    data = ImageFolderDataset(path, use_labels=True)
    order = sorted(range(10), key=lambda i: names(10)[i])
    assert [int(data.get_details(i).raw_label) for i in range(10)] == [i // 4 for i in order]
    assert data.has_onehot_labels and data.label_dim == 3
    assert not ImageFolderDataset(path).has_labels  # not asked for

    vectors = ImageFolderDataset(
        folder(tmp_path / "vectors", labels=[[name, [i, 0.5]] for i, name in enumerate(names(10))]),
        use_labels=True,
    )
    assert vectors.label_dim == 2 and vectors.get_label(1).tolist() == [order[1], 0.5]


def test_null_or_missing_labels_mean_none(tmp_path):
    assert not ImageFolderDataset(folder(tmp_path / "a"), use_labels=True).has_labels
    path = folder(tmp_path / "b")
    (path / "dataset.json").write_text('{"labels": null}')
    assert not ImageFolderDataset(path, use_labels=True).has_labels


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "dataset.json of .* must read"),
        ("[1, 2]", "dataset.json of .* must read"),
        ("[" * 100_000, "dataset.json of .* must read"),
        ('{"labels": [["00000/img00000000.png", 1048576]]}', "must be below 1,048,576, got 1048576"),
        ('{"labels": [1, 2]}', "dataset.json of .* must read"),
        ('{"labels": [["00000/img00000000.png", -1]]}', "whole numbers from 0 on, got -1"),
        ('{"labels": [["00000/img00000000.png", 1.5]]}', "whole numbers from 0 on, got 1.5"),
        ('{"labels": [["00000/img00000000.png", "cat"]]}', "all classes .* got 'cat'"),
        ('{"labels": [["00000/img00000000.png", null]]}', "all classes .* got None"),
    ],
)
def test_unusable_labels_say_why(tmp_path, text, message):
    path = folder(tmp_path / "faces", count=1)
    (path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        _ = ImageFolderDataset(path, use_labels=True).has_labels


def test_every_image_needs_a_label(tmp_path):
    path = folder(tmp_path / "faces", count=2, labels=[[names(2)[0], 0]])
    for error in (KeyError, ValueError):
        with pytest.raises(error) as info:
            _ = ImageFolderDataset(path, use_labels=True).label_shape
        assert str(info.value).endswith("has no label for '00001/img00000001.png'")


def test_labels_of_different_lengths_are_refused(tmp_path):
    path = folder(tmp_path / "faces", count=2, labels=[[names(2)[0], [1, 2]], [names(2)[1], [1]]])
    with pytest.raises(ValueError, match="all lists of numbers of one length"):
        _ = ImageFolderDataset(path, use_labels=True).label_shape


def test_paths_that_hold_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.zip", tmp_path / "notes.txt"):
        with pytest.raises(IOError, match="^Path must point to a directory or zip"):
            ImageFolderDataset(path)
    with pytest.raises(IOError, match="^No image files found in the specified path"):
        ImageFolderDataset(tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"PK but no zip")
    with pytest.raises(IOError, match="Cannot read '.*broken.zip': File is not a zip file"):
        ImageFolderDataset(tmp_path / "broken.zip")


def test_resolution_must_match(tmp_path):
    with pytest.raises(IOError, match="^Image files do not match the specified resolution.* 8x8, .* is 16$"):
        ImageFolderDataset(folder(tmp_path / "faces"), resolution=16)


def test_an_image_of_another_size_is_named(tmp_path):
    path = folder(tmp_path / "faces", count=2)
    (path / "00002.png").write_bytes(encoded(pictures(1, (8, 16, 3))[0]))
    with pytest.raises(IOError, match=r"'00002.png' has \[3, 8, 16\], .* has \[3, 8, 8\]$"):
        ImageFolderDataset(path)[2]


def sixteen_bit_rgb():
    """A 1x1 PNG with 16 bits a channel, which Pillow would silently cut to 8."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + bytes(6))
    return dataset.PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def palette():
    stream = io.BytesIO()
    PIL.Image.fromarray(pictures(1)[0]).convert("P").save(stream, "png")
    return stream.getvalue()


def cmyk():
    stream = io.BytesIO()
    PIL.Image.fromarray(pictures(1)[0]).convert("CMYK").save(stream, "jpeg")
    return stream.getvalue()


UNUSABLE = {
    "palette.png": (palette(), "8-bit palette PNG"),
    "alpha.png": (encoded(pictures(1, (8, 8, 4))[0]), "8-bit RGBA PNG"),
    "deep.png": (sixteen_bit_rgb(), "16-bit RGB PNG"),
    "deepgrey.png": (encoded(np.zeros([8, 8], dtype=np.uint16)), "16-bit grey PNG"),
    "bits.png": (encoded(np.zeros([8, 8], dtype=bool)), "1-bit grey PNG"),
    "print.jpg": (cmyk(), "mode is CMYK"),
    "cut.png": (encoded(pictures(1)[0])[:100], "not a readable image"),
    "short.png": (encoded(pictures(1)[0])[:20], "not a readable image"),
    "cut.jpg": (encoded(pictures(1)[0], "jpeg")[:100], "not a readable image"),
    "empty.png": (b"", "not a readable image"),
    "text.png": (b"no picture", "not a readable image"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("decoder", ["any", "pillow"])
def test_unusable_images_are_named_in_one_line(tmp_path, monkeypatch, name, decoder):
    data, reason = UNUSABLE[name]
    if decoder == "pillow":
        monkeypatch.setattr(dataset, "pyspng", None)
    with pytest.raises(IOError, match=f"^Image '{name}' in '.*' cannot be used: .*{reason}[^\n]*$"):
        ImageFolderDataset(zipped(tmp_path / "faces.zip", **{name.replace(".", "__"): data}))


def test_a_damaged_zip_entry_is_an_ioerror(tmp_path):
    path = zipped(tmp_path / "faces.zip", a__png=encoded(pictures(1)[0]))
    damaged = bytearray(path.read_bytes())
    damaged[80] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(IOError, match="Cannot read 'a.png' in .*: Bad CRC-32"):
        ImageFolderDataset(path)


@pytest.mark.parametrize(
    "place,value,message",
    [(6, 1, "encrypted"), (8, 9, "compression"), (35, 7, "Error -3 while decompressing")],
)
def test_zip_entries_that_python_cannot_unpack_are_ioerrors(tmp_path, place, value, message):
    """Encrypted ones, Deflate64, which Windows writes, and damage that shows before the checksum."""
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", encoded(pictures(1)[0]))
    data = bytearray(path.read_bytes())
    data[place] = value  # of the entry's header or data
    if place < 30:
        data[data.index(b"PK\x01\x02") + place + 2] = value  # of the directory
    path.write_bytes(data)
    with pytest.raises(OSError, match=f"Cannot read 'a.png' in .*{message}"):
        ImageFolderDataset(path)


def test_pickling_leaves_handles_and_caches_behind(tmp_path):
    path = zipped(tmp_path / "faces.zip", folder(tmp_path / "faces", labels=[[n, 1] for n in names(10)]))
    data = ImageFolderDataset(path, use_labels=True, max_size=3, xflip=True)
    assert data.label_dim == 2 and data._zip is not None
    clone = pickle.loads(pickle.dumps(data))
    assert clone._zip is None and clone._raw_labels is None
    for (image, label), (image2, label2) in zip(data, clone, strict=True):
        np.testing.assert_array_equal(image, image2)
        np.testing.assert_array_equal(label, label2)


def test_close_and_read_on(tmp_path):
    data = ImageFolderDataset(zipped(tmp_path / "faces.zip", folder(tmp_path / "faces")))
    before = data[0][0]
    data.close()
    data.close()
    np.testing.assert_array_equal(data[0][0], before)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the platform has no fork")
def test_another_process_opens_its_own_zip(tmp_path, monkeypatch):
    """A forked worker that used its parent's handle would move the parent's file position."""
    data = ImageFolderDataset(zipped(tmp_path / "faces.zip", folder(tmp_path / "faces")))
    mine = data._get_zip()
    assert data._get_zip() is mine
    monkeypatch.setattr(dataset.os, "getpid", lambda: -1)
    theirs = data._get_zip()
    assert theirs is not mine and data._get_zip() is theirs
    mine.close()


def test_works_with_a_data_loader(tmp_path):
    data = ImageFolderDataset(zipped(tmp_path / "faces.zip", folder(tmp_path / "faces")))
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8 and labels.shape == (4, 0)


@pytest.mark.parametrize("decoder", ["any", "pillow"])
def test_the_demo_set_is_whole(monkeypatch, decoder):
    if decoder == "pillow":
        monkeypatch.setattr(dataset, "pyspng", None)
    assert DEMO.stat().st_size < 4_000_000
    data = ImageFolderDataset(DEMO, resolution=32, use_labels=True)
    assert len(data) == 2800 and data.image_shape == [3, 32, 32] and not data.has_labels
    images = np.stack([image for image, _ in data])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)  # no picture twice
    assert [images[:, c, 0, 0].std() for c in range(3)] == [0, 0, 0]  # one plain background
