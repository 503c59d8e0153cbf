# SPDX-License-Identifier: Apache-2.0
"""Where the pictures of a new data set come from: a folder, a zip, LSUN's lmdb, CIFAR-10's or MNIST's own files.

No torch. `open_source` looks at a path and returns a Source; nothing is decoded here.
"""

import gzip
import io
import itertools
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

LABEL_FILE = "dataset.json"
CIFAR_FILE = "cifar-10-python.tar.gz"
MNIST_FILE, MNIST_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
ACCEPTED = f"a folder, a .zip, an lmdb folder whose name ends with _lmdb, {CIFAR_FILE} or {MNIST_FILE}"


@dataclass
class Source:
    """Pictures by name, in the order that numbers them.

    kind      'folder', 'zip', 'lmdb', 'cifar-10' or 'mnist'
    names     relative names with forward slashes (of an lmdb: its keys)
    open      name -> binary file, or pixels as uint8 [H, W] or [H, W, 3] where they are stored as numbers
    labels    name -> label as stored, or None
    extra     what dataset.json says besides the labels
    left_out  how many files of each extension are not taken for pictures
    """

    kind: str
    path: str
    names: list[str]
    open: Callable[[str], BinaryIO | np.ndarray]
    labels: dict | None = None
    extra: dict = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def formats() -> list[str]:
    """Pillow's names of the formats that are read: all but EPS, for which Pillow starts another program."""
    PIL.Image.init()
    return sorted(set(PIL.Image.OPEN) - {"EPS"})


def open_source(path: str, max_images: int | None = None) -> Source:
    """The pictures at `path`. ValueError or OSError, in one line, if there are none.

    max_images: how many will be used; of an lmdb, whose keys take long to list, no more are looked at.
    """
    path = path.rstrip("/" + os.sep) or path
    base = os.path.basename(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Missing input file or directory: {path}")
    if os.path.isdir(path):
        source = _lmdb(path, max_images) if base.endswith("_lmdb") else _folder(path)
    elif base == CIFAR_FILE:
        source = _cifar(path)
    elif base == MNIST_FILE:
        source = _mnist(path)
    elif base.lower().endswith(".zip"):
        source = _zip(path)
    else:
        raise ValueError(f"--source must be {ACCEPTED}, not {path}")
    if not source.names:
        found = ", ".join(f"{n} {ext}" for ext, n in source.left_out.most_common(5))
        raise ValueError(f"No pictures found in {path}" + (f" (but {found})" if found else ""))
    return source


# ----------------------------------------------------------------------------------------
# Folders and zips


def _folder(path: str) -> Source:
    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over folders that may not be read

    found = [os.path.join(root, name) for root, _, names in os.walk(path, onerror=fail) for name in names]
    names, left_out = _pictures(os.path.relpath(name, path).replace(os.sep, "/") for name in found)
    label_file = os.path.join(path, LABEL_FILE)
    labels, extra = None, {}
    if os.path.isfile(label_file):
        with open(label_file, "rb") as f:
            labels, extra = _read_labels(f.read(), label_file)
    return Source(
        "folder", path, names, lambda name: open(os.path.join(path, name), "rb"), labels, extra, left_out
    )


def _zip(path: str) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    everything = archive.namelist()
    names, left_out = _pictures(name for name in everything if not name.endswith("/"))
    labels, extra = None, {}
    if LABEL_FILE in everything:
        labels, extra = _read_labels(archive.read(LABEL_FILE), f"{LABEL_FILE} of {path}")
    return Source("zip", path, names, archive.open, labels, extra, left_out, archive.close)


def is_hidden(fname: str) -> bool:
    """Whether a name is of what systems keep for themselves: ._x.png, .git/x.png, __MACOSX/x.png."""
    return any(part.startswith(".") or part == "__MACOSX" for part in fname.split("/"))


def _pictures(names) -> tuple[list[str], Counter]:
    """Those that Pillow can read by their extension, sorted folder by folder; and the extensions of the others.

    Hidden files and folders (.DS_Store, ._x.png, .git/, __MACOSX/) count as neither.
    """
    readable = set(formats())
    extensions = {ext for ext, kind in PIL.Image.registered_extensions().items() if kind in readable}
    pictures, left_out = [], Counter()
    for name in names:
        if is_hidden(name):
            continue
        extension = os.path.splitext(name)[1].lower()
        if extension in extensions:
            pictures.append(name)
        elif name != LABEL_FILE:
            left_out[extension or "without extension"] += 1
    return sorted(pictures, key=lambda name: name.split("/")), left_out


def _read_labels(text: bytes, where: str) -> tuple[dict | None, dict]:
    """(labels by name, or None; all else that the file says)."""
    try:
        content = json.loads(text)
        pairs = content.pop("labels", None)
        labels = None if pairs is None else {name.replace("\\", "/"): value for name, value in pairs}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        expected = '{"labels": [["name", label], ...]} or {"labels": null}'
        raise ValueError(f"{where} must read {expected}: {error}") from error
    return labels, content


# ----------------------------------------------------------------------------------------
# Data sets with files of their own


def _lmdb(path: str, max_images: int | None) -> Source:
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("Reading an lmdb needs the package lmdb: pip install lmdb") from error
    try:
        database = lmdb.open(path, readonly=True, lock=False)
        transaction = database.begin(buffers=False)
    except lmdb.Error as error:
        raise ValueError(f"Cannot read the lmdb {path}: {error}") from error
    with transaction.cursor() as cursor:
        keys = list(itertools.islice(cursor.iternext(keys=True, values=False), max_images))
    # Latin-1 makes a name of any key, and the key of the name again.
    return Source(
        "lmdb",
        path,
        [key.decode("latin-1") for key in keys],
        lambda name: io.BytesIO(transaction.get(name.encode("latin-1"))),
        close=database.close,
    )


def _arrays(kind: str, path: str, images: np.ndarray, labels: np.ndarray | None) -> Source:
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{path} has {len(images)} pictures and {len(labels)} labels")
    names = [f"{kind}/{i:08d}" for i in range(len(images))]
    index = {name: i for i, name in enumerate(names)}
    known = None if labels is None else dict(zip(names, map(int, labels), strict=True))
    return Source(kind, path, names, lambda name: images[index[name]], known)


class _CifarUnpickler(pickle.Unpickler):
    """Rebuilds arrays and plain values, and nothing else: a pickle can name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild, (kind, *_), _ = np.empty(0).__reduce__()
        known = {
            ("numpy", "ndarray"): kind,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
            ("numpy._core.multiarray", "_reconstruct"): rebuild,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-10 does not")
        return known[module, name]


def _cifar(path: str) -> Source:
    """The 50,000 training pictures, 32x32, of data_batch_1 ... data_batch_5."""
    images, labels = [], []
    try:
        with tarfile.open(path, "r:gz") as archive:
            for i in range(1, 6):
                file = archive.extractfile(f"cifar-10-batches-py/data_batch_{i}")
                batch = _CifarUnpickler(file, encoding="latin1").load()
                images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
                labels.extend(batch["labels"])
        return _arrays("cifar-10", path, np.concatenate(images).transpose(0, 2, 3, 1), labels)
    except Exception as error:  # unpickling raises whatever broken data makes it raise
        raise ValueError(f"{path} does not read as CIFAR-10 for Python: {error}") from error


def _mnist(path: str) -> Source:
    """The 60,000 training pictures, with a black border of 2 pixels: 32x32. Labels if their file is beside it."""
    images = _read_idx(path, dims=3)
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    label_path, labels = os.path.join(os.path.dirname(path), MNIST_LABELS), None
    if os.path.exists(label_path):
        labels = _read_idx(label_path, dims=1)
    return _arrays("mnist", path, images, labels)


def _read_idx(path: str, dims: int) -> np.ndarray:
    """An array of bytes as LeCun's .idx.gz: big-endian 0x0000080d, d sizes, then the values."""
    try:
        with gzip.open(path, "rb") as f:
            data = f.read()
        magic, *shape = np.frombuffer(data, ">i4", count=1 + dims)
        if magic != 0x0800 + dims:
            raise ValueError(f"its first four bytes are {data[:4].hex()}, not {0x0800 + dims:08x}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} does not read as MNIST's .idx.gz: {error}") from error
