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
import math

import torch

from torch_utils import custom_ops

TILE, _TAPS = 4, 3
_VALUES = TILE + _TAPS - 1  # along one axis
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))  # and infinity
_CHANNELS, _TILES = 128, 64  # from so many on, the transformations cost less than they save


def pays(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """Whether `conv2d` can do this convolution and saves time: float32 on a CPU, a 3x3 kernel that moves by single
    pixels, many channels and tiles, and nobody looking on who wants PyTorch's own operation (a tracer or compiler,
    autocast, torch.func, forward-mode derivatives, --ops=reference)."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if custom_ops.is_reference() or custom_ops.is_watched(x):
        return False
    if x.ndim != 4 or tuple(weight.shape[2:]) != (_TAPS, _TAPS) or min(weight.shape[:2]) < _CHANNELS:
        return False
    if _pair(stride) != (1, 1) or _pair(dilation) != (1, 1) or groups != 1 or isinstance(padding, str):
        return False
    padding = _pair(padding)
    if max(padding) >= _TAPS or min(padding) < 0:
        return False
    rows, columns = (side // TILE for side in _size(x, padding))
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
@torch.inference_mode(False)  # else what is made in inference mode could not be used outside
def _matrices(transposed, dtype):
    """A^T [16,36], G [36,9] and B [36,36] for both axes at once; G of the mirrored kernel for a transposed
    convolution."""
    points = torch.tensor(_POINTS, dtype=torch.float64)

    def powers(count):  # 1, x, x^2, ... at the points; at infinity, only the highest counts
        return torch.cat([points[:, None] ** torch.arange(count), torch.eye(count, dtype=torch.float64)[-1:]])

    parts = [powers(TILE), powers(_TAPS), torch.linalg.inv(powers(_VALUES)).t()]
    sizes = torch.stack([part.norm(dim=1, keepdim=True) for part in parts]).log()
    scales = (sizes.mean(dim=0) - sizes).exp()  # make the three rows of every product the same size
    A, G, B = (part * scale for part, scale in zip(parts, scales, strict=True))
    G = G.flip(1) if transposed else G
    return [torch.kron(x, x).to(dtype).contiguous() for x in (A.t(), G, B)]


class _Tiles:
    """The tiles of pixels [N,H,W,C]: size x size values each, that follow each other at every four pixels,
    counts = (rows, columns) of them."""

    def __init__(self, pixels, counts, size):
        n, h, w, c = pixels.stride()
        shape = [size, size, len(pixels), *counts, pixels.shape[3]]
        steps = [h, w, n, TILE * h, TILE * w, c]
        self.view = pixels.as_strided(shape, steps, pixels.storage_offset())
        self.empty = _Reused(), _Reused()

    def transformed(self, matrix, samples, rows):
        """matrix [36,size^2] times the tiles of these samples and rows (slices): [36,tiles,C]."""
        part = self.view[:, :, samples, rows]
        count = part[0, 0].numel()
        flat = self.empty[0](part, matrix.shape[1], count)
        flat.view(part.shape).copy_(part)
        out = self.empty[1](part, len(matrix), count)
        return torch.mm(matrix, flat, out=out).view(len(matrix), -1, part.shape[-1])


def _sides(counts, size):
    return [TILE * (count - 1) + size for count in counts]


def _framed(like, shape, before, sides):
    """Memory [N,*sides,C] for images [N,C,H,W] of that shape that begin at before = (y, x), zeros around them, and the
    view [N,H,W,C] of their place in it, to be written."""
    num, channels, height, width = shape
    (top, left), (bottom, right) = before, (before[0] + height, before[1] + width)
    memory = like.new_empty([num, *sides, channels])
    for border in (memory[:, :top], memory[:, bottom:], memory[:, :, :left], memory[:, :, right:]):
        border.zero_()
    return memory, memory[:, top:bottom, left:right]


def _tiles_of(images, before, counts, size):
    """The tiles of images [N,C,H,W], the first of which begins `before` = (y, x) pixels outside."""
    pixels, sides = images.permute(0, 2, 3, 1), _sides(counts, size)
    if any(before) or sides != list(images.shape[2:]) or not pixels.is_contiguous():
        framed, inside = _framed(images, images.shape, before, sides)
        inside.copy_(pixels)
        pixels = framed
    return _Tiles(pixels, counts, size)


class _Reused:
    """Memory for one tensor after the other; none may be larger than the first."""

    def __init__(self):
        self.memory = None

    def __call__(self, like, *shape):
        size = math.prod(shape)
        if self.memory is None:
            self.memory = like.new_empty(size)
        return self.memory[:size].view(shape)


def _chunks(num, counts, channels):
    """Slices (samples, rows) of tiles, none of more than the first: about as many tiles as channels for every two
    cores, so that tiles and kernels are read as often and what is made of a tile is still in a cache."""
    most = channels * max(torch.get_num_threads() // 2, 1)
    rows, columns = counts
    if rows * columns <= most:
        step = most // (rows * columns)
        return [(slice(i, i + step), slice(0, rows)) for i in range(0, num, step)]
    step = max(most // columns, 1)
    return [(slice(i, i + 1), slice(j, j + step)) for i in range(num) for j in range(0, rows, step)]


def _count(size):
    return [-(-side // TILE) for side in size]


def _results(tiles, weight, transposed):
    """The convolution of the images in `tiles`, chunk by chunk: yields (samples, rows) and what is there,
    [samples,rows,4,columns,4,O], which may be written to."""
    back, G, B = _matrices(transposed, weight.dtype)
    kernels = torch.mm(G, weight.reshape(-1, _TAPS**2).t()).view(-1, *weight.shape[:2])
    kernels = kernels if transposed else kernels.transpose(1, 2)  # [36,channels before,after]
    num, rows, columns, channels = *tiles.view.shape[2:5], kernels.shape[2]
    empty = _Reused(), _Reused()
    for chunk in _chunks(num, (rows, columns), max(kernels.shape[1:])):
        values = tiles.transformed(B, *chunk)
        products = torch.bmm(values, kernels, out=empty[0](values, *values.shape[:2], channels)).flatten(1)
        made = torch.mm(back, products, out=empty[1](products, len(back), products.shape[1]))
        shape = [TILE, TILE, -1, len(range(rows)[chunk[1]]), columns, channels]
        yield chunk, made.view(shape).permute(2, 3, 0, 4, 1, 5)


def _convolve(x, weight, padding, transposed, size, bias=None):
    """conv2d of x [N,C,H,W] with weight [O,C,3,3], or conv_transpose2d of x [N,O,H,W] with it, to images of `size`;
    plus bias."""
    rows, columns = counts = _count(size)
    before = [_TAPS - 1 - pad for pad in padding] if transposed else padding
    channels = weight.shape[1 if transposed else 0]
    out = x.new_empty([x.shape[0], rows, TILE, columns, TILE, channels])
    for chunk, made in _results(_tiles_of(x, before, counts, _VALUES), weight, transposed):
        out[chunk].copy_(made) if bias is None else torch.add(made, bias, out=out[chunk])
    return _images(out, size)


def _images(out, size):
    """[N,rows,4,columns,4,O] -> [N,O,H,W] of `size`, channels-last."""
    out = out.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
    return out.contiguous().permute(0, 3, 1, 2)


def layer(shape, weight, padding, fill, finish):
    """A convolution whose input is written, and whose result is worked on, while it is in a cache; no gradients.

    shape: [N,C,H,W] of the input, weight [O,C,3,3], padding 0, 1 or 2. fill(x): writes the input into the view x
    [N,H,W,C]. finish(samples, rows, y, out): from a part y [samples,rows,4,columns,4,O] of the result, which may be
    written to, makes out of the same shape; samples and rows of 4 pixels are slices.
    Returns [N,O,H',W'], channels-last."""
    size = [side + 2 * padding - _TAPS + 1 for side in shape[2:]]
    rows, columns = counts = _count(size)
    pixels, inside = _framed(weight, shape, (padding, padding), _sides(counts, _VALUES))
    fill(inside)
    out = weight.new_empty([shape[0], rows, TILE, columns, TILE, weight.shape[0]])
    for chunk, made in _results(_Tiles(pixels, counts, _VALUES), weight, False):
        finish(*chunk, made, out[chunk])
    return _images(out, size)


def _of_weight(x, y, padding):
    """The gradient [O,C,3,3] of a convolution of x [N,C,H,W], where that of its result is y [N,O,H',W']."""
    back, G, B = _matrices(False, x.dtype)
    counts = _count(y.shape[2:])
    values, results = _tiles_of(x, padding, counts, _VALUES), _tiles_of(y, (0, 0), counts, TILE)
    total = x.new_empty([len(B), y.shape[1], x.shape[1]])
    for number, chunk in enumerate(_chunks(x.shape[0], counts, max(total.shape[1:]))):
        after, before = results.transformed(back.t(), *chunk), values.transformed(B, *chunk)
        total.baddbmm_(after.transpose(1, 2), before, beta=min(number, 1))
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
