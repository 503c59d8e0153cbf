# SPDX-License-Identifier: Apache-2.0
"""Pictures and labels: the base class `Dataset`, and `ImageFolderDataset`, which reads a folder or a zip."""

import hashlib
import io
import json
import os
import zipfile
import zlib
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib import EasyDict
from training.data_sources import is_hidden

try:
    import pyspng
except ImportError:
    pyspng = None

LABEL_FILE = "dataset.json"
MOST_CLASSES = 2**20
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
PILLOW_FORMATS = {"grey": "L", "RGB": "RGB"}  # the two that a network can be trained on


class MissingLabelError(KeyError, ValueError):
    """A picture without a label: a KeyError by contract, a ValueError to whoever reports user mistakes."""

    __str__ = ValueError.__str__  # KeyError would print the repr


class Dataset(torch.utils.data.Dataset):
    """Items are (uint8 image [C, H, W], float32 label [label_dim]), both copies that the caller may change.

    name         what run directories are called after
    raw_shape    [number of images, C, H, W] as stored
    max_size     use that many images only, picked by `random_seed`; None = all
    use_labels   False gives every image a label of length zero
    xflip        mirrored copies follow the originals, which doubles the length
    """

    def __init__(
        self,
        name: str,
        raw_shape: list,
        max_size: int | None = None,
        use_labels: bool = False,
        xflip: bool = False,
        random_seed: int = 0,
    ):
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size must be at least 1, got {max_size}")
        self._name = name
        self._raw_shape = [int(size) for size in raw_shape]
        self._use_labels = use_labels
        self._raw_labels = None  # read at first use

        raw_idx = np.arange(self._raw_shape[0], dtype=np.int64)
        if max_size is not None and max_size < raw_idx.size:
            np.random.RandomState(random_seed).shuffle(raw_idx)
            raw_idx = np.sort(raw_idx[:max_size])
        copies = 2 if xflip else 1
        self._raw_idx = np.tile(raw_idx, copies)
        self._xflip = np.repeat(np.arange(copies, dtype=np.uint8), raw_idx.size)

    # What a subclass provides.

    def close(self) -> None:
        """Lets go of open files; they open again when needed."""

    def _load_raw_image(self, raw_idx: int) -> np.ndarray:
        """Image `raw_idx` as stored: uint8 [C, H, W]."""
        raise NotImplementedError

    def _load_raw_labels(self) -> np.ndarray | None:
        """All labels as stored: int64 [n] >= 0 (classes), float32 [n, ...] (vectors), or None."""
        raise NotImplementedError

    # What others use.

    @property
    def num_raw(self) -> int:
        """Number of pictures stored, before max_size and xflip."""
        return self._raw_shape[0]

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _raw_labels=None)

    def __len__(self) -> int:
        return int(self._raw_idx.size)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._load_raw_image(int(self._raw_idx[idx]))
        assert isinstance(image, np.ndarray) and image.dtype == np.uint8
        assert list(image.shape) == self.image_shape
        if self._xflip[idx]:
            image = image[:, :, ::-1]
        return image.copy(), self.get_label(idx)

    def get_label(self, idx: int) -> np.ndarray:
        """Label of item `idx`, classes as one-hot vectors: float32 [label_dim]."""
        label = self._get_raw_labels()[self._raw_idx[idx]]
        if label.dtype == np.int64:
            onehot = np.zeros(self.label_shape, dtype=np.float32)
            onehot[label] = 1
            return onehot
        return label.copy()

    def get_details(self, idx: int) -> EasyDict:
        """Where item `idx` comes from: raw_idx (int), xflip (bool), raw_label (as stored)."""
        raw_idx = int(self._raw_idx[idx])
        raw_label = self._get_raw_labels()[raw_idx].copy()
        return EasyDict(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=raw_label)

    @property
    def name(self) -> str:
        return self._name

    @property
    def image_shape(self) -> list[int]:
        """[C, H, W]"""
        return list(self._raw_shape[1:])

    @property
    def num_channels(self) -> int:
        return self._raw_shape[1]

    @property
    def resolution(self) -> int:
        """Side of square images, the longer one of others (see image_shape)."""
        return max(self.image_shape[1:])

    @property
    def label_shape(self) -> list[int]:
        """[number of classes] for classes, the shape of one vector for vectors, [0] without labels."""
        labels = self._get_raw_labels()
        if labels.dtype == np.int64:
            return [int(labels.max()) + 1]
        return list(labels.shape[1:])

    @property
    def label_dim(self) -> int:
        """Length of a label; ValueError if the labels are not vectors."""
        shape = self.label_shape
        if len(shape) != 1:
            raise ValueError(f"Labels of '{self.name}' have shape {shape}; they must be vectors")
        return shape[0]

    @property
    def has_labels(self) -> bool:
        return any(size != 0 for size in self.label_shape)

    @property
    def has_onehot_labels(self) -> bool:
        return self._get_raw_labels().dtype == np.int64

    def _get_raw_labels(self) -> np.ndarray:
        if self._raw_labels is None:
            labels = self._load_raw_labels() if self._use_labels else None
            if labels is None:
                labels = np.zeros([self._raw_shape[0], 0], dtype=np.float32)
            assert labels.shape[0] == self._raw_shape[0] and labels.dtype in (np.int64, np.float32)
            assert labels.dtype != np.int64 or (labels.ndim == 1 and labels.min() >= 0)
            self._raw_labels = labels
        return self._raw_labels


class ImageFolderDataset(Dataset):
    """The images of a folder (searched recursively) or of a .zip file, in the order of their names.

    Images are 8-bit RGB or grey and of one size; nothing is converted. The labels are those of `dataset.json`
    if it is there: {"labels": [["00000/img00000000.png", 6], ...]}, each a class or a list of numbers.
    Files whose name starts with a dot are left out (macOS puts such companions beside pictures).
    resolution: what the longer side must be; None takes any.
    Raises IOError for a path, an archive or a file that cannot be used.
    """

    def __init__(self, path: str, resolution: int | None = None, **super_kwargs: Any):
        self._path = os.fspath(path)
        self._zip = None
        self._zip_pid = None  # a forked worker must not share its parent's file position
        self._is_zip = not os.path.isdir(self._path)
        if self._is_zip and not (self._path.lower().endswith(".zip") and os.path.isfile(self._path)):
            raise OSError(f"Path must point to a directory or zip: '{self._path}'")

        self._all_fnames = set(self._list_files())
        PIL.Image.init()
        self._image_fnames = sorted(f for f in self._all_fnames if _is_image(f))
        if not self._image_fnames:
            raise OSError(f"No image files found in the specified path: '{self._path}'")

        first = self._decode(0)
        height, width = first.shape[1:]
        if resolution is not None and max(height, width) != resolution:
            raise OSError(
                f"Image files do not match the specified resolution: '{self._image_fnames[0]}' is"
                f" {width}x{height}, resolution is {resolution}"
            )
        name = os.path.splitext(os.path.basename(os.path.abspath(self._path)))[0]
        super().__init__(name=name, raw_shape=[len(self._image_fnames), *first.shape], **super_kwargs)

    def close(self) -> None:
        """Closes the zip file; it opens again when needed."""
        if self._zip is not None:
            self._zip.close()
            self._zip = None

    def order_digest(self) -> str:
        """sha256 of the pictures' names in order, and of the labels: what must be the same for item n to be."""
        digest = hashlib.sha256("\n".join(self._image_fnames).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self._get_raw_labels()).tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return dict(super().__getstate__(), _zip=None, _zip_pid=None)

    def _list_files(self) -> list[str]:
        """Names relative to the path, with forward slashes."""
        if self._is_zip:
            return self._get_zip().namelist()
        found = (os.path.join(root, f) for root, _, files in os.walk(self._path) for f in files)
        return [os.path.relpath(f, self._path).replace(os.sep, "/") for f in found]

    def _get_zip(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip_pid != os.getpid():
            try:
                self._zip = zipfile.ZipFile(self._path)
            except zipfile.BadZipFile as error:
                raise OSError(f"Cannot read '{self._path}': {error}") from error
            self._zip_pid = os.getpid()
        return self._zip

    def _read(self, fname: str) -> bytes:
        if not self._is_zip:
            with open(os.path.join(self._path, fname), "rb") as f:
                return f.read()
        try:
            return self._get_zip().read(fname)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            # of a RuntimeError: encrypted, or compressed in a way that Python does not know
            raise OSError(f"Cannot read '{fname}' in '{self._path}': {error}") from error

    def _decode(self, raw_idx: int) -> np.ndarray:
        """uint8 [C, H, W] of any shape; errors name the file."""
        fname = self._image_fnames[raw_idx]
        try:
            pixels = decode_image(self._read(fname))
        except ValueError as error:
            raise OSError(f"Image '{fname}' in '{self._path}' cannot be used: {error}") from error
        return pixels.transpose(2, 0, 1)  # HWC => CHW

    def _load_raw_image(self, raw_idx: int) -> np.ndarray:
        image = self._decode(raw_idx)
        if list(image.shape) != self.image_shape:
            fname, first = self._image_fnames[raw_idx], self._image_fnames[0]
            raise OSError(
                f"Images of '{self._path}' must have one shape [channels, height, width]:"
                f" '{fname}' has {list(image.shape)}, '{first}' has {self.image_shape}"
            )
        return image

    def _load_raw_labels(self) -> np.ndarray | None:
        if LABEL_FILE not in self._all_fnames:
            return None
        where = f"{LABEL_FILE} of '{self._path}'"
        try:
            pairs = json.loads(self._read(LABEL_FILE)).get("labels")
            labels = None if pairs is None else {name.replace("\\", "/"): value for name, value in pairs}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            expected = '{"labels": [["name", label], ...]} or {"labels": null}'
            raise ValueError(f"{where} must read {expected}: {error}") from error
        if labels is None:
            return None
        for fname in self._image_fnames:
            if fname not in labels:
                raise MissingLabelError(f"{where} has no label for '{fname}'")
        return _label_array([labels[fname] for fname in self._image_fnames], where)


def decode_image(data: bytes) -> np.ndarray:
    """Pixels of an encoded image: uint8 [H, W, C] with C = 3 (RGB) or 1 (grey).

    Raises ValueError for data that cannot be decoded and for every other kind of image (palette, alpha,
    16 bits), which decoders would otherwise turn into numbers of another meaning.
    """
    mode = None
    if data.startswith(PNG_SIGNATURE) and len(data) > 25:
        mode = _png_mode(data)
        if pyspng is not None:
            try:
                return _with_channels(pyspng.load(data, format=mode))
            except RuntimeError:
                pass  # broken, or a kind that only Pillow reads
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.load()
            mode = mode or image.mode
            pixels = np.array(image)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({' '.join(str(error).split())})") from error
    if mode not in PILLOW_FORMATS.values():
        raise ValueError(f"its mode is {mode}, accepted are 8-bit RGB and 8-bit grey (L)")
    return _with_channels(pixels)


def _png_mode(data: bytes) -> str:
    """Pillow's name of a PNG's mode, from depth and colour type in its header; ValueError if not accepted."""
    depth, color = data[24], PNG_COLOR_TYPES.get(data[25], "unknown")
    if depth != 8 or color not in PILLOW_FORMATS:
        raise ValueError(f"it is a {depth}-bit {color} PNG, accepted are 8-bit RGB and 8-bit grey")
    return PILLOW_FORMATS[color]


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _is_image(fname: str) -> bool:
    """Whether the name is that of an image Pillow knows, and not hidden; PIL.Image.init() has run."""
    if is_hidden(fname):
        return False
    return os.path.splitext(fname.rsplit("/", 1)[-1])[1].lower() in PIL.Image.EXTENSION


def _label_array(values: list, where: str) -> np.ndarray:
    """Classes as int64 [n], vectors as float32 [n, ...]; ValueError if they are neither."""
    try:
        labels = np.array(values)
        if labels.dtype.kind not in "iuf":
            raise ValueError(f"got {values[0]!r}")
    except ValueError as error:
        kinds = "all classes (0, 1, ...) or all lists of numbers of one length"
        raise ValueError(f"Labels in {where} must be {kinds}: {error}") from error
    if labels.ndim > 1:
        return labels.astype(np.float32)
    wrong = labels[(labels < 0) | (labels != np.floor(labels))]
    if wrong.size:
        raise ValueError(f"Classes in {where} must be whole numbers from 0 on, got {wrong[0]}")
    if labels.max() >= MOST_CLASSES:  # a network has weights for every number below the largest
        raise ValueError(f"Classes in {where} must be below {MOST_CLASSES:,}, got {labels.max()}")
    return labels.astype(np.int64)
