# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, in both of its formats, read as data by training.formats.safe_pickle.

torch.load(weights_only=True) runs nothing either, but lets a small file ask for any amount of memory. Here nothing is
larger than the file: the entries of a zip must be stored as they are, and a storage must be all there.
"""

import io
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from training.formats import safe_pickle
from training.formats.known_names import STORAGES, BrokenPickleError, Name, Storage, UnsafePickleError, shown

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before it wrote zip files
VERSION = 1001  # of the old format


def recognises(start: bytes) -> bool:
    """Whether a file that begins so (16 bytes) was written by torch.save."""
    return start.startswith(ZIP) or start.startswith(LEGACY)


def load(file: BinaryIO) -> Any:
    """The contents of a seekable binary file: tensors on the CPU, and plain values.

    UnsafePickleError for whatever else it asks for, BrokenPickleError for what is no whole file of torch.save, both in
    one line.
    """
    start = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(start)
    magic = file.read(len(ZIP))
    file.seek(start)
    try:
        return _load_zip(file, end - start) if magic == ZIP else _load_legacy(file, end)
    except (UnsafePickleError, BrokenPickleError):
        raise
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, MemoryError) as err:
        text = " ".join(str(err).split())
        raise BrokenPickleError(f"not a whole file of PyTorch ({text[:200]})") from err


def loads(data: bytes) -> Any:
    """The same for a file in memory."""
    return load(io.BytesIO(data))


def _load_zip(file, length):
    """<folder>/data.pkl, and the storages by number in <folder>/data/."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BrokenPickleError("a zip with compressed entries, which PyTorch does not write")
        if sum(entry.file_size for entry in entries) > length:
            raise BrokenPickleError("a zip whose entries share their place")
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise BrokenPickleError(f"a zip with {len(pickles)} entries data.pkl, expected one")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_order(archive.read(f"{folder}byteorder").decode("latin-1"))
        storages = _Storages(lambda key, _size: _memory(archive.read(f"{folder}data/{key}")))
        return safe_pickle.read(io.BytesIO(archive.read(pickles[0])), storages.of)


def _load_legacy(file, end):
    """Pickles of a magic number, the version, the machine, the contents and the order of the storages; then these."""
    if file.read(len(LEGACY)) != LEGACY:
        raise BrokenPickleError("it does not begin as files of PyTorch do")
    version, machine = safe_pickle.read(file), safe_pickle.read(file)
    if version != VERSION or not isinstance(machine, dict):
        raise BrokenPickleError(f"version {shown(version)} of PyTorch's old format, {VERSION} is known")
    _check_order("little" if machine.get("little_endian", True) is True else "big")

    def room(_key, size):
        if storages.bytes + size > end - file.tell():
            raise BrokenPickleError(f"the file ends early: a storage of {size} bytes wanted")
        return torch.UntypedStorage(size)

    storages = _Storages(room)
    contents, order = safe_pickle.read(file, storages.of), safe_pickle.read(file)
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(storages.found):
        raise BrokenPickleError("a list of storages other than those it uses")
    for key in map(str, order):
        memory, dtype = storages.found[key].memory, storages.found[key].dtype
        count = int.from_bytes(file.read(8), "little")
        if count * dtype.itemsize != memory.nbytes():
            raise BrokenPickleError(f"a storage of {count} numbers in place of {memory.nbytes()} bytes")
        data = file.read(memory.nbytes())
        if len(data) != memory.nbytes():
            raise BrokenPickleError("the file ends early, within its numbers")
        torch.empty(0, dtype=torch.uint8).set_(memory).copy_(
            torch.empty(0, dtype=torch.uint8).set_(_memory(data))
        )
    return contents


class _Storages:
    """The storages that the persistent ids of a pickle name; `found` by key. `memory_of(key, bytes)` gives each."""

    def __init__(self, memory_of: Callable[[str, int], torch.UntypedStorage]):
        self.memory_of = memory_of
        self.found = {}
        self.bytes = 0  # of them all

    def of(self, pid):
        """The Storage of ('storage', kind, key, device, count); in the old format nothing or None may follow."""
        pid = pid[:5] if type(pid) is tuple and len(pid) == 6 and pid[5] is None else pid
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise UnsafePickleError("a persistent id that is not that of a storage")
        _word, kind, key, _device, count = pid
        dtype = STORAGES.get(kind.name) if kind.module == "torch" else None
        if dtype is None:
            raise UnsafePickleError(f"a storage of the kind {kind}")
        if type(key) is not str or type(count) is not int or not 0 <= count < 2**40:
            raise BrokenPickleError("a storage without a name or a length")
        if key not in self.found:
            size = count * dtype.itemsize
            self.found[key] = Storage(self.memory_of(key, size), dtype)
            self.bytes += size
        storage = self.found[key]
        if storage.dtype != dtype or storage.memory.nbytes() != count * dtype.itemsize:
            raise BrokenPickleError(
                f"a storage of {count} numbers in place of {storage.memory.nbytes()} bytes"
            )
        return storage


def _memory(data):
    """A copy of bytes as a storage."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).untyped_storage()


def _check_order(order):
    if order != sys.byteorder:
        raise BrokenPickleError(f"numbers of a {shown(order)}-endian machine")
