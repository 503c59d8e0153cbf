# SPDX-License-Identifier: Apache-2.0
"""The restricted reader against Python's own unpickler, and a corpus of hostile files, none of which may run, hang, or
give anything but one clear error."""

import collections
import copyreg
import io
import os
import pickle
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch

import dnnlib
from training.formats import safe_pickle
from training.formats.safe_pickle import BrokenPickleError, UnsafePickleError, read

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def load(data):
    return read(io.BytesIO(data))


# --- what it must read: the same as Python's

shared = ["x", 1]
PLAIN = {
    "numbers": [0, -1, 255, 256, 65536, 2**31, -(2**40), 2**100, True, False, None, 1.5, -0.0, 1e300],
    "text": ["", "a", "\u00e4\u4e16\n", "x" * 300],
    "bytes": [b"", b"\x00\xff", b"y" * 300],
    "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], {}, {"a": {"b": [1, (2,)]}}, {1: 2}],
    "sets": [set(), {1, "b"}, frozenset([1, 2])],
    "shared": [shared, shared, {"again": shared}],
    "dicts": [collections.OrderedDict([("b", 1), ("a", 2)]), collections.OrderedDict()],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_values(name, protocol):
    value = PLAIN[name] if protocol >= 4 else [each for each in PLAIN[name] if type(each) is not frozenset]
    data = pickle.dumps(value, protocol)
    assert load(data) == pickle.loads(data) == value
    assert [type(each) for each in load(data)] == [type(each) for each in value]


def test_shared_objects_stay_shared():
    first, second, third = load(pickle.dumps(PLAIN["shared"], 4))
    assert first is second is third["again"]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(5, dtype=">i4"),
        np.zeros([0, 3], dtype=np.uint8),
        np.array(2.5),
        np.arange(10)[::3],
        np.array([True, False]),
    ],
    ids=str,
)
def test_arrays(array, protocol):
    for value in [array, [array, array], ("name", array)]:
        found, expected = load(pickle.dumps(value, protocol)), value
        pairs = zip(found, expected, strict=True) if isinstance(value, (list, tuple)) else [(found, expected)]
        for a, b in pairs:
            assert (
                np.array_equal(a, b)
                and type(a) is type(b)
                and getattr(a, "dtype", 0) == getattr(b, "dtype", 0)
            )


@pytest.mark.parametrize("number", [np.float64(1.25), np.float32(3), np.int64(-7), np.bool_(True)], ids=repr)
def test_numpy_numbers_become_python_numbers(number):
    found = load(pickle.dumps(number, 4))
    assert found == number and type(found) is type(number.item())


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.tensor(3.0),
        torch.zeros([0, 2]),
        torch.arange(20.0)[5:15:2],
        torch.arange(4, dtype=torch.float16),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda t: f"{t.dtype}-{list(t.shape)}-{t.stride()}",
)
def test_tensors(tensor, protocol):
    found = load(pickle.dumps({"t": tensor}, protocol))["t"]
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.stride() == tensor.stride()


def test_easydict_and_the_place_behind_the_pickle():
    file = io.BytesIO(pickle.dumps(dnnlib.EasyDict(a=dnnlib.EasyDict(b=1)), 4) + b"rest")
    found = read(file)
    assert type(found.a) is dnnlib.EasyDict and found.a.b == 1 and file.read() == b"rest"


# --- what it must refuse

MARKER = "executed-by-a-pickle"


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


TOUCH = f"touch {MARKER}"
COMMAND = text(TOUCH)
OS = os.system.__module__.encode()  # posix, or nt
CODE = f"open({MARKER!r}, 'w').close()"


def storage_of(payload):
    """A pickle whose nested torch storage is a file of its own."""
    return pickle.dumps(Call(torch.storage._load_from_bytes, payload), 4)


def zipped(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


HOSTILE = {
    "global-reduce": b"c" + OS + b"\nsystem\n(V" + TOUCH.encode() + b"\ntR.",
    "stack-global": b"\x80\x04" + text("os") + text("system") + b"\x93" + COMMAND + b"\x85R.",
    "inst": b"(V" + TOUCH.encode() + b"\ni" + OS + b"\nsystem\n.",
    "obj": b"(c" + OS + b"\nsystem\nV" + TOUCH.encode() + b"\no.",
    "newobj": b"\x80\x02csubprocess\nPopen\nV" + TOUCH.encode() + b"\n\x85\x81.",
    "newobj-ex": b"\x80\x04" + text("subprocess") + text("Popen") + b"\x93)}\x92.",
    "eval": pickle.dumps(Call(eval, CODE), 4),
    "exec": pickle.dumps(Call(exec, CODE), 4),
    "getattr": pickle.dumps(Call(getattr, os, "system") if False else Call(getattr, "os", "system"), 4),
    "import": pickle.dumps(Call(__import__, "antigravity"), 4),
    "dotted": b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93" + COMMAND + b"\x85R.",
    "dotted-known": b"\x80\x04" + text("dnnlib.util") + text("EasyDict.__init__.__globals__") + b"\x93.",
    "method-of-known": b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.",
    "torch-load": pickle.dumps(Call(torch.load, "x"), 4),
    "numpy-load": pickle.dumps(Call(np.load, "x", None, True), 4),
    "state": pickle.dumps(Call(collections.OrderedDict, state={"__class__": 1}), 4),
    "state-of-a-class": b"\x80\x04"
    + text("dnnlib.util")
    + text("EasyDict")
    + b"\x93}"
    + text("a")
    + b"K\x01sb.",
    "slots-of-a-class": b"\x80\x04"
    + text("dnnlib.util")
    + text("EasyDict")
    + b"\x93N}"
    + text("a")
    + b"K\x01s\x86b.",
    "items-of-a-class": b"\x80\x04"
    + text("dnnlib.util")
    + text("EasyDict")
    + b"\x93"
    + text("a")
    + b"K\x01s.",
    "append-to-a-dict": b"\x80\x04}K\x01a.",
    "call-of-a-value": b"\x80\x04" + text("os.system") + COMMAND + b"\x85R.",
    "call-of-an-inert-name": b"\x80\x04" + text("numpy") + text("ndarray") + b"\x93" + b"K\x01\x85R.",
    "newobj-with-arguments": b"\x80\x04" + text("dnnlib.util") + text("EasyDict") + b"\x93}\x85\x81.",
    "persistent-id": b"P" + TOUCH.encode() + b"\n.",
    "binary-persistent-id": b"\x80\x02" + COMMAND + b"Q.",
    "extension-1": b"\x80\x02\x82\xf0" + COMMAND + b"\x85R.",
    "extension-2": b"\x80\x02\x83\xf0\x00" + COMMAND + b"\x85R.",
    "extension-4": b"\x80\x02\x84\xf0\x00\x00\x00" + COMMAND + b"\x85R.",
    "out-of-band": b"\x80\x05\x97.",
    "nested-storage": storage_of(pickle.dumps(Call(os.system, TOUCH), 4)),
    "nested-zip": storage_of(zipped(Call(os.system, TOUCH))),
    "nested-old-format": storage_of(
        b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}, Call(os.system, TOUCH), []))
    ),
    "nested-not-a-storage": storage_of(zipped({"a": torch.ones(1)})),
    "object-array": pickle.dumps(np.array([Call(os.system, TOUCH)], dtype=object), 4),
    "record-array": pickle.dumps(np.zeros(2, dtype=[("a", "f4")]), 4),
    "array-subclass": pickle.dumps(np.ma.masked_array([1.0]), 4),
    "codec": pickle.dumps(Call(__import__("_codecs").encode, "x", "rot13"), 4),
    "tuple-key": pickle.dumps({(1, 2): 3}, 4),
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Whatever a payload does by relative names happens here, and is seen."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not os.path.exists(MARKER)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name):
    copyreg.add_extension(OS.decode(), "system", 0xF0)
    try:
        with pytest.raises(UnsafePickleError) as caught:
            load(HOSTILE[name])
    finally:
        copyreg.remove_extension(OS.decode(), "system", 0xF0)
    assert "\n" not in str(caught.value) and 3 < len(str(caught.value)) < 300


def test_the_payloads_are_able_to_run():
    """Else the test above would prove nothing: Python's unpickler runs the command."""
    for name in ["global-reduce", "stack-global", "inst", "obj", "eval", "dotted", "nested-not-a-storage"]:
        try:
            pickle.loads(HOSTILE[name])
        except Exception:
            assert name == "nested-not-a-storage"
        if name != "nested-not-a-storage":
            os.remove(MARKER)


def test_an_unknown_class_is_named():
    with pytest.raises(UnsafePickleError, match=r"collections\.Counter"):
        load(pickle.dumps(collections.Counter("aab"), 4))


def tensor_call(size, stride, offset=0):
    storage = pickle.loads(pickle.dumps(torch.ones(4)))  # a real one, in the arguments of a false shape
    reduced = storage.__reduce_ex__(4)
    return pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, reduced[1][0], offset, size, stride, False, {}), 4
    )


def array_of(shape):
    made, args, (version, _shape, dtype, fortran, data) = np.ones(4).__reduce__()
    return pickle.dumps(Call(made, *args, state=(version, shape, dtype, fortran, data)), 4)


HUGE = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "bytes-of-4-GB": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",
    "long": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"x.",
    "memo": b"\x80\x04N\x8a\x01\x00r" + b"\xff\xff\xff",
    "line": b"V" + b"a" * 10000,
    "digits": b"I" + b"9" * 10000 + b"\n.",
    "tensor": tensor_call((2**39,), (1,)),
    "tensor-of-one-number": tensor_call((2**20, 2**18), (0, 0)),
    "tensor-beyond": tensor_call((4,), (1,), offset=1),
    "tensor-negative": tensor_call((4,), (-1,)),
    "array": array_of((2**40,)),
    "array-negative": array_of((-5,)),
    "nested": storage_of(
        b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
        + b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + b"\x8a\x06\x00\x00\x00\x00\x00\x40Nt\x51."
        + pickle.dumps(["0"], 2)
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_claims_cost_nothing(name):
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises((BrokenPickleError, UnsafePickleError)) as caught:
            load(HUGE[name])
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and time.process_time() - began < 5


def test_no_hang_on_values_that_contain_each_other():
    nested = b"\x80\x04)" + b"2\x86" * 80  # a tuple of 2^80 leaves, made of 80 pairs
    assert load(nested + b".") is not None
    for use in [
        b"}\x94" + nested[2:] + b"Ns.",
        b"\x8f\x94(" + nested[2:] + b"\x90.",
        b"(" + nested[2:] + b"\x91.",
    ]:
        with pytest.raises(UnsafePickleError, match="a tuple as a key"):
            load(b"\x80\x04" + use)


def doubled(depth):
    """Instructions for a list that holds a list twice, which holds a list twice, ..."""
    return b"]\x94" + b"".join(b"0](h%ch%ce\x94" % (i, i) for i in range(depth))


def call(module, name, arguments):
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + arguments + b"R."


PAIRS = b")" + b"2\x86" * 80
TANGLED = {
    "dtype": (call("numpy", "dtype", PAIRS + b"\x85"), "NumPy data of the kind a tuple"),
    "encoding": (call("_codecs", "encode", text("a") + PAIRS + b"\x86"), "text in the encoding a tuple"),
    "encoding-list": (call("_codecs", "encode", doubled(80) + b"0" + text("a") + b"h\x50\x86"), "encoding a list"),
    "order": (call("numpy", "dtype", text("f4") + b"\x85")[:-1] + b"(K\x03" + PAIRS + b"tb.", "a byte order"),
    "dimensions": (tensor_call((2**39,) * 10**5, (0,) * 10**5), "a tensor whose shape is not one"),
    "array-dimensions": (array_of((1,) * 10**5), "a NumPy array whose shape is not one"),
    "stride": (tensor_call((2,), (2**31,)), "a tensor of shape .2., stride .2147483648. in a storage of 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", TANGLED)
def test_no_hang_in_messages_and_checks(name):
    """What would take for ever to print, to hash or to multiply is only named."""
    data, message = TANGLED[name]
    with pytest.raises((BrokenPickleError, UnsafePickleError), match=message) as caught:
        load(data)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["encode", "storage", "set", "dict"])
def test_calls_again_and_again_do_not_multiply_the_data(name):
    _load, (nested,) = torch.zeros(50_000).__reduce_ex__(4)[1][0].__reduce__()
    function, argument = {
        "encode": (b"c_codecs\nencode\n", pickle.dumps("x" * 200_000, 4)[2:-1]),
        "storage": (b"ctorch.storage\n_load_from_bytes\n", pickle.dumps(nested, 4)[2:-1]),
        "set": (b"cbuiltins\nset\n", pickle.dumps([*range(50_000)], 4)[2:-1]),
        "dict": (b"ccollections\nOrderedDict\n", pickle.dumps([(i, 0) for i in range(9_000)], 4)[2:-1]),
    }[name]
    assert len(nested) > 200_000
    data = b"\x80\x04" + argument + b"r\xff\xff\xff\x00" + function + b"r\xfe\xff\xff\x00"
    data += b"j\xfe\xff\xff\x00j\xff\xff\xff\x00\x85R" * 2000 + b"."
    tracemalloc.start()
    try:
        with pytest.raises(BrokenPickleError, match="the same data again and again"):
            load(data)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(data) + 20e6
    finally:
        tracemalloc.stop()


def test_storages_do_not_hold_storages():
    inner = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + storage_of(b"x")
    with pytest.raises(UnsafePickleError, match="a storage within a storage"):
        load(storage_of(inner))


def test_a_flood_of_instructions_ends(monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_OPCODES", 1000)
    with pytest.raises(BrokenPickleError, match="more than 1,000 instructions"):
        load(b"\x80\x04" + b"N0" * 501 + b"N.")


SAMPLE = pickle.dumps(
    dict(a=[1, 2.5, "x"], t=torch.ones(3), n=np.arange(4), d=dnnlib.EasyDict(k=(1, None)), s={1, 2}), 4
)


@pytest.mark.parametrize("data", [b"", b"<!doctype html>", b"\x80\x04", b"\x80\x63N.", b".", b"0.", b"e."])
def test_what_is_no_pickle(data):
    with pytest.raises(BrokenPickleError) as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_truncated_files():
    for length in range(len(SAMPLE) - 1):
        with pytest.raises((BrokenPickleError, UnsafePickleError)) as caught:
            load(SAMPLE[:length])
        assert "\n" not in str(caught.value)


def test_flipped_bits_and_random_bytes():
    rnd = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(3000):
        data = bytearray(SAMPLE)
        for _ in range(rnd.choice([1, 1, 2, 8])):
            data[rnd.randrange(len(data))] = (
                rnd.randrange(256) if rnd.random() < 0.5 else rnd.choice(b"cR\x93\x81bi.oQ")
            )
        try:
            load(bytes(data))
            outcomes["read"] += 1
        except (BrokenPickleError, UnsafePickleError) as err:
            assert "\n" not in str(err)
            outcomes[type(err).__name__] += 1
    assert all(outcomes[kind] > 100 for kind in ["read", "BrokenPickleError", "UnsafePickleError"]), outcomes
