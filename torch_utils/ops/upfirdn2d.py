# SPDX-License-Identifier: Apache-2.0
"""Up-sample, filter and down-sample a batch of images.

Along each axis: put up-1 zeros after every sample, pad (or crop), convolve, keep every down-th value.
"""

import functools
import math

import torch
import torch.nn.functional as F

from torch_utils import custom_ops, misc

_CPU = torch.device("cpu")


def setup_filter(f, device=_CPU, normalize=True, flip_filter=False, gain=1, separable=None):
    """Makes the filter tensor that the functions below take.

    f: numbers in zero, one or two dimensions, or None for the identity.
    normalize: scale to a sum of 1. flip_filter: reverse every axis. gain: what filtering both axes multiplies
    by, on top.
    separable: leave a 1-D filter 1-D, to be applied along x and then y; default: when it has 8 taps or more.
    Returns float32, [taps] or [height, width].
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=device)
    assert f.ndim <= 2, f"a filter has at most two dimensions, not {f.ndim}"
    assert f.numel() > 0, "a filter needs at least one tap"
    f = f.reshape(1) if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    assert f.ndim == (1 if separable else 2), "only a filter with one dimension can be separable"
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
    """Up-samples, filters and down-samples each channel of x, with gradients of any order with respect to x.

    x: [N,C,H,W], floating point.
    f: float32 filter [height,width], or [taps] for a pass along x and one along y, or None for the identity.
    up, down: int or [x, y], at least 1.
    padding: int, [x, y] or [x_before, x_after, y_before, y_after], counted after up-sampling; negative crops.
    flip_filter: False convolves, True correlates. gain: multiplies the result.
    impl: 'cuda' uses own kernels for CUDA tensors where custom_ops allows it, accumulating 16-bit types in
    float32 with the float32 filter; 'ref' never does. Both give the same values up to rounding.
    Returns [N,C,H',W'] with H' = (H*up + before + after - taps) // down + 1, in x's dtype and memory format.
    """
    assert isinstance(x, torch.Tensor) and x.ndim == 4, "x must be a tensor [N,C,H,W]"
    assert impl in ("ref", "cuda"), f"impl is {impl!r}; accepted: 'ref', 'cuda'"
    up, down, padding = _parse_scaling(up), _parse_scaling(down), _parse_padding(padding)
    for taps, size, factor, pads in zip(_get_filter_size(f), _axes(x), up, _by_axis(padding), strict=True):
        assert size * factor + sum(pads) >= taps, (
            f"a filter of {taps} taps does not fit into {size * factor} + {pads[0]} + {pads[1]} pixels"
        )
    fused = impl == "cuda" and f is not None and custom_ops.kernels(x) is not None and x.numel() > 0
    assert not fused or f.device == x.device, f"the filter is on {f.device}, x on {x.device}"
    settings = up, down, padding, bool(flip_filter), float(gain), fused
    samples, channels = x.shape[:2]
    folded = _faster_folded(x)
    if folded:
        x = x.reshape(1, samples * channels, *x.shape[2:])
    if x.requires_grad and torch.is_grad_enabled():
        x = _Resample.apply(x, f, *settings)
    else:
        x = _resample(x, f, *settings)
    return x.reshape(samples, channels, *x.shape[2:]) if folded else x


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="cuda"):
    """Filters x [N,C,H,W] and keeps its size; `padding` (on top, see upfirdn2d) grows or crops the result."""
    extra = [(taps // 2, (taps - 1) // 2) for taps in _get_filter_size(f)]
    return upfirdn2d(x, f, padding=_widened(padding, extra), flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    """Enlarges x [N,C,H,W] by `up` and keeps its level: [N,C,H*up,W*up]; `padding` counts enlarged pixels."""
    up = _parse_scaling(up)
    sizes = zip(_get_filter_size(f), up, strict=True)
    padding = _widened(padding, [((taps + n - 1) // 2, (taps - n) // 2) for taps, n in sizes])
    gain = gain * up[0] * up[1]
    return upfirdn2d(x, f, up=list(up), padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    """Shrinks x [N,C,H,W] by `down`: [N,C,H/down,W/down]; `padding` (on top) counts pixels of x."""
    down = _parse_scaling(down)
    sizes = zip(_get_filter_size(f), down, strict=True)
    padding = _widened(padding, [((taps - n + 1) // 2, (taps - n) // 2) for taps, n in sizes])
    return upfirdn2d(x, f, down=list(down), padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def _parse_scaling(scaling):
    """int or [x, y] -> (x, y)."""
    pair = tuple(scaling) if isinstance(scaling, list | tuple) else (scaling, scaling)
    accepted = len(pair) == 2 and all(isinstance(n, int) and n >= 1 for n in pair)
    assert accepted, f"scaling is {scaling!r}; accepted: a Python int >= 1 or a pair [x, y] of them"
    return pair


def _parse_padding(padding):
    """int, [x, y] or [x_before, x_after, y_before, y_after] -> the latter."""
    pads = tuple(padding) if isinstance(padding, list | tuple) else (padding, padding)
    if len(pads) == 2:
        pads = (pads[0], pads[0], pads[1], pads[1])
    accepted = len(pads) == 4 and all(isinstance(n, int) for n in pads)
    assert accepted, f"padding is {padding!r}; accepted: one, two or four Python ints"
    return pads


def _get_filter_size(f):
    """(width, height) in taps; None counts as one tap."""
    if f is None:
        return 1, 1
    assert isinstance(f, torch.Tensor) and f.ndim in (1, 2), (
        "the filter must be a tensor of 1 or 2 dimensions"
    )
    assert f.dtype == torch.float32, f"the filter must be float32, not {f.dtype}"
    assert not f.requires_grad, "gradients with respect to the filter are not supported"
    return _ints(f.shape[-1], f.shape[0])


def _axes(x):
    """Width and height: everything here goes x first, as in the arguments."""
    return _ints(x.shape[3], x.shape[2])


def _ints(*sizes):
    """Sizes as Python ints; torch.jit.trace hands out tensors, which then become constants of the graph."""
    if not torch.jit.is_tracing():
        return sizes
    with misc.suppress_tracer_warnings():
        return tuple(int(size) for size in sizes)


def _by_axis(padding):
    return padding[:2], padding[2:]


def _widened(padding, extra):
    """`padding` plus (before, after) of each axis."""
    return [n + m for n, m in zip(_parse_padding(padding), [*extra[0], *extra[1]], strict=True)]


class _Resample(torch.autograd.Function):
    """The operation is linear in x and its transpose is of the same kind, and so is every gradient."""

    @staticmethod
    def forward(ctx, x, f, up, down, padding, flip_filter, gain, fused):
        ctx.save_for_backward(f)
        taps = _get_filter_size(f)
        out = _resample(x, f, up, down, padding, flip_filter, gain, fused)
        pads = []
        for axis, (before, _) in enumerate(_by_axis(padding)):
            size, result = _axes(x)[axis], _axes(out)[axis]
            pads.append(taps[axis] - before - 1)
            pads.append(size * up[axis] - result * down[axis] + before - up[axis] + 1)
        ctx.transposed = down, up, tuple(pads), not flip_filter, gain, fused
        return out

    @staticmethod
    def backward(ctx, dy):
        (f,) = ctx.saved_tensors
        return _Resample.apply(dy, f, *ctx.transposed), *[None] * 7


def _resample(x, f, up, down, padding, flip_filter, gain, fused):
    """upfirdn2d without autograd; 1-D filters take two passes."""
    if fused:
        return _resample_fused(x, f, up, down, padding, flip_filter, gain)
    if f is None and up == down == (1, 1):
        padded = _pad(x, *_by_axis(padding))
        return padded * gain if padded is x or gain != 1 else padded
    if f is None:
        f = torch.ones([1, 1], device=x.device)
    scaled = f.to(torch.promote_types(f.dtype, x.dtype)) * gain if gain != 1 else f
    f, scaled = f.to(x.dtype), scaled.to(x.dtype)
    pad_x, pad_y = _by_axis(padding)
    if f.ndim == 2:
        x = _filter_pass(x, scaled, up, down, pad_x, pad_y, flip_filter)
    else:
        x = _filter_pass(x, scaled[None, :], (up[0], 1), (down[0], 1), pad_x, (0, 0), flip_filter)
        x = _filter_pass(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0), pad_y, flip_filter)
    return x


def _faster_folded(x):
    """Whether to treat a batch of few-channel images as one with many channels.

    The CPU's kernels work on 16 channels at a time: 2 to 10 times faster for pictures; the reshape is free.
    Not while a graph is recorded: it would hold for one batch size only.
    """
    if custom_ops.is_recorded():
        return False
    return x.device.type == "cpu" and x.shape[0] > 1 and x.shape[1] < 16 and x.is_contiguous()


def _filter_pass(x, f, up, down, pad_x, pad_y, flip_filter, bias=None):
    """One filter [height,width] over every channel, plus the channel's bias (not for up-sampling).

    A depthwise convolution, transposed for up-sampling: the inserted zeros are never stored. On a CPU it runs
    at a copy's speed in channels-last; slices-and-adds, matrix products or two 1-D passes take 1.5 to 6 times
    as long.
    """
    channels, height, width = _ints(x.shape[1], *f.shape)
    if up == (1, 1):
        f = f if flip_filter else f.flip([0, 1])  # conv2d correlates
        inner = _common(pad_x), _common(pad_y)
        x = _pad(x, *((a - n, b - n) for n, (a, b) in zip(inner, (pad_x, pad_y), strict=True)))
        weight = f.expand(channels, 1, height, width)
        return F.conv2d(x, weight, bias, stride=down[::-1], padding=inner[::-1], groups=channels)
    f = f.flip([0, 1]) if flip_filter else f  # conv_transpose2d convolves
    # It yields all positions where filter and image meet: taps-1 more than the image before, taps-up after.
    crop_x = width - 1 - pad_x[0], width - up[0] - pad_x[1]
    crop_y = height - 1 - pad_y[0], height - up[1] - pad_y[1]
    inner = _common(crop_x), _common(crop_y)
    weight = f.expand(channels, 1, height, width)
    x = F.conv_transpose2d(x, weight, stride=up[::-1], padding=inner[::-1], groups=channels)
    x = _pad(x, *((n - a, n - b) for n, (a, b) in zip(inner, (crop_x, crop_y), strict=True)))
    return x if down == (1, 1) else _decimate(x, *down)


def _common(pads):
    """What the convolution may take over: the amount that both sides share."""
    return max(min(pads), 0)


def _pad(x, pad_x, pad_y):
    """Pads with zeros, or crops where negative."""
    return F.pad(x, [*pad_x, *pad_y]) if any(pad_x) or any(pad_y) else x


def _decimate(x, step_x, step_y):
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x[:, :, ::step_y, ::step_x].contiguous(memory_format=layout)


# --------------------------------------------------------------------------------------------------
# Own kernels


def _resample_fused(x, f, up, down, padding, flip_filter, gain):
    """upfirdn2d by kernels, without autograd."""
    backend = custom_ops.kernels(x)
    pad_x, pad_y = _by_axis(padding)
    if f.ndim == 2:
        return run_kernel(backend, x, f, *up, *down, *pad_x, *pad_y, flip_filter, gain)
    x = run_kernel(backend, x, f[None, :], up[0], 1, down[0], 1, *pad_x, 0, 0, flip_filter, gain)
    return run_kernel(backend, x, f[:, None], 1, up[1], 1, down[1], 0, 0, *pad_y, flip_filter, 1.0)


def run_kernel(backend, x, f, upx, upy, downx, downy, padx0, padx1, pady0, pady1, flip, gain):
    """One launch of kernels/upfirdn2d.cu, without autograd: f is [height,width], the rest as in upfirdn2d.

    Moves each value of x and of the result once (x is read where it lies, in any layout; patches overlap in the
    caches). Filters of usual size get a variant compiled for them; large ones, large factors and odd layouts a
    general one.
    """
    if isinstance(backend, custom_ops.Plugins):
        return backend.upfirdn2d(x, f, upx, upy, downx, downy, padx0, padx1, pady0, pady1, flip, gain)
    shape, (taps_y, taps_x) = x.shape, f.shape
    height = (shape[2] * upy + pady0 + pady1 - taps_y) // downy + 1
    width = (shape[3] * upx + padx0 + padx1 - taps_x) // downx + 1
    last = shape[1] > 1 and x.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(*shape[:2], height, width, dtype=x.dtype, device=x.device, memory_format=layout)
    layouts = _strided(x), _strided(y)
    plan = _plan(
        *layouts, x.dtype, last and custom_ops.aligned(x, y), (upx, upy), (downx, downy), (padx0, pady0),
        (taps_x, taps_y), int(flip), last,
    )  # fmt: skip
    name, defines, count, numbers = plan
    args = x, f.contiguous(), y, *layouts, *numbers, float(gain)
    backend.launch("upfirdn2d.cu", name, defines, count, args, x.device)
    return y


@functools.lru_cache(maxsize=1024)
def _plan(x, y, dtype, wide, up, down, pads, taps, flip, last):
    """How to launch: (kernel, macros, number of threads, further arguments). x, y: see `_strided`; wide: 16-byte
    accesses are possible; the rest as in run_kernel, (x, y) each."""
    defines = [
        f"SCALAR={custom_ops.DTYPES[dtype]}", f"INDEX={'int' if max(_extent(x), _extent(y)) < 2**31 else 'long long'}",
        f"CHANNELS_LAST={int(last)}",
    ]  # fmt: skip
    tile = _tile(up, down, taps, last)
    if tile is None:
        return "upfirdn2d_any", tuple(defines), math.prod(y[:4]), (*up, *down, *pads, *taps, flip)
    samples, channels, height, width = y[:4]
    pack = 16 // dtype.itemsize
    steps = [n for layout in (x, y) for n in (layout[4], *layout[6:])]
    pack = pack if wide and channels % pack == 0 and not any(n % pack for n in steps) else 1
    before = [
        -(-pad // factor) for pad, factor in zip(pads, up, strict=True)
    ]  # columns and rows of padding before x
    phases = [n * factor - pad for n, factor, pad in zip(before, up, pads, strict=True)]
    names = ("UPX", "UPY", "DOWNX", "DOWNY", "FW", "FH", "PHASEX", "PHASEY", "TX", "TY", "FLIP", "VEC")
    values = (*up, *down, *taps, *phases, *tile, flip, pack)
    defines += [f"{name}={value}" for name, value in zip(names, values, strict=True)]
    count = samples * (channels // pack) * math.ceil(width / tile[0]) * math.ceil(height / tile[1])
    return "upfirdn2d_tile", tuple(defines), count, tuple(-n for n in before)


_MAX_PATCH = 96  # values of x for one tile: all of them are unrolled


def _tile(up, down, taps, last):
    """(results along x, along y) of one thread, or None where the patch they need is too large.

    Channels-last: 2 x 2 results of some channels; channels-first: a column of results, so that neighbouring
    threads touch neighbouring memory. A tile is a multiple of the up-sampling.
    """
    wanted = (2, 2) if last else (1, 4 if down[1] == 1 else 2)
    tile = tuple(factor * max(n // factor, 1) for n, factor in zip(wanted, up, strict=True))
    patch = 1
    for axis in range(2):
        patch *= ((tile[axis] - 1) * down[axis] + taps[axis] + up[axis] - 2) // up[axis] + 1
    return None if patch > _MAX_PATCH or max(up) > 4 else tile


def _strided(x):
    """The kernel's Layout."""
    return (*x.shape, *x.stride())


def _extent(layout):
    """The largest of the number of elements and the offsets of a tensor."""
    offsets = sum((size - 1) * stride for size, stride in zip(layout[:4], layout[4:], strict=True))
    return max(offsets + 1, math.prod(layout[:4]))
