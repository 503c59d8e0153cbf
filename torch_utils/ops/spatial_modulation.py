# SPDX-License-Identifier: Apache-2.0
"""Modulation by styles that vary in space, given as small grids: without the full-size map of styles.

A grid [N,C,h,w] stands for the map that `resize` makes of it; several grids stand for the sum of their maps, e.g.
the affine of a 4x4 latent and the projection of a 32x32 encoder. Each axis is resized on its own and linearly,
map = A_y grid A_x^T, so that

    mean over (y,x) of map^2  =  sum over grid points of  grid * ( A_y^T A_y  grid  A_x^T A_x )  / (height * width)

which `mean_square` computes from the grid alone: it is what demodulation needs.
"""

import functools

import torch

from torch_utils import custom_ops


def resize(grid, height, width):
    """The map [N,C,height,width] of a grid [N,C,h,w]: bilinear with clamped borders where it is finer, an area
    average where it is coarser; constant grids stay constant. Gradients of any order."""
    rows = _axis(grid.shape[2], height, grid.dtype, grid.device)
    columns = _axis(grid.shape[3], width, grid.dtype, grid.device)
    return torch.matmul(torch.matmul(rows, grid), columns.t())


def modulate(x, *grids, impl="cuda"):
    """x [N,C,H,W] times the sum of the maps of `grids` [N,C,h,w] at H x W, with gradients of any order.

    grids: one or more, of any float type; the map is computed in float32 (float64 for a float64 x), the product
    rounded once to x's type. impl: 'cuda' uses an own kernel for CUDA tensors where custom_ops allows it (one
    or two grids): x is read once and the result written once, and no map is stored; 'ref' never does.
    Returns x's shape, dtype and memory format.
    """
    assert impl in ("ref", "cuda"), f"impl is {impl!r}; accepted: 'ref', 'cuda'"
    assert x.ndim == 4 and grids, "modulate takes x [N,C,H,W] and at least one grid [N,C,h,w]"
    for grid in grids:
        assert grid.ndim == 4 and grid.shape[:2] == x.shape[:2], (
            f"a grid has shape {list(grid.shape)}, expected {[*x.shape[:2], 'h', 'w']}"
        )
    height, width = x.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    grids = [grid.to(dtype) for grid in grids]
    if impl == "cuda" and fuses(x, grids):
        return _Modulate.apply(x, *(_not_finer(grid, height, width) for grid in grids))
    style = sum(resize(grid, height, width) for grid in grids)
    return (x * style).to(x.dtype)


def fuses(x, grids):
    """Whether `modulate` uses an own kernel for x and these grids. The plug-ins that ninja builds are the family's
    two, without this operation."""
    return (
        0 < len(grids) <= 2 and x.numel() > 0 and isinstance(custom_ops.kernels(x), custom_ops.RuntimeKernels)
    )


def mean_square(grids, height, width):
    """[N,C]: the mean over the height x width positions of the square of the sum of the grids' maps, see `resize`.

    grids: a tensor [N,C,h,w] or a sequence of them. In float32 at least; never negative. Costs a few products of
    small matrices, h*w*(h+w) multiplications a channel and pair of grids, instead of passes over the map; where
    a grid has more than an eighth of the map's positions, passes over the map are cheaper and are what it does.
    """
    grids = [grids] if isinstance(grids, torch.Tensor) else list(grids)
    grids = [grid.to(torch.promote_types(grid.dtype, torch.float32)) for grid in grids]
    if any(8 * grid.shape[2] * grid.shape[3] > height * width for grid in grids):
        return sum(resize(grid, height, width) for grid in grids).square().mean(dim=[2, 3])
    total = 0
    for i, a in enumerate(grids):
        for j, b in enumerate(grids[i:], start=i):
            rows = _overlap(a.shape[2], b.shape[2], height, a.dtype, a.device)
            columns = _overlap(a.shape[3], b.shape[3], width, a.dtype, a.device)
            if max(a[0, 0].numel(), b[0, 0].numel()) <= 64:  # one product instead of many small ones
                seen = torch.matmul(torch.kron(rows, columns), b.flatten(2).transpose(1, 2))  # [N,h*w,C]
                product = (a.flatten(2).transpose(1, 2) * seen).sum(dim=1)
            else:
                product = (a * torch.matmul(torch.matmul(rows, b), columns.t())).sum(dim=[2, 3])
            total = total + (product if i == j else 2 * product)
    return (total / (height * width)).clamp(min=0)  # rounding may leave a small negative number


# --------------------------------------------------------------------------------------------------
# One axis as a matrix


@functools.cache  # networks ask for few of them
@torch.inference_mode(False)  # else what is made in inference mode could not be used outside
def _axis(cells, size, dtype, device):
    """[size,cells]: what resizing does to the values along one axis."""
    return _axis_weights(cells, size).to(dtype=dtype, device=device)


@functools.cache
@torch.inference_mode(False)
def _overlap(cells_a, cells_b, size, dtype, device):
    """[cells_a,cells_b]: for each pair of grid points the sum over positions of the product of their weights."""
    product = _axis_weights(cells_a, size).t() @ _axis_weights(cells_b, size)
    return product.to(dtype=dtype, device=device)


def _axis_weights(cells, size):
    """The matrix of `_axis` in float64."""
    positions = torch.arange(size, dtype=torch.float64)[:, None]
    points = torch.arange(cells, dtype=torch.float64)
    if (
        size < cells
    ):  # position i averages the cells from floor(i * cells / size) to ceil((i + 1) * cells / size)
        begin = (positions * cells / size).floor()
        end = ((positions + 1) * cells / size).ceil()
        inside = ((points >= begin) & (points < end)).double()
        return inside / inside.sum(dim=1, keepdim=True)
    at = ((positions + 0.5) * cells / size - 0.5).clamp(0, cells - 1)
    return (1 - (at - points).abs()).clamp(min=0)


# --------------------------------------------------------------------------------------------------
# Own kernels: modulation and its transpose with respect to the grid are each other's derivatives.


def _not_finer(grid, height, width):
    """The grid averaged down where it is finer than the map: what is left is interpolation, the kernel's part."""
    if grid.shape[2] <= height and grid.shape[3] <= width:
        return grid
    return resize(grid, min(grid.shape[2], height), min(grid.shape[3], width))


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *grids):
        ctx.save_for_backward(x, *grids)
        return run_modulate(custom_ops.kernels(x), x, *grids)

    @staticmethod
    def backward(ctx, dy):
        x, *grids = ctx.saved_tensors
        d_x = _Modulate.apply(dy, *grids) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1:]
        projected = {}  # grids of one shape have one gradient
        for grid in (grid for grid, needed in zip(grids, wanted, strict=True) if needed):
            if grid.shape not in projected:
                projected[grid.shape] = _Project.apply(dy, x, *grid.shape[2:])
        return d_x, *(projected[g.shape] if needed else None for g, needed in zip(grids, wanted, strict=True))


class _Project(torch.autograd.Function):
    """a, b [N,C,H,W] -> [N,C,gh,gw]: for each grid point the sum of its weight times a times b."""

    @staticmethod
    def forward(ctx, a, b, gh, gw):
        ctx.save_for_backward(a, b)
        return run_project(custom_ops.kernels(a), a, b, gh, gw)

    @staticmethod
    def backward(ctx, d_grid):
        a, b = ctx.saved_tensors
        d_a = _Modulate.apply(b, d_grid) if ctx.needs_input_grad[0] else None
        d_b = _Modulate.apply(a, d_grid) if ctx.needs_input_grad[1] else None
        return d_a, d_b, None, None


def _defines(last, x, width, *tensors):
    """Macros of both kernels, and the number of elements in one access: 16 bytes where `width` allows it."""
    pack = 16 // x.element_size()
    pack = pack if width % pack == 0 and custom_ops.aligned(x, *tensors) else 1
    index = "int" if x.numel() < 2**31 else "long long"
    return [
        f"SCALAR={custom_ops.DTYPES[x.dtype]}",
        f"INDEX={index}",
        f"CHANNELS_LAST={int(last)}",
        f"VEC={pack}",
    ], pack


def _layout(x):
    last = x.shape[1] > 1 and x.stride(1) == 1
    return last, torch.channels_last if last else torch.contiguous_format


_RUN = 4  # pixels of one thread in channels-last


def run_modulate(backend, x, *grids):
    """One launch of `modulate` in kernels/spatial_modulation.cu, without autograd: one or two grids of the type
    that x is computed in, not finer than x."""
    samples, channels, height, width = x.shape
    last, layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    y = torch.empty_like(x)
    grids = [grid.contiguous(memory_format=layout) for grid in grids]
    defines, pack = _defines(last, x, channels if last else width, y, *grids)
    defines += ["MODULATE=1", f"GRIDS={len(grids)}", f"RUN={_RUN}"]
    sizes = [n for grid in grids for n in grid.shape[2:]]
    if len(grids) == 1:
        grids, sizes = [*grids, None], [*sizes, 1, 1]
    runs = samples * height * (-(-width // _RUN) * channels if last else width * channels)
    args = x, y, *grids, *x.shape, *sizes
    backend.launch("spatial_modulation.cu", "modulate", tuple(defines), runs // pack, args, x.device)
    return y


def run_project(backend, a, b, gh, gw):
    """One launch of `project` in kernels/spatial_modulation.cu for the rows, without autograd, and a matrix product
    for the columns: a, b [N,C,H,W] -> [N,C,gh,gw]."""
    samples, channels, height, width = a.shape
    last, layout = _layout(a)
    a, b = a.contiguous(memory_format=layout), b.contiguous(memory_format=layout)
    dtype = torch.promote_types(a.dtype, torch.float32)
    rows = torch.empty([samples, channels, gh, width], dtype=dtype, device=a.device, memory_format=layout)
    outer, inner = (samples, width * channels) if last else (samples * channels, width)
    defines, pack = _defines(last, a, inner, b, rows)
    args = a, b, rows, outer, height, inner, gh
    count = outer * gh * inner // pack
    backend.launch("spatial_modulation.cu", "project", (*defines, "PROJECT=1"), count, args, a.device)
    return torch.matmul(rows, _axis(gw, width, dtype, a.device))
