# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save: the same values as torch.load gives, and nothing for files that ask for more than they hold."""

import argparse
import collections
import io
import os
import pickle
import sys
import time
import tracemalloc
import zipfile

import pytest
import torch

from training.formats import torch_file
from training.formats.safe_pickle import BrokenPickleError, UnsafePickleError

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert [*a] == [*b]
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    else:
        assert a == b


@BOTH
def test_what_torch_load_gives(zipped):
    base = torch.arange(24.0)
    value = dict(
        kinds={name: torch.arange(3).to(getattr(torch, name)) for name in DTYPES},
        views=dict(a=base[4:16].reshape(3, 4).t(), b=base[1::5], c=base[3], d=base[:0], e=base[3].expand(2)),
        image=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        state=torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(),
        args=argparse.Namespace(size=64, path="faces"),
        plain=[1, 2.5, None, True, "text", (1, (2,)), 2**70, b"bytes"],
        ordered=collections.OrderedDict(b=1, a=torch.Size([2, 3])),
    )
    data = saved(value, zipped)
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = torch.load(io.BytesIO(data), weights_only=True)
    expected["ordered"]["a"] = tuple(expected["ordered"]["a"])
    found = torch_file.loads(data)
    same(found, expected)
    found["views"]["b"][:] = 99  # views of one storage stay so
    assert found["views"]["a"].flatten().eq(99).sum() == 2 and torch_file.recognises(data)


@BOTH
def test_truncated_and_damaged_files(zipped):
    data = saved(dict(a=torch.arange(40.0), b="x"), zipped)
    for length in [*range(0, len(data) - 1, 7), len(data) - 1]:
        with pytest.raises((BrokenPickleError, UnsafePickleError)) as caught:
            torch_file.loads(data[:length])
        assert "\n" not in str(caught.value)


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def packed(pickled, compression=zipfile.ZIP_STORED, **entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def storage_pickle(count, kind=b"FloatStorage"):
    """Of a storage that is said to hold `count` numbers."""
    size = count.to_bytes(8, "little")
    text = [b"X" + len(word).to_bytes(4, "little") + word for word in (b"storage", b"0", b"cpu")]
    return (
        b"\x80\x02(" + text[0] + b"ctorch\n" + kind + b"\n" + text[1] + text[2] + b"\x8a\x08" + size + b"tQ."
    )


def legacy(contents, machine=None, storages=(), data=b""):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True} if machine is None else machine]
    return b"".join(pickle.dumps(x, 2) for x in parts) + contents + pickle.dumps(list(storages), 2) + data


HUGE = 8 << 30
REFUSED = {
    "bytearray": (packed(pickle.dumps(Call(bytearray, HUGE), 2)), r"bytearray"),
    "old-bytearray": (legacy(pickle.dumps(Call(bytearray, HUGE), 2)), r"bytearray"),
    "code": (saved(Call(os.system, "exit 1")), r"system"),
    "old-code": (saved(Call(os.system, "exit 1"), False), r"system"),
    "bomb": (packed(pickle.dumps(1, 2), zipfile.ZIP_DEFLATED, bomb=bytes(1 << 20)), "compressed entries"),
    "count": (packed(storage_pickle(HUGE), **{"data/0": bytes(16)}), "8589934592 numbers in place of 16 bytes"),
    "old-count": (legacy(storage_pickle(HUGE), storages="0"), "the file ends early: a storage of 34359738368 bytes"),
    "no-storage": (packed(storage_pickle(4)), "no item named 'archive/data/0'"),
    "old-no-storage": (legacy(storage_pickle(0)), "a list of storages other than those it uses"),
    "old-other-count": (legacy(storage_pickle(1), storages="0", data=bytes(12)), "0 numbers in place of 4 bytes"),
    "kind": (packed(storage_pickle(4, b"QInt8Storage"), **{"data/0": bytes(4)}), r"torch\.QInt8Storage"),
    "module": (packed(b"\x80\x02X\x06\x00\x00\x00modulectorch\nFloatStorage\nN\x87Q."), "not that of a storage"),
    "two-pickles": (packed(b"\x80\x02N.", **{"b/data.pkl": b"\x80\x02N."}), "a zip with 2 entries data.pkl"),
    "byteorder": (packed(b"\x80\x02N.", byteorder="big"), "numbers of a 'big'-endian machine"),
    "old-byteorder": (legacy(b"\x80\x02N.", machine={"little_endian": False}), "numbers of a 'big'-endian machine"),
    "sparse": (saved(torch.eye(3).to_sparse()), "_rebuild_sparse_tensor"),
    "quantized": (packed(b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R."), "_rebuild_qtensor"),
    "meta": (saved(torch.ones(2, device="meta")), "_rebuild_meta_tensor"),
    "complex": (saved(torch.ones(2, dtype=torch.complex64)), "ComplexFloatStorage"),
}  # fmt: skip


@pytest.mark.skipif(sys.byteorder == "big", reason="the files here are those of little-endian machines")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    data, message = REFUSED[name]
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises((BrokenPickleError, UnsafePickleError), match=message) as caught:
            torch_file.loads(data)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and time.process_time() - began < 5


def test_entries_that_share_their_place():
    """A zip whose directory gives one entry under many names: much more than the file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(100_000))
        entry = archive.infolist()[-1]
        archive.filelist += [entry] * 100
    with pytest.raises(BrokenPickleError, match="a zip whose entries share their place"):
        torch_file.loads(file.getvalue())
