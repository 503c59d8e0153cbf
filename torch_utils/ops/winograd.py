# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions on a CPU with a quarter of the multiplications (Winograd 1980; Lavin and Gray, arXiv:1509.09308).

Along one axis, four results are A^T ((G w) . (B x)) with '.' pointwise: w the three taps, x the six values that the
results need. A, G and B evaluate and interpolate polynomials at six points (Toom-Cook), so that there are 6 products
in place of 12; in the plane 36 in place of 144. For an image and its channels these are 36 matrix products

    [tiles, channels] by [channels, channels],  tiles of 4x4 results,

between a transformation of the tiles before and one after them. Gradients, of any order, are convolutions of the same
kind. With these points rounding errors are as small as those of PyTorch's own convolution (within 3e-6 of the results'
standard deviation, the largest of a million within 3e-5).
"""

import functools

import torch

from torch_utils import custom_ops

_TILE, _TAPS = 4, 3
_VALUES = _TILE + _TAPS - 1  # along one axis
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))  # and infinity
_CHANNELS, _TILES = 128, 64  # from so many on, the transformations cost less than they save


def pays(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """Whether `conv2d` can do this convolution and saves time: float32 on a CPU, a 3x3 kernel that moves by single
    pixels, many channels and tiles, and nobody looking on who wants PyTorch's own operation (a tracer or compiler,
    autocast, torch.func, forward-mode derivatives, --ops=reference)."""
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or custom_ops.is_watched(x)
    ):
        return False
    if custom_ops.is_reference():
        return False
    if x.ndim != 4 or tuple(weight.shape[2:]) != (_TAPS, _TAPS) or min(weight.shape[:2]) < _CHANNELS:
        return False
    if _pair(stride) != (1, 1) or _pair(dilation) != (1, 1) or groups != 1 or isinstance(padding, str):
        return False
    if max(_pair(padding)) >= _TAPS or min(_pair(padding)) < 0:
        return False
    rows, columns = (side // _TILE for side in _size(x, _pair(padding)))
    return min(rows, columns) > 0 and x.shape[0] * rows * columns >= _TILES


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _size(x, padding):
    return [side + 2 * pad - _TAPS + 1 for side, pad in zip(x.shape[2:], padding, strict=True)]


def conv2d(x, weight, bias=None, padding=0):
    """torch.nn.functional.conv2d for what `pays`: x [N,C,H,W], weight [O,C,3,3], bias [O], padding 0, 1 or 2 (an int
    or one for each axis) -> [N,O,H',W'], channels-last."""
    padding = _pair(padding)
    if torch.is_grad_enabled():
        y = _Conv.apply(x, weight, padding, False, _size(x, padding))
        return y if bias is None else y + bias[:, None, None]
    return _convolve(x, weight, padding, False, _size(x, padding), bias)


@functools.cache
def _matrices(transposed, dtype):
    """A^T [16,36], G [36,9] and B [36,36] for both axes at once; G of the mirrored kernel for a transposed
    convolution."""
    points = torch.tensor(_POINTS, dtype=torch.float64)

    def powers(count):  # 1, x, x^2, ... at the points; at infinity, only the highest counts
        return torch.cat([points[:, None] ** torch.arange(count), torch.eye(count, dtype=torch.float64)[-1:]])

    parts = [powers(_TILE), powers(_TAPS), torch.linalg.inv(powers(_VALUES)).t()]
    sizes = torch.stack([part.norm(dim=1, keepdim=True) for part in parts]).log()
    scales = (sizes.mean(dim=0) - sizes).exp()  # make the three rows of every product the same size
    A, G, B = (part * scale for part, scale in zip(parts, scales, strict=True))
    G = G.flip(1) if transposed else G
    return [torch.kron(x, x).to(dtype).contiguous() for x in (A.t(), G, B)]


class _Tiles:
    """matrix [36,size^2] times the tiles of images [N,C,H,W], some tiles at a time, in memory that is used again.

    A tile has size x size values; the first starts `before` = (y, x) pixels outside the image, where values are zero,
    and they follow each other at every four. counts: their numbers (rows, columns)."""

    def __init__(self, matrix, images, before, counts):
        self.matrix, size = matrix, round(matrix.shape[1] ** 0.5)
        num, channels, height, width = images.shape
        shape = [_TILE * (count - 1) + size for count in counts]
        pixels = images.permute(0, 2, 3, 1)
        if any(before) or shape != [height, width] or not pixels.is_contiguous():
            y, x = before
            padded = images.new_empty([num, *shape, channels])
            padded[:, y : y + height, x : x + width] = pixels[:, : shape[0] - y, : shape[1] - x]
            for border in (
                padded[:, :y],
                padded[:, y + height :],
                padded[:, :, :x],
                padded[:, :, x + width :],
            ):
                border.zero_()
            pixels = padded
        n, h, w, c = pixels.stride()
        steps = [h, w, n, _TILE * h, _TILE * w, c]
        shape = [size, size, num, *counts, channels]
        self.view = pixels.as_strided(shape, steps, pixels.storage_offset())
        self.memory = None

    def __call__(self, samples, rows):
        """[36,tiles,C] of these samples and rows of tiles (slices); the first call asks for the most."""
        part = self.view[:, :, samples, rows]
        count = part[0, 0].numel()
        if self.memory is None:
            self.memory = [part.new_empty(side * count) for side in reversed(self.matrix.shape)]
        flat, out = (
            m[: side * count].view(side, count)
            for m, side in zip(self.memory, reversed(self.matrix.shape), strict=True)
        )
        flat.view(part.shape).copy_(part)
        return torch.mm(self.matrix, flat, out=out).view(len(out), -1, part.shape[-1])


def _chunks(num, counts, most):
    """Slices (samples, rows) of about `most` tiles."""
    rows, columns = counts
    if rows * columns <= most:
        step = most // (rows * columns)
        return [(slice(i, i + step), slice(0, rows)) for i in range(0, num, step)]
    step = max(most // columns, 1)
    return [(slice(i, i + 1), slice(j, j + step)) for i in range(num) for j in range(0, rows, step)]


def _convolve(x, weight, padding, transposed, size, bias=None):
    """conv2d of x [N,C,H,W] with weight [O,C,3,3], or conv_transpose2d of x [N,O,H,W] with it, to images of `size`;
    plus bias."""
    back, G, B = _matrices(transposed, x.dtype)
    counts = [-(-side // _TILE) for side in size]
    kernels = torch.mm(G, weight.reshape(-1, _TAPS**2).t()).view(-1, *weight.shape[:2])
    kernels = kernels if transposed else kernels.transpose(1, 2)  # [36,channels before,after]
    channels = kernels.shape[2]
    before = [_TAPS - 1 - pad for pad in padding] if transposed else padding
    tiles = _Tiles(B, x, before, counts)
    out = x.new_empty([x.shape[0], counts[0], _TILE, counts[1], _TILE, channels])
    for chunk in _chunks(x.shape[0], counts, max(kernels.shape[1:])):
        products = torch.bmm(tiles(*chunk), kernels)
        target = out[chunk].permute(2, 4, 0, 1, 3, 5)
        results = torch.mm(back, products.flatten(1)).view(target.shape)
        target.copy_(results) if bias is None else torch.add(results, bias, out=target)
    out = out.view(x.shape[0], _TILE * counts[0], _TILE * counts[1], channels)
    return out[:, : size[0], : size[1]].permute(0, 3, 1, 2)


def _of_weight(x, y, padding):
    """The gradient [O,C,3,3] of a convolution of x [N,C,H,W], where that of its result is y [N,O,H',W']."""
    back, G, B = _matrices(False, x.dtype)
    counts = [-(-side // _TILE) for side in y.shape[2:]]
    before, after = _Tiles(B, x, padding, counts), _Tiles(back.t(), y, (0, 0), counts)
    total = x.new_empty([len(B), y.shape[1], x.shape[1]])
    for number, chunk in enumerate(_chunks(x.shape[0], counts, max(total.shape[1:]))):
        total.baddbmm_(after(*chunk).transpose(1, 2), before(*chunk), beta=min(number, 1))
    return torch.mm(total.flatten(1).t(), G).view(y.shape[1], x.shape[1], _TAPS, _TAPS)


class _Conv(torch.autograd.Function):
    """`_convolve`, with gradients."""

    @staticmethod
    def forward(ctx, x, weight, padding, transposed, size):
        ctx.save_for_backward(x, weight)
        ctx.options = padding, transposed
        return _convolve(x, weight, padding, transposed, size)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        padding, transposed = ctx.options
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _Conv.apply(grad, weight, padding, not transposed, x.shape[2:])
        if ctx.needs_input_grad[1]:
            of_weight = _OfWeight.apply(*((grad, x) if transposed else (x, grad)), padding)
        return of_x, of_weight, None, None, None


class _OfWeight(torch.autograd.Function):
    """`_of_weight`, with gradients."""

    @staticmethod
    def forward(ctx, x, y, padding):
        ctx.save_for_backward(x, y)
        ctx.padding = padding
        return _of_weight(x, y, padding)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        of_x = of_y = None
        if ctx.needs_input_grad[0]:
            of_x = _Conv.apply(y, grad, ctx.padding, True, x.shape[2:])
        if ctx.needs_input_grad[1]:
            of_y = _Conv.apply(x, grad, ctx.padding, False, y.shape[2:])
        return of_x, of_y, None
