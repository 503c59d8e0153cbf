# SPDX-License-Identifier: Apache-2.0
"""A whole layer on a CPU, without gradients: modulated convolution, noise, bias, activation, gain and clamp.

Convolutions reach the rate of a matrix product on a CPU; passes over large tensors do not. So every sample is
convolved with a kernel of its own that carries style, demodulation and gain, one after the other, the bias rides
along in the convolution or in the filter after it, and two passes over the result are left, of six. Wide layers are
convolved by tiles (winograd.py), with one kernel for all samples: the rest is done to the tiles.
"""

import torch
import torch.nn.functional as F

from torch_utils import custom_ops

from . import spatial_modulation, winograd
from .conv2d_resample import _conv, _conv_upsampled, _total_padding
from .tap_energy import energy_through
from .upfirdn2d import _by_axis, _filter_pass

_DTYPES = (torch.float32, torch.bfloat16)
_SLOPES = {"linear": 1.0, "lrelu": 0.2, "relu": 0.0}


def pays(x, weight, up, act):
    """Whether `layer` may be called and saves time: float32 or
    bfloat16 on a CPU, no gradients, no graph being recorded, and pictures so large that passes
    over them cost more than passes over a kernel per sample, or so many channels that tiles pay."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or act not in _SLOPES or up not in (1, 2):
        return False
    if torch.is_grad_enabled() or custom_ops.is_recorded():
        return False
    out_channels, in_channels, size = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    pixels = x.shape[2] * x.shape[3]
    if 5 * size * out_channels * in_channels < pixels * (2 * in_channels + 4 * up**2 * out_channels):
        return True
    return up == 1 and winograd.pays(x, weight, padding=1)


def layer(
    x, weight, styles, scale, noise, bias, up, padding, resample_filter, flip_weight, act, gain, clamp=None
):
    """clamp(act(conv(x * styles, weight) * scale + noise + bias) * gain).

    x [N,I,H,W], weight [O,I,k,k], styles: [N,I], None (ones), or a list of grids [N,I,h,w] that stand for the sum of
    their maps, scale: None (ones), [N,O], or a grid [N,O,h,w] that stands for its map, noise: None or broadcastable
    to the result, bias [O]; up, padding, resample_filter and flip_weight as in conv2d_resample; act: 'linear', 'relu'
    or 'lrelu', gain > 0. Kernels are made in weight's dtype.
    Returns [N,O,H*up,W*up] of x's dtype, channels-last.
    """
    num, slope = x.shape[0], _SLOPES[act]
    by_place = scale is not None and scale.ndim == 4
    if up == 1 and flip_weight and winograd.pays(x, weight, padding=padding):
        return _tiled_layer(x, weight, styles, scale, noise, bias, padding, slope, gain, clamp)
    x = x.contiguous(memory_format=torch.channels_last)
    grids = styles if isinstance(styles, list) else None
    if grids is not None:  # for one sample after the other: it is used while it is still in a cache
        styles, modulated = None, torch.empty_like(x[:1], memory_format=torch.channels_last)
    bias = (bias * gain).to(x.dtype)
    if noise is not None:
        noise = (noise * gain).to(x.dtype).expand(num, 1, *noise.shape[-2:])
    out = None
    for n in range(num):
        factor = gain if scale is None or by_place else (scale[n] * gain)[:, None, None, None]
        kernel = weight * factor if styles is None else weight * styles[n, :, None, None] * factor
        rest, each = None if by_place else bias, x[n : n + 1]
        if grids is not None:
            _modulate(each, [grid[n : n + 1] for grid in grids], _pixels(modulated))
            each = modulated
        y = _convolve(each, kernel.to(x.dtype), rest, up, padding, resample_filter, flip_weight)
        if by_place:
            for _, rows, style in _style_strips(y, [scale[n : n + 1]]):
                torch.addcmul(bias, _pixels(y)[0, rows], style, out=_pixels(y)[0, rows])
        y = y if noise is None else y.add_(noise[n : n + 1])
        if num == 1:
            out = y if slope == 1 else F.leaky_relu_(y, slope)
        else:
            if out is None:
                out = torch.empty_like(y.expand(num, -1, -1, -1), memory_format=torch.channels_last)
            torch.ops.aten.leaky_relu.out(y, slope, out=out[n : n + 1])
    return out if clamp is None else out.clamp_(-clamp, clamp)


def _tiled_layer(x, weight, styles, scale, noise, bias, padding, slope, gain, clamp):
    """`layer` by tiles."""
    num, size = x.shape[0], [side + 2 * padding - weight.shape[2] + 1 for side in x.shape[2:]]
    below, right = (-side % winograd.TILE for side in size)  # what tiles have beyond the result
    by_place = scale is not None and scale.ndim == 4
    scale = (weight.new_ones([num, 1]) if scale is None else scale) * gain
    if by_place:
        columns, tall = _tall_styles([num, len(weight), *size], [scale], x.dtype)
        columns = F.pad(columns, [0, 0, 0, right])
        tall = [F.pad(each, [0, 0, 0, 0, 0, below]) for each in tall]
    bias = bias * gain
    if noise is not None:
        noise = (noise * gain).expand(num, 1, *noise.shape[-2:])
        noise = _in_tiles(_pixels(F.pad(noise, [0, right, 0, below])))

    def fill(pixels):
        if isinstance(styles, list):
            _modulate(x.contiguous(memory_format=torch.channels_last), styles, pixels)
        elif styles is None:
            pixels.copy_(_pixels(x))
        else:
            torch.mul(_pixels(x), styles[:, None, None], out=pixels)

    def finish(samples, rows, y, out):
        if by_place:
            lines = slice(rows.start * winograd.TILE, rows.stop * winograd.TILE)
            for part, styles_down in zip(y, tall[samples], strict=True):
                part.mul_(_in_tiles(torch.matmul(columns, styles_down[lines])[None])[0])
            y.add_(bias)
        else:
            torch.addcmul(bias, y, scale[samples, None, None, None, None], out=y)
        if noise is not None:
            y.add_(noise[samples, rows])
        torch.ops.aten.leaky_relu.out(y, slope, out=out)
        if clamp is not None:
            out.clamp_(-clamp, clamp)

    return winograd.layer(x.shape, weight, padding, fill, finish)


def _in_tiles(pixels):
    """[N,H,W,C] -> [N,H/4,4,W/4,4,C]."""
    return pixels.unflatten(2, [-1, winograd.TILE]).unflatten(1, [-1, winograd.TILE])


def _convolve(x, kernel, bias, up, padding, resample_filter, flip_weight):
    """conv2d_resample for one sample, plus bias."""
    if up == 1:
        return _conv(x, kernel, 1, flip_weight, padding=padding, bias=bias)
    pads = _total_padding(resample_filter, up, 1, padding)
    x, pads = _conv_upsampled(x, kernel, up, pads, 1, flip_weight)
    taps = resample_filter if resample_filter.ndim == 2 else torch.outer(resample_filter, resample_filter)
    return _filter_pass(x, (taps * up**2).to(x.dtype), (1, 1), (1, 1), *_by_axis(pads), False, bias)


# ----------------------------------------------------------------------------------------
# Styles that vary in space: grids that stand for the sum of their maps, see spatial_modulation


def spatial_layer(x, weight, grids, demodulate, noise, bias, **options):
    """`layer` with the styles' maps of `grids` (list of [N,I,h,w]). demodulate: True, by the mean of their squares
    (circular borders), False, or `layer`'s scale. options: those of `layer` from `up` on."""
    scale = demodulate if isinstance(demodulate, torch.Tensor) else None
    if demodulate is True:
        energy = spatial_modulation.mean_square(grids, *x.shape[2:])  # [N,I]
        scale = (energy_through(weight, energy) + 1e-8).rsqrt()
    return layer(x, weight, grids, scale, noise, bias, **options)


def _modulate(x, grids, out):
    """x [N,C,H,W], channels-last, times the sum of the grids' maps, into out [N,H,W,C]."""
    for n, rows, style in _style_strips(x, grids):
        torch.mul(_pixels(x)[n, rows], style, out=out[n, rows])


def spatial_to_rgb(x, matrix, grids, bias):
    """matrix [O,I] times (x * styles), plus bias [O], at every pixel: [N,O,H,W], channels-last. No copy of x."""
    x = x.contiguous(memory_format=torch.channels_last)
    num, channels, height, width = x.shape
    matrix, bias = matrix.t().to(x.dtype), bias.to(x.dtype)
    if sum(grid.shape[3] for grid in grids) * len(bias) <= channels:
        return _rows_to_rgb(x, matrix, grids, bias)
    out = x.new_empty([num, height, width, len(bias)])
    for n, rows, style in _style_strips(x, grids):
        modulated = torch.mul(_pixels(x)[n, rows], style, out=style)
        torch.addmm(bias, modulated.flatten(0, 1), matrix, out=out[n, rows].flatten(0, 1))
    return out.permute(0, 3, 1, 2)


def _rows_to_rgb(x, matrix, grids, bias):
    """`spatial_to_rgb` where the grids have few columns: every row of x times one matrix for each of them, and the
    results mixed along the row. Only the grids' styles are ever made."""
    num, channels, height, width = x.shape
    columns, tall = _tall_styles(x.shape, grids, x.dtype)  # [W,J], [H,J,C] for every sample
    kernels = torch.stack(list(tall))[:, :, :, None] * matrix.t()  # [N,H,J,O,C]
    kernels = kernels.view(num * height, -1, channels).transpose(1, 2)
    shares = columns.repeat_interleave(len(bias), dim=1)  # [W,J*O]
    total = torch.eye(len(bias), dtype=x.dtype).repeat(columns.shape[1], 1)  # [J*O,O]: a sum over J
    y = torch.bmm(_pixels(x).flatten(0, 1), kernels).mul_(shares)  # [N*H,W,J*O]
    return torch.addmm(bias, y.flatten(0, 1), total).view(num, height, width, -1).permute(0, 3, 1, 2)


_STRIP = 2**18  # values: a strip of x, its styles and their product stay in a core's cache


def _pixels(x):
    return x.permute(0, 2, 3, 1)  # [N,H,W,C], contiguous where x is channels-last


def _style_strips(x, grids):
    """Yields (sample, slice of rows, the map there [rows,W,C] of x's dtype): no map is ever stored as a whole."""
    _, channels, height, width = x.shape
    step = max(_STRIP // (width * channels), 1)
    buffer = x.new_empty([min(step, height), width, channels])
    columns, tall = _tall_styles(x.shape, grids, x.dtype)
    for n, styles in enumerate(tall):
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            style = buffer[: rows.stop - first]
            torch.bmm(columns.expand(len(style), -1, -1), styles[rows], out=style)
            yield n, rows, style


def _tall_styles(shape, grids, dtype):
    """([W,J], generator of [H,J,C] for every sample): the grids resized along y, which is little, their columns side
    by side, and the matrix that resizes them along x and adds them up."""
    num, channels, height, _ = shape
    axes = [
        [spatial_modulation._axis(grid.shape[axis], shape[axis], dtype, grid.device) for grid in grids]
        for axis in (2, 3)
    ]
    flat = [_pixels(grid.to(dtype)).reshape(num, grid.shape[2], -1) for grid in grids]  # [N,h,w*C]

    def tall(n):
        maps = [
            torch.matmul(rows, grid[n]).reshape(height, -1, channels)
            for rows, grid in zip(axes[0], flat, strict=True)
        ]
        return torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]

    columns = torch.cat(axes[1], dim=1) if len(grids) > 1 else axes[1][0]
    return columns, map(tall, range(num))
