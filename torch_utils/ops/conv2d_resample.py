# SPDX-License-Identifier: Apache-2.0
"""Convolution with up-sampling before or down-sampling after it."""

import torch
import torch.nn.functional as F

from torch_utils import custom_ops

from . import conv2d_gradfix
from .upfirdn2d import _get_filter_size, _ints, _parse_padding, upfirdn2d


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """Up-samples x with the filter f, convolves it with w, down-samples the result with f.

    x: [N,C,H,W]. w: [O,C/groups,kh,kw] of x's dtype. f: see upfirdn2d.setup_filter; None for none.
    up, down: ints >= 1. padding: as in upfirdn2d, counted on the up-sampled image, on top of what keeps the
    image in place under f. flip_weight: True correlates (as torch does), False convolves; flip_filter is the
    same for f. Returns [N,O,H',W'], H' = H*up/down for an odd kernel and padding (kh-1)/2.
    On a CPU, large images take half the time when x is channels-last.
    """
    assert isinstance(x, torch.Tensor) and x.ndim == 4, "x must be a tensor [N,C,H,W]"
    assert isinstance(w, torch.Tensor) and w.ndim == 4, "w must be a tensor [O,C/groups,kh,kw]"
    assert w.dtype == x.dtype, f"w is {w.dtype}, x is {x.dtype}; they must be the same"
    (groups,) = _ints(groups)
    for name, n in (("up", up), ("down", down), ("groups", groups)):
        assert isinstance(n, int) and n >= 1, f"{name} is {n!r}; accepted: an int >= 1"
    pads = _total_padding(f, up, down, padding)

    def resample(image, **kwargs):
        return upfirdn2d(image, f, flip_filter=flip_filter, **kwargs)

    pointwise = _ints(*w.shape[2:]) == (1, 1)
    if up > 1 and down == 1 and pointwise:  # enlarge the result: fewer pixels to convolve
        return resample(_conv(x, w, groups, flip_weight), up=up, padding=pads, gain=up**2)
    if up > 1:
        x, pads = _conv_upsampled(x, w, up, pads, groups, flip_weight)
        x = resample(x, padding=pads, gain=up**2)
        return resample(x, down=down) if down > 1 else x
    if down > 1 and pointwise:  # shrink the input, likewise
        return _conv(resample(x, down=down, padding=pads), w, groups, flip_weight)
    if down > 1:
        return _conv(resample(x, padding=pads), w, groups, flip_weight, stride=down)
    if pads[0] == pads[1] >= 0 and pads[2] == pads[3] >= 0:
        return _conv(x, w, groups, flip_weight, padding=[pads[2], pads[0]])
    return _conv(upfirdn2d(x, None, padding=pads), w, groups, flip_weight)


def _total_padding(f, up, down, padding):
    """The caller's padding and what keeps the image in place: [x_before, x_after, y_before, y_after]."""
    pads = list(_parse_padding(padding))
    for axis, taps in enumerate(_get_filter_size(f)):
        if up > 1:
            pads[2 * axis] += (taps + up - 1) // 2
            pads[2 * axis + 1] += (taps - up) // 2
        if down > 1:
            pads[2 * axis] += (taps - down + 1) // 2
            pads[2 * axis + 1] += (taps - down) // 2
    return pads


def _conv(x, w, groups, flip_weight, stride=1, padding=0, bias=None):
    if not flip_weight and _ints(*w.shape[2:]) != (1, 1):
        w = w.flip([2, 3])
    if stride > 1 and groups == 1 and bias is None and padding == 0:
        shape = [(side - taps) // stride + 1 for side, taps in zip(x.shape[2:], w.shape[2:], strict=True)]
        if _few_positions(x, w, shape):
            return _conv_columns(x, w, stride, shape)
    return conv2d_gradfix.conv2d(x, w, bias, stride=stride, padding=padding, groups=groups)


def _few_positions(x, w, shape):
    """Whether a convolution with a stride, or its transpose, is faster as one matrix product: on a CPU where its
    smaller side, pictures of `shape`, has fewer positions than channels. The matrix of all values that meet the
    kernel is then smaller than the kernel, which a convolution would have to bring into another order."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if custom_ops.is_recorded():
        return False
    return x.shape[0] * shape[0] * shape[1] <= max(w.shape[:2])


def _conv_columns(x, w, stride, shape):
    """conv2d as a product with what the kernel meets at every position; gradients are products likewise."""
    num, out_channels = x.shape[0], w.shape[0]
    columns = F.unfold(x, w.shape[2:], stride=stride)  # [N,I*kh*kw,positions]
    out = torch.matmul(w.flatten(1), columns.transpose(0, 1).flatten(1))
    return out.reshape(out_channels, num, *shape).transpose(0, 1).contiguous()


def _conv_transpose_columns(x, w, stride, padding):
    """conv_transpose2d, w [I,O,kh,kw], likewise."""
    num, in_channels, height, width = x.shape
    columns = torch.matmul(w.flatten(1).t(), x.transpose(0, 1).reshape(in_channels, -1))
    columns = columns.reshape(-1, num, height * width).transpose(0, 1)  # [N,O*kh*kw,positions]
    sides = zip((height, width), w.shape[2:], padding, strict=True)
    shape = [(side - 1) * stride + taps - 2 * crop for side, taps, crop in sides]
    return F.fold(columns, shape, w.shape[2:], padding=padding, stride=stride)


def _by_phases(x, w):
    """Whether a transposed convolution, w [I,O,kh,kw], is faster as several convolutions: in bfloat16 on a CPU, where
    there are many positions and no gradients are asked for."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return False
    if custom_ops.is_recorded():
        return False
    return x.shape[0] * x.shape[2] * x.shape[3] >= 2 * max(w.shape[:2])


def _conv_transpose_phases(x, w, stride):
    """conv_transpose2d, w [I,O,kh,kw] with sides >= stride: the results at every stride-th position meet the same taps,
    y[stride * q + r] = sum_m w[stride * m + r] x[q - m]."""
    num, _, height, width = x.shape
    shape = [(side - 1) * stride + taps for side, taps in zip((height, width), w.shape[2:], strict=True)]
    out = torch.empty([num, w.shape[1], *shape], dtype=x.dtype, memory_format=torch.channels_last)
    for i in range(stride):
        for j in range(stride):
            taps = w[:, :, i::stride, j::stride].flip([2, 3]).transpose(0, 1)
            full = taps.shape[2] - 1, taps.shape[3] - 1
            out[:, :, i::stride, j::stride] = F.conv2d(x, taps, padding=full)
    return out


def _conv_upsampled(x, w, up, pads, groups, flip_weight):
    """Convolves x with zeros put between its pixels. Returns that and the padding still to be applied.

    A transposed convolution gives all positions where kernel and image meet: kernel-1 more than the image
    before it, kernel-up after it. It convolves, so here the weights are flipped for a correlation.
    """
    out_channels, in_per_group, height, width = _ints(*w.shape)
    out_per_group = out_channels // groups
    w = w.flip([2, 3]) if flip_weight else w
    w = w.reshape(groups, out_per_group, in_per_group, height, width).transpose(1, 2)
    w = w.reshape(groups * in_per_group, out_per_group, height, width)
    surplus = width - 1, width - up, height - 1, height - up
    left = [n - m for n, m in zip(pads, surplus, strict=True)]
    # What both sides would crop later, the transposed convolution need not compute.
    crop_x, crop_y = max(-max(left[:2]), 0), max(-max(left[2:]), 0)
    if groups == 1 and _few_positions(x, w, x.shape[2:]):
        x = _conv_transpose_columns(x, w, up, [crop_y, crop_x])
    elif groups == 1 and _by_phases(x, w) and crop_x == crop_y == 0 and min(w.shape[2:]) >= up:
        x = _conv_transpose_phases(x, w, up)
    else:
        x = conv2d_gradfix.conv_transpose2d(x, w, stride=up, padding=[crop_y, crop_x], groups=groups)
    return x, [n + m for n, m in zip(left, (crop_x, crop_x, crop_y, crop_y), strict=True)]
