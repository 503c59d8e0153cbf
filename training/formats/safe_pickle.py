# SPDX-License-Identifier: Apache-2.0
"""Reads pickles of networks as data: nothing in the file is executed, imported or called.

Python's own unpickler imports and calls what a file names. This one is a small machine of its own for the opcodes that
pickletools (standard library) parses. It knows a few names, those that occur in the family's files, and what stands for
them is written here; every other name ends the reading. What it returns are plain values, tensors, arrays, and the two
kinds of objects below.
"""

import collections
import io
import math
import pickle
import pickletools
import warnings
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

import dnnlib

MAX_OPCODES = 10_000_000  # a file of 400 MB with networks has some 100,000
MAX_LINE = 4096  # characters of an argument in text form
DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}  # no objects, no records


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
class _Array:
    """A NumPy array until its shape and data arrive; `keys` are its places in the memo."""

    keys: list = field(default_factory=list)


@dataclass(frozen=True)
class _Storage:
    """The memory of a tensor and the kind of its numbers."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


@dataclass
class _DType:
    """A NumPy dtype until its byte order arrives."""

    code: str
    order: str = field(default="=")

    @property
    def value(self):
        return np.dtype(self.code).newbyteorder(self.order)


def read(file: BinaryIO) -> Any:
    """The value of the first pickle in a binary file; the file is left behind it.

    UnsafePickleError for a name it does not know, BrokenPickleError for anything that is not a whole pickle.
    """
    machine = _Machine()
    try:
        return machine.run(_Bounded(file))
    except (UnsafePickleError, BrokenPickleError):
        raise
    except (MemoryError, RecursionError, Exception) as err:
        text = " ".join(f"{type(err).__name__}: {err}".split())
        raise BrokenPickleError(f"not a readable pickle ({text[:200]})") from err


class _Bounded:
    """A file that never allocates more than it has, for lengths that a hostile file claims."""

    def __init__(self, file):
        self.file = file
        start = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(start)
        self.tell = file.tell

    def read(self, size):
        if size > self.end - self.file.tell():
            raise BrokenPickleError(f"the file ends early: {size} bytes wanted at byte {self.file.tell()}")
        return self.file.read(size)

    def readline(self):
        line = self.file.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise BrokenPickleError(f"a line without an end at byte {self.file.tell()}")
        return line


class _Machine:
    """The stack machine of the pickle protocol. An opcode's method is named after it."""

    def run(self, file):
        self.stack, self.marks, self.memo = [], [], {}
        for count, (opcode, argument, _position) in enumerate(pickletools.genops(file)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if count > MAX_OPCODES:
                raise BrokenPickleError(f"more than {MAX_OPCODES:,} instructions")
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _VALUES:
                self.stack.append(argument)
            else:
                method = getattr(self, "_" + opcode.name.lower(), None)
                if method is None:
                    raise UnsafePickleError(
                        f"the pickle instruction {opcode.name}, which networks do not need"
                    )
                method(argument)
        raise BrokenPickleError("the file ends early")

    def _proto(self, version):
        if version > 5:
            raise BrokenPickleError(f"pickle protocol {version}, can read 5 and below")

    def _frame(self, _length):
        pass

    # --- stack and memo

    def _mark(self, _none):
        self.marks.append(self.stack)
        self.stack = []

    def _since_mark(self):
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _pop(self, _none):
        if self.stack:
            self.stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _none):
        self._since_mark()

    def _dup(self, _none):
        self.stack.append(self.stack[-1])

    def _get(self, key):
        self.stack.append(self.memo[int(key)])

    _binget = _long_binget = _get

    def _put(self, key):
        value = self.memo[int(key)] = self.stack[-1]
        if isinstance(value, _Array):
            value.keys.append(int(key))

    _binput = _long_binput = _put

    def _memoize(self, _none):
        self._put(len(self.memo))

    # --- values

    def _binstring(self, text):  # of Python 2: bytes as text of code points below 256
        self.stack.append(text.encode("latin-1"))

    _short_binstring = _string = _binstring

    def _tuple(self, _none):
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _take(self, count):
        taken = [self.stack.pop() for _ in range(count)]
        return taken[::-1]

    def _tuple1(self, _none):
        self.stack.append(tuple(self._take(1)))

    def _tuple2(self, _none):
        self.stack.append(tuple(self._take(2)))

    def _tuple3(self, _none):
        self.stack.append(tuple(self._take(3)))

    def _list(self, _none):
        items = self._since_mark()
        self.stack.append(items)

    def _frozenset(self, _none):
        items = self._since_mark()
        self.stack.append(frozenset(map(_key, items)))

    def _dict(self, _none):
        items = self._since_mark()
        self.stack.append({})
        self._set_items(items)

    def _append(self, _none):
        self._extend(self._take(1))

    def _appends(self, _none):
        self._extend(self._since_mark())

    def _extend(self, items):
        if type(self.stack[-1]) is not list:
            raise UnsafePickleError(f"appending to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def _additems(self, _none):
        items = self._since_mark()
        if type(self.stack[-1]) is not set:
            raise UnsafePickleError(f"adding members to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(_key, items))

    def _setitem(self, _none):
        self._set_items(self._take(2))

    def _setitems(self, _none):
        self._set_items(self._since_mark())

    def _set_items(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnsafePickleError(f"setting items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    # --- names and objects

    def _global(self, text):
        self.stack.append(_find(*text.split(" ", 1)))

    def _stack_global(self, _none):
        self.stack.append(_find(*self._take(2)))

    def _reduce(self, _none):
        function, arguments = self._take(2)
        if type(arguments) is not tuple:
            raise BrokenPickleError("a call without a tuple of arguments")
        if not isinstance(function, Name) or str(function) not in _REDUCERS:
            raise UnsafePickleError(f"calling a {_name_of(function)}")
        self.stack.append(_REDUCERS[str(function)](*arguments))

    def _newobj(self, _none):
        cls, arguments = self._take(2)
        maker = _CLASSES.get(str(cls)) if isinstance(cls, Name) else None
        if maker is None or arguments != ():
            raise UnsafePickleError(f"making a {_name_of(cls)}")
        self.stack.append(maker())

    def _build(self, _none):
        target, state = self._take(2)
        self.stack.append(target)
        if isinstance(target, TFNetwork) and type(state) is dict:
            vars(target).update({str(key): value for key, value in state.items()})
        elif isinstance(target, _DType) and type(state) is tuple and len(state) >= 2:
            target.order = {"<": "<", ">": ">", "|": "|", "=": "="}[state[1]]
        elif isinstance(target, _Array) and type(state) is tuple and len(state) == 5:
            self.stack[-1] = _array(*state[1:])
            self.memo.update(dict.fromkeys(target.keys, self.stack[-1]))
        else:
            raise UnsafePickleError(f"setting the state of a {_name_of(target)}")


_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    "BYTEARRAY8",
}


def _key(value):
    """A key of a dict or a member of a set: plain values only, whose hash takes no time."""
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise UnsafePickleError(f"a {type(value).__name__} as a key")
    return value


def _name_of(value):
    return str(value) if isinstance(value, Name) else type(value).__name__


# ----------------------------------------------------------------------------------------
# The names that are known, and what is made of them


def _find(module, name):
    if not (isinstance(module, str) and isinstance(name, str)):
        raise UnsafePickleError("a name that is not text")
    found = Name(module, name)
    if not any(str(found) in known for known in (_REDUCERS, _CLASSES, _INERT)):
        raise UnsafePickleError(" ".join(str(found).split())[:200])
    return found


def _persistent(meta):
    if type(meta) is not dict:
        raise BrokenPickleError("a persistent object without its description")
    return Persistent(meta)


def _ordered_dict(items=()):
    pairs = [tuple(pair) for pair in items]
    return collections.OrderedDict((_key(key), value) for key, value in pairs)


def _set(items=()):
    if type(items) not in (list, tuple):
        raise BrokenPickleError("a set of something else than a list")
    return set(map(_key, items))


def _encode(text, encoding="latin1"):
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"text in the encoding {encoding!r:.40}")
    return text.encode("latin-1")


def _dtype(code, _align=False, _copy=True):
    if code not in DTYPES:
        raise UnsafePickleError(f"NumPy data of the kind {code!r:.40}")
    return _DType(code)


def _array(shape, dtype, is_fortran, data):
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise BrokenPickleError("a NumPy array whose data is not bytes")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise BrokenPickleError("a NumPy array whose shape is not one")
    order = "F" if is_fortran else "C"
    return np.frombuffer(data, dtype.value).reshape(shape, order=order).copy()


def _empty_array(cls, _shape, _code):
    if cls != Name("numpy", "ndarray"):
        raise UnsafePickleError(f"a NumPy array of the class {_name_of(cls)}")
    return _Array()


def _scalar(dtype, data):
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise BrokenPickleError("a NumPy number whose data is not bytes")
    (value,) = np.frombuffer(data, dtype.value)
    return value.item()


def _from_buffer(data, dtype, shape, order):
    return _array(shape, dtype, order == "F", bytes(data))


def _storage(data):
    """A torch storage from its own file format, nested in the pickle."""
    if not isinstance(data, bytes):
        raise BrokenPickleError("a torch storage whose data is not bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that will be refused
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise UnsafePickleError(
            f"a torch storage that holds something else ({str(err).splitlines()[0]:.200})"
        ) from err
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnsafePickleError(f"a torch storage that holds a {type(storage).__name__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "TypedStorage is deprecated": what the files hold
        return _Storage(storage.untyped(), storage.dtype)


def _tensor(storage, offset, size, stride, *_requires_grad_and_hooks):
    """A view of a storage. Its numbers are all there; that no number serves twice is for the reader to check."""
    if not isinstance(storage, _Storage):
        raise BrokenPickleError("a tensor without a storage of numbers")
    if not all(type(n) is int and 0 <= n < 2**40 for n in [offset, *size, *stride]) or len(size) != len(
        stride
    ):
        raise BrokenPickleError("a tensor whose shape is not one")
    held = storage.memory.nbytes() // storage.dtype.itemsize
    if offset + math.prod(size) > held:
        raise BrokenPickleError(f"a tensor of shape {list(size)} in a storage of {held} numbers")
    return torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, tuple(size), tuple(stride))


def _parameter(data, _requires_grad=False, _hooks=None, _state=None):
    if not isinstance(data, torch.Tensor):
        raise BrokenPickleError("a parameter that is not a tensor")
    return data


_REDUCERS = {
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
    _REDUCERS[f"{_package}.multiarray._reconstruct"] = _empty_array
    _REDUCERS[f"{_package}.multiarray.scalar"] = _scalar
    _REDUCERS[f"{_package}.numeric._frombuffer"] = _from_buffer
_CLASSES = {
    "dnnlib.util.EasyDict": dnnlib.EasyDict,
    "dnnlib.EasyDict": dnnlib.EasyDict,
    "collections.OrderedDict": collections.OrderedDict,
    "dnnlib.tflib.network.Network": TFNetwork,
}
_INERT = {
    "numpy.ndarray",
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "uint8")),
}
