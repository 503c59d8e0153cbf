# SPDX-License-Identifier: Apache-2.0
"""The names that training.formats.safe_pickle knows, and what stands for each of them.

What a function here makes is either of the size of its arguments or a view of them: a file that calls it again and
again with the same data is ended by the reader (MOST_COPIES there).
"""

import argparse
import collections
import math
from dataclasses import dataclass, field

import numpy as np
import torch

import dnnlib
from training.formats.building import shown

DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}  # no objects, no records
MOST_DIMENSIONS = 16


class UnsafePickleError(ValueError):
    """A pickle that asks for something that networks do not need. The message names it."""


class BrokenPickleError(ValueError):
    """Data that cannot be read as a pickle."""


@dataclass
class Persistent:
    """An object that carries the source of its class (torch_utils.persistence); `meta` as in the file."""

    meta: dict


@dataclass
class TFNetwork:
    """A network of a TensorFlow pickle (dnnlib.tflib.network.Network); its attributes are those of the file."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names; it stands for nothing but its name."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Array:
    """A NumPy array until its shape and data arrive; `keys` are its places in the memo."""

    keys: list = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """The memory of a tensor and the kind of its numbers."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


@dataclass
class DType:
    """A NumPy dtype until its byte order arrives."""

    code: str
    order: str = field(default="=")

    @property
    def value(self):
        """The dtype."""
        return np.dtype(self.code).newbyteorder(self.order)


def find(module, name):
    """The Name of a class or function that is known; UnsafePickleError for every other."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise UnsafePickleError("a name that is not text")
    found = Name(module, name)
    if not any(str(found) in known for known in (REDUCERS, CLASSES, INERT)):
        raise UnsafePickleError(" ".join(str(found).split())[:200])
    return found


def as_key(value):
    """A key of a dict or a member of a set: plain values only, whose hash takes no time."""
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise UnsafePickleError(f"a {type(value).__name__} as a key")
    return value


def name_of(value):
    """What a value is, in a word or two."""
    return str(value) if isinstance(value, Name) else type(value).__name__


# ----------------------------------------------------------------------------------------
# What is made of them


def _persistent(meta):
    if type(meta) is not dict:
        raise BrokenPickleError("a persistent object without its description")
    return Persistent(meta)


def _ordered_dict(items=()):
    pairs = [tuple(pair) for pair in items]
    return collections.OrderedDict((as_key(key), value) for key, value in pairs)


def _set(items=()):
    if type(items) not in (list, tuple):
        raise BrokenPickleError("a set of something else than a list")
    return set(map(as_key, items))


def _encode(text, encoding="latin1"):
    if type(encoding) is not str or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"text in the encoding {shown(encoding)}")
    return text.encode("latin-1")


def _dtype(code, _align=False, _copy=True):
    if type(code) is not str or code not in DTYPES:
        raise UnsafePickleError(f"NumPy data of the kind {shown(code)}")
    return DType(code)


def array(shape, dtype, is_fortran, data):
    """A NumPy array, a view of `data`, which is not to be written to."""
    if not isinstance(dtype, DType) or not isinstance(data, (bytes, bytearray)):
        raise BrokenPickleError("a NumPy array whose data is not bytes")
    if not _are_sizes(shape):
        raise BrokenPickleError("a NumPy array whose shape is not one")
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if is_fortran else "C")


def _are_sizes(numbers):
    """Whether these are at most MOST_DIMENSIONS whole numbers from 0 on."""
    few = type(numbers) in (tuple, list) and len(numbers) <= MOST_DIMENSIONS
    return few and all(type(n) is int and 0 <= n < 2**40 for n in numbers)


def _empty_array(cls, _shape, _code):
    if cls != Name("numpy", "ndarray"):
        raise UnsafePickleError(f"a NumPy array of the class {name_of(cls)}")
    return Array()


def _scalar(dtype, data):
    if not isinstance(dtype, DType) or not isinstance(data, bytes):
        raise BrokenPickleError("a NumPy number whose data is not bytes")
    (value,) = np.frombuffer(data, dtype.value)
    return value.item()


def _from_buffer(data, dtype, shape, order):
    return array(shape, dtype, order == "F", data)


def _storage(data):
    """A torch storage from its own file format, nested in the pickle."""
    from training.formats import torch_file  # which reads pickles itself

    if not isinstance(data, bytes):
        raise BrokenPickleError("a torch storage whose data is not bytes")
    if not torch_file.recognises(data):
        raise UnsafePickleError("a torch storage that is no file of PyTorch's")
    storage = torch_file.loads(data)
    if not isinstance(storage, Storage):
        raise UnsafePickleError(f"a torch storage that holds a {name_of(storage)}")
    return storage


def _tensor(storage, offset, size, stride, *_requires_grad_and_hooks):
    """A view of a storage. Its numbers are all there; that no number serves twice is for the reader to check."""
    if not isinstance(storage, Storage):
        raise BrokenPickleError("a tensor without a storage of numbers")
    if not (_are_sizes([offset]) and _are_sizes(size) and _are_sizes(stride)) or len(size) != len(stride):
        raise BrokenPickleError("a tensor whose shape is not one")
    held = storage.memory.nbytes() // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > held or (math.prod(size) > 0 and last >= held):  # PyTorch would enlarge the storage
        raise BrokenPickleError(
            f"a tensor of shape {list(size)}, stride {list(stride)} in a storage of {held} numbers"
        )
    return torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, tuple(size), tuple(stride))


def _parameter(data, _requires_grad=False, _hooks=None, _state=None):
    if not isinstance(data, torch.Tensor):
        raise BrokenPickleError("a parameter that is not a tensor")
    return data


REDUCERS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.bytes": lambda: b"",  # how old protocols write empty ones
    "__builtin__.bytes": lambda: b"",
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda items=(): tuple(items),
}
for _package in ["numpy.core", "numpy._core"]:
    REDUCERS[f"{_package}.multiarray._reconstruct"] = _empty_array
    REDUCERS[f"{_package}.multiarray.scalar"] = _scalar
    REDUCERS[f"{_package}.numeric._frombuffer"] = _from_buffer
CLASSES = {
    "dnnlib.util.EasyDict": dnnlib.EasyDict,
    "dnnlib.EasyDict": dnnlib.EasyDict,
    "collections.OrderedDict": collections.OrderedDict,
    "dnnlib.tflib.network.Network": TFNetwork,
    "argparse.Namespace": argparse.Namespace,  # the options of a training, in checkpoints
}
# Kinds of numbers in the files of torch.save.
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
INERT = {
    "numpy.ndarray",
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "uint8")),
    *(f"torch.{name}" for name in STORAGES),
}
