# SPDX-License-Identifier: Apache-2.0
"""Bilinear sampling of images at given points, with second-order gradients on every PyTorch."""

import functools

import torch
import torch.nn.functional as F

enabled = False  # kept for scripts that set it: the gradients are right either way

_BILINEAR, _ZEROS, _ALIGN_CORNERS = 0, 0, False


def grid_sample(input, grid):
    """Samples input [N,C,H,W] at grid [N,H',W',2] -> [N,C,H',W'].

    grid: (x, y) with -1 and 1 at the outer edges of the border pixels (align_corners=False).
    Bilinear; zeros outside.
    Gradients of any order with respect to input; first order only with respect to grid.
    """
    wanted = torch.is_grad_enabled() and input.requires_grad
    if wanted and not _twice_differentiable(input.device.type):
        return _Sample.apply(input, grid)
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@functools.cache
def _twice_differentiable(device_type):
    """Whether this PyTorch differentiates grid_sample twice on such a device; tried once, at first use."""
    with torch.enable_grad():
        image = torch.ones([1, 1, 2, 2], device=device_type, requires_grad=True)
        grid = torch.zeros([1, 1, 1, 2], device=device_type)
        out = F.grid_sample(image, grid, align_corners=False)
        try:
            (dx,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
            torch.autograd.grad(dx.sum(), image)
        except RuntimeError:
            return False
    return True


class _Sample(torch.autograd.Function):
    """grid_sample: linear in the image."""

    @staticmethod
    def forward(ctx, image, grid):
        ctx.save_for_backward(image, grid)
        return torch.ops.aten.grid_sampler_2d(image, grid, _BILINEAR, _ZEROS, _ALIGN_CORNERS)

    @staticmethod
    def backward(ctx, dy):
        image, grid = ctx.saved_tensors
        d_image, d_grid = _SampleGrad.apply(dy, image, grid, ctx.needs_input_grad[1])
        return d_image, d_grid if ctx.needs_input_grad[1] else None


class _SampleGrad(torch.autograd.Function):
    """The transpose of _Sample: scatters dy back to the image. Its gradient with respect to dy is _Sample."""

    @staticmethod
    def forward(ctx, dy, image, grid, grid_wanted):
        ctx.save_for_backward(grid)
        ctx.set_materialize_grads(False)
        mask = [True, bool(grid_wanted)]
        backward = torch.ops.aten.grid_sampler_2d_backward
        d_image, d_grid = backward(dy, image, grid, _BILINEAR, _ZEROS, _ALIGN_CORNERS, mask)
        return d_image, d_grid

    @staticmethod
    def backward(ctx, dd_image, dd_grid):
        (grid,) = ctx.saved_tensors
        assert dd_grid is None, (
            "second-order gradients of grid_sample with respect to the grid are not supported"
        )
        dd_y = _Sample.apply(dd_image, grid) if dd_image is not None and ctx.needs_input_grad[0] else None
        return dd_y, None, None, None
