# SPDX-License-Identifier: Apache-2.0
"""torch_utils.cuda_driver on a driver library that writes down what it is asked for."""

import ctypes
import threading

import pytest
import torch

from torch_utils import cuda_driver


class FakeLibrary:
    """The calls of the driver that are used; `fail` maps a name to the status it returns."""

    def __init__(self):
        self.calls, self.fail, self.stack = [], {}, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args))
            return self.fail.get(name, 0)

        return call

    def cuDeviceGet(self, number, index):
        number._obj.value = 100 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, context, number):
        self.calls.append(("retain", number.value))
        context._obj.value = 1000 + number.value
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.stack.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        context._obj.value = self.stack.pop()
        return 0

    def cuModuleLoadData(self, module, image):
        module._obj.value = len(image)
        self.calls.append(("load", list(self.stack)))
        return self.fail.get("cuModuleLoadData", 0)

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = {b"bias_act": 7}[name] + module.value
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"bad image"
        return 0


@pytest.fixture
def library():
    return FakeLibrary()


@pytest.fixture
def driver(library):
    return cuda_driver.Driver(library)


def test_loading(driver, library):
    assert library.calls == [("cuInit", (0,))]
    function = driver.function(b"\x7fELF", "bias_act", device=1)
    assert function.value == 11
    assert library.calls[1:] == [("retain", 101), ("load", [1101])]
    assert library.stack == []


def test_launching(driver, library):
    x = torch.arange(5.0)
    launched = {}

    def launch(function, *rest):
        *geometry, shared, stream, params, extra = rest
        values = (ctypes.c_void_p * 5).from_address(ctypes.addressof(params))
        pointer, null = (ctypes.c_void_p.from_address(values[i]).value for i in (0, 1))
        launched.update(
            function=function, geometry=geometry, shared=shared, stream=stream.value, extra=extra, pointer=pointer,
            null=null, number=ctypes.c_longlong.from_address(values[2]).value,
            real=ctypes.c_double.from_address(values[3]).value,
            structure=list((ctypes.c_longlong * 3).from_address(values[4])), context=list(library.stack),
        )  # fmt: skip
        return 0

    library.cuLaunchKernel = launch
    driver.launch("f", 257, (x, None, -(2**40), 0.1, (1, 2, 3)), device=0, stream=2**33)
    assert launched == {
        "function": "f", "geometry": [2, 1, 1, 256, 1, 1], "shared": 0, "stream": 2**33, "extra": None,
        "pointer": x.data_ptr(), "null": None, "number": -(2**40), "real": 0.1, "structure": [1, 2, 3],
        "context": [1100],
    }  # fmt: skip
    driver.launch("f", 256, (x, None, 1, 1.0, (1, 2, 3)), device=0, stream=0)
    assert launched["geometry"][0] == 1 and launched["stream"] is None


def test_contexts_are_retained_once_and_left_again(driver, library):
    for device in (0, 1, 0):
        driver.launch("f", 1, (), device, 0)
    thread = threading.Thread(target=driver.launch, args=("f", 1, (), 1, 0))
    thread.start()
    thread.join()
    assert [call for call in library.calls if call[0] == "retain"] == [("retain", 100), ("retain", 101)]
    assert library.stack == []


def test_errors_name_the_call(driver, library):
    library.fail = {"cuModuleLoadData": 200, "cuLaunchKernel": 700}
    with pytest.raises(RuntimeError, match=r"^cuModuleLoadData: bad image \(200\)$"):
        driver.function(b"", "bias_act", 0)
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel: bad image \(700\)$"):
        driver.launch("f", 1, (), 0, 0)
    assert library.stack == []  # the thread's own context is current again
    library.fail = {"cuInit": 100}
    with pytest.raises(RuntimeError, match="cuInit"):
        cuda_driver.Driver(library)


@pytest.mark.parametrize("count", [0, 256 * 2**31])
def test_launches_of_impossible_size(driver, count):
    with pytest.raises(AssertionError, match="threads are too many for one launch, or none"):
        driver.launch("f", count, (), 0, 0)


def test_no_driver(monkeypatch):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(OSError, match="libcuda"):
            cuda_driver.Driver()
    else:
        pytest.skip("a driver is installed here")
