# SPDX-License-Identifier: Apache-2.0
"""Loads compiled CUDA kernels and launches them on PyTorch's tensors and streams, through the driver's C interface."""

import contextlib
import ctypes
import sys

import torch

THREADS = 256  # of a block; the kernels are compiled for it
MAX_BLOCKS = 2**31 - 1


class Driver:
    """The CUDA driver library. Raises OSError where there is none, RuntimeError where a call fails.

    Works in the primary context of each device, which is PyTorch's, whatever context the calling thread has.
    """

    def __init__(self, library=None):
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        self._library = ctypes.CDLL(name) if library is None else library
        self._contexts = {}
        self._call("cuInit", 0)

    def function(self, image: bytes, name: str, device: int) -> ctypes.c_void_p:
        """The kernel `name` of a compiled image (machine code or PTX), loaded on a device; it stays loaded."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with self._current(device):
            self._call("cuModuleLoadData", ctypes.byref(module), image)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, function: ctypes.c_void_p, count: int, args: tuple, device: int, stream: int) -> None:
        """Starts at least `count` threads of a kernel on a stream (a cudaStream_t as a number).

        args: tensors and None (pointers), ints (long long), floats (double), tuples of ints (structures).
        """
        blocks = -(-count // THREADS)
        assert 0 < blocks <= MAX_BLOCKS, f"{count} threads are too many for one launch, or none"
        held, params = pack(args)
        with self._current(device):
            self._call(
                "cuLaunchKernel", function, blocks, 1, 1, THREADS, 1, 1, 0, ctypes.c_void_p(stream), params, None
            )  # fmt: skip
        del held

    @contextlib.contextmanager
    def _current(self, device):
        """Inside, the device's primary context is the thread's current one."""
        if device not in self._contexts:
            number, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(number), device)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
            self._contexts[device] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[device])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name, *args):
        status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


def pack(args: tuple) -> tuple:
    """(values, pointers to them) as cuLaunchKernel takes the arguments of a kernel, see Driver.launch."""
    values = [_value(arg) for arg in args]
    return values, (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


def _value(arg):
    if arg is None or isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(None if arg is None else arg.data_ptr())
    if isinstance(arg, tuple):
        return (ctypes.c_longlong * len(arg))(*arg)
    return ctypes.c_longlong(arg) if isinstance(arg, int) else ctypes.c_double(arg)
