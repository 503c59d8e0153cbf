# SPDX-License-Identifier: Apache-2.0
"""Reads pickles of networks as data: nothing in the file is executed, imported or called.

Python's own unpickler imports and calls what a file names. This one is a small machine of its own for the opcodes that
pickletools (standard library) parses. It knows a few names, those that occur in the family's files, and what stands for
them is written in known_names; every other name ends the reading. What it returns are plain values, tensors, arrays,
and the two kinds of objects Persistent and TFNetwork.
"""

import argparse
import collections
import io
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from training.formats.known_names import (
    CLASSES,
    REDUCERS,
    Array,
    BrokenPickleError,
    DType,
    Name,
    Persistent,
    Storage,
    TFNetwork,
    UnsafePickleError,
    array,
    as_key,
    find,
    name_of,
)

__all__ = ["BrokenPickleError", "Persistent", "TFNetwork", "UnsafePickleError", "read"]

MAX_OPCODES = 1_000_000  # a file of 400 MB with networks has some 100,000
MAX_LINE = 4096  # characters of an argument in text form
MOST_COPIES = 10  # times the length of the file: all that calls may make of it together
ENTRY = 16  # bytes that one entry of a container counts
NESTED_STORAGE = Name("torch.storage", "_load_from_bytes")


def read(file: BinaryIO, storage_of: Callable[[Any], Storage] | None = None) -> Any:
    """The value of the first pickle in a binary file; the file is left behind it.

    storage_of: what a persistent id stands for, in the files of torch.save; without it there must be none.
    UnsafePickleError for a name it does not know, BrokenPickleError for anything that is not a whole pickle.
    """
    bounded = _Bounded(file)
    machine = _Machine(storage_of, MOST_COPIES * bounded.length + 10**6)
    try:
        return machine.run(bounded)
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
        self.length = self.end - start
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

    def __init__(self, storage_of, budget):
        self.stack, self.marks, self.memo = [], [], {}
        self.storage_of = storage_of
        self.budget = budget  # bytes that calls may still make

    def run(self, file):
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
        if isinstance(value, Array):
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
        self.stack.append(frozenset(map(as_key, items)))

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
        self.stack[-1].update(map(as_key, items))

    def _setitem(self, _none):
        self._set_items(self._take(2))

    def _setitems(self, _none):
        self._set_items(self._since_mark())

    def _set_items(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnsafePickleError(f"setting items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value

    # --- names and objects

    def _global(self, text):
        self.stack.append(find(*text.split(" ", 1)))

    def _stack_global(self, _none):
        self.stack.append(find(*self._take(2)))

    def _reduce(self, _none):
        function, arguments = self._take(2)
        if type(arguments) is not tuple:
            raise BrokenPickleError("a call without a tuple of arguments")
        if not isinstance(function, Name) or str(function) not in REDUCERS:
            raise UnsafePickleError(f"calling a {name_of(function)}")
        if self.storage_of is not None and function == NESTED_STORAGE:
            raise UnsafePickleError("a storage within a storage")
        made = REDUCERS[str(function)](*arguments)
        self.budget -= _bytes_of(made)
        if self.budget < 0:
            raise BrokenPickleError("the same data again and again")
        self.stack.append(made)

    def _binpersid(self, _none):
        if self.storage_of is None:
            raise UnsafePickleError("a persistent id, which networks do not need")
        self.stack.append(self.storage_of(self.stack.pop()))

    def _newobj(self, _none):
        cls, arguments = self._take(2)
        maker = CLASSES.get(str(cls)) if isinstance(cls, Name) else None
        if maker is None or arguments != ():
            raise UnsafePickleError(f"making a {name_of(cls)}")
        self.stack.append(maker())

    def _build(self, _none):
        target, state = self._take(2)
        self.stack.append(target)
        if isinstance(target, (TFNetwork, argparse.Namespace)) and type(state) is dict:
            vars(target).update({str(key): value for key, value in state.items()})
        elif isinstance(target, DType) and type(state) is tuple and len(state) >= 2:
            if state[1] not in ("<", ">", "|", "="):
                raise BrokenPickleError("a byte order that is none")
            target.order = state[1]
        elif type(target) is collections.OrderedDict and type(state) is dict and [*state] == ["_metadata"]:
            pass  # what modules add to their state dicts
        elif isinstance(target, Array) and type(state) is tuple and len(state) == 5:
            self.stack[-1] = array(*state[1:])
            self.memo.update(dict.fromkeys(target.keys, self.stack[-1]))
        else:
            raise UnsafePickleError(f"setting the state of a {name_of(target)}")


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


def _bytes_of(made):
    """Memory that a call has taken, about; views of what is there take none."""
    if isinstance(made, bytes):
        return len(made)
    if isinstance(made, Storage):
        return made.memory.nbytes()
    return ENTRY * (1 + len(made)) if isinstance(made, (dict, set, tuple)) else ENTRY
