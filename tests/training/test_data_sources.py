# SPDX-License-Identifier: Apache-2.0
"""Folders, zips, lmdb, CIFAR-10 and MNIST, each written here in its own format."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile

import lmdb
import numpy as np
import PIL.Image
import pytest

from training.data_sources import formats, open_source

RANDOM = np.random.RandomState(0)


def png(seed, shape=(8, 8, 3)):
    stream = io.BytesIO()
    PIL.Image.fromarray(np.random.RandomState(seed).randint(256, size=shape).astype(np.uint8)).save(
        stream, "png"
    )
    return stream.getvalue()


def content(source):
    """name -> bytes or array."""
    found = {}
    for name in source.names:
        data = source.open(name)
        if not isinstance(data, np.ndarray):
            with data:
                data = data.read()
        found[name] = data
    return found


FILES = {
    "b/10.png": png(0),
    "b/9.PNG": png(1),
    "b.c/1.jpeg": png(2),
    "a.webp": png(3),
    ".DS_Store": b"macOS",
    "b/._9.png": b"macOS",
    ".git/1.png": b"hidden",
    "__MACOSX/b/9.png": b"hidden",
    "notes.txt": b"",
    "b/README": b"",
    "b/photo.heic": b"",
    "c/photo.heic": b"",
    "plot.eps": b"",
    "dataset.json": json.dumps({"labels": [["a.webp", 1], ["b\\9.PNG", 0]], "made_by": {"x": 1}}).encode(),
}


@pytest.fixture(params=["folder", "zip"])
def source(request, tmp_path):
    if request.param == "zip":
        path = tmp_path / "set.ZIP"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("b/", b"")
            for name, data in FILES.items():
                archive.writestr(name, data)
    else:
        path = tmp_path / "set"
        for name, data in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    with open_source(str(path)) as opened:
        assert opened.kind == request.param
        yield opened


def test_folders_and_zips(source):
    assert source.names == ["a.webp", "b/10.png", "b/9.PNG", "b.c/1.jpeg"]  # folder by folder, as paths sort
    assert content(source) == {name: FILES[name] for name in source.names}
    assert source.labels == {"a.webp": 1, "b/9.PNG": 0} and source.extra == {"made_by": {"x": 1}}
    assert dict(source.left_out) == {".txt": 1, "without extension": 1, ".heic": 2, ".eps": 1}


def test_no_format_starts_another_program():
    assert {"PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"} <= set(formats()) and "EPS" not in formats()


@pytest.mark.parametrize("text", ["{", "[1]", '{"labels": [1, 2]}', '{"labels": [[1, 2]]}', '{"labels": 3}'])
def test_a_broken_dataset_json(tmp_path, text):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match='dataset.json must read {"labels": .* or {"labels": null}: '):
        open_source(str(tmp_path))


def test_null_labels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert open_source(str(tmp_path)).labels is None


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(f"Permission denied: {path}")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Permission denied: .*locked"):
        open_source(str(tmp_path))


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(OSError, match="^Missing input file or directory: .*nowhere$"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="^No pictures found in .*$"):
        open_source(str(tmp_path))
    (tmp_path / "a.heic").touch()
    (tmp_path / "b.heic").touch()
    (tmp_path / "c.txt").touch()
    with pytest.raises(ValueError, match=r"^No pictures found in .* \(but 2 .heic, 1 .txt\)$"):
        open_source(str(tmp_path) + "/")
    with pytest.raises(ValueError, match="^--source must be a folder, .* or train-images-.*, not .*c.txt$"):
        open_source(str(tmp_path / "c.txt"))
    (tmp_path / "broken.zip").write_bytes(b"PK but no zip")
    with pytest.raises(ValueError, match="^Cannot read .*broken.zip: File is not a zip file$"):
        open_source(str(tmp_path / "broken.zip"))


# ----------------------------------------------------------------------------------------


@pytest.fixture
def church(tmp_path):
    """An lmdb like LSUN's: hexadecimal keys, encoded pictures."""
    path = str(tmp_path / "church_train_lmdb")
    with lmdb.open(path, map_size=2**20) as database, database.begin(write=True) as transaction:
        for i in (3, 1, 2):
            transaction.put(b"%04x" % i + b"\xff", png(i))
    return path


def test_lmdb(church):
    with open_source(church + "/") as source:
        assert source.kind == "lmdb" and source.labels is None
        assert list(content(source).values()) == [png(1), png(2), png(3)]  # in the order of keys
    with open_source(church, max_images=2) as source:
        assert list(content(source).values()) == [png(1), png(2)]


def test_lmdb_needs_its_package(church, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="^Reading an lmdb needs the package lmdb: pip install lmdb$"):
        open_source(church)


def test_a_folder_that_is_no_lmdb(tmp_path):
    (tmp_path / "x_lmdb").mkdir()
    with pytest.raises(ValueError, match="^Cannot read the lmdb .*x_lmdb: "):
        open_source(str(tmp_path / "x_lmdb"))


# ----------------------------------------------------------------------------------------


def python2_array(array):
    """Opcodes of protocol 0 that rebuild a uint8 array, as Python 2 and the NumPy of 2009 wrote them."""
    shape = "".join(f"I{n}\n" for n in array.shape)
    text = "'" + "".join(f"\\x{byte:02x}" for byte in array.tobytes()) + "'"
    return (
        "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
        f"{shape}tcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS{text}\ntb"
    )


def python2_batch(data, labels):
    numbers = "".join(f"I{label}\na" for label in labels)
    return f"(dS'data'\n{python2_array(data)}sS'labels'\n(l{numbers}s.".encode()


CIFAR = [(RANDOM.randint(256, size=[3, 3072]).astype(np.uint8), [i, 9, 3]) for i in range(5)]


def cifar(folder, batches):
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in batches.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize(
    "dump", [python2_batch, lambda data, labels: pickle.dumps({"data": data, "labels": labels}, protocol=2)]
)
def test_cifar10(tmp_path, dump):
    batches = {f"data_batch_{i + 1}": dump(*CIFAR[i]) for i in range(5)} | {"test_batch": b"not for training"}
    with open_source(cifar(tmp_path, batches)) as source:
        assert source.kind == "cifar-10" and len(source.names) == 15
        pixels = list(content(source).values())
        assert list(source.labels.values()) == [0, 9, 3, 1, 9, 3, 2, 9, 3, 3, 9, 3, 4, 9, 3]
    for i, picture in enumerate(pixels):
        assert picture.shape == (32, 32, 3)
        planes = CIFAR[i // 3][0][i % 3]  # 1024 red values row by row, then green, then blue
        for y, x, c in [(0, 0, 0), (0, 31, 1), (17, 5, 2), (31, 31, 2)]:
            assert picture[y, x, c] == planes[1024 * c + 32 * y + x]


@pytest.mark.parametrize(
    "batch, reason",
    [
        (b"cbuiltins\nprint\n(S'boo'\ntR.", "it asks for builtins.print, which CIFAR-10 does not"),
        (b"cos\nsystem\n(S'true'\ntR.", "it asks for os.system, which CIFAR-10 does not"),
        (b"", "Ran out of input"),
        (b"(dS'labels'\n(ls.", "'data'"),
        (b"I3\n.", "not subscriptable"),
        (python2_batch(CIFAR[0][0], [1, 2]), "15 pictures and 10 labels"),
    ],
)
def test_cifar10_files_run_nothing_and_say_what_is_wrong(tmp_path, capsys, batch, reason):
    with pytest.raises(
        ValueError, match=f"cifar-10-python.tar.gz does not read as CIFAR-10 for Python: .*{reason}"
    ):
        open_source(cifar(tmp_path, {f"data_batch_{i}": batch for i in range(1, 6)}))
    assert "boo" not in capsys.readouterr().out


def test_a_tar_that_is_none(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="does not read as CIFAR-10"):
        open_source(str(tmp_path / "cifar-10-python.tar.gz"))


# ----------------------------------------------------------------------------------------


def idx(path, array, magic=None):
    header = struct.pack(f">{1 + array.ndim}i", magic or 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
    return str(path)


DIGITS = RANDOM.randint(1, 256, size=[4, 28, 28]).astype(np.uint8)


def test_mnist(tmp_path):
    path = idx(tmp_path / "train-images-idx3-ubyte.gz", DIGITS)
    with open_source(path) as source:
        assert source.kind == "mnist" and source.labels is None
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.uint8([7, 0, 9, 1]))
    with open_source(path) as source:
        assert list(source.labels.values()) == [7, 0, 9, 1]
        pixels = np.stack(list(content(source).values()))
    assert pixels.shape == (4, 32, 32)
    np.testing.assert_array_equal(pixels[:, 2:30, 2:30], DIGITS)
    assert pixels.sum(dtype=int) == DIGITS.sum(dtype=int)  # the border is black


@pytest.mark.parametrize(
    "images, labels, reason",
    [
        (dict(array=DIGITS), dict(array=np.uint8([1, 2])), "has 4 pictures and 2 labels"),
        (dict(array=DIGITS, magic=0x0D03), None, "first four bytes are 00000d03, not 00000803"),
        (dict(array=DIGITS), dict(array=DIGITS), "first four bytes are 00000803, not 00000801"),
    ],
)
def test_unusable_mnist_files_say_why(tmp_path, images, labels, reason):
    path = idx(tmp_path / "train-images-idx3-ubyte.gz", **images)
    if labels:
        idx(tmp_path / "train-labels-idx1-ubyte.gz", **labels)
    with pytest.raises(ValueError, match=reason):
        open_source(path)


def bent(data):
    return data[:15] + bytes(b ^ 255 for b in data[15:40]) + data[40:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        gzip.compress(b"\0\0", mtime=0),
        gzip.compress(bytes(1000), mtime=0)[:-5],
        bent(gzip.compress(DIGITS.tobytes(), mtime=0)),
    ],
)
def test_damaged_mnist_files(tmp_path, data):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(ValueError, match="does not read as MNIST's .idx.gz: "):
        open_source(str(tmp_path / "train-images-idx3-ubyte.gz"))
