# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one call."""

import math

import torch
import torch.nn.functional as F

import dnnlib


def _activation(func, index, alpha=0, gain=1.0, ref="y", second=True):
    """One row of the table; `ref` and `cuda_idx` tell a fused kernel what to save and which case to run."""
    return dnnlib.EasyDict(
        func=func,
        def_alpha=alpha,
        def_gain=gain,
        cuda_idx=index,
        ref=ref,
        has_2nd_grad=second,
    )


_ROOT2 = math.sqrt(2)  # a Python float: it ends up in pickled layers, where a NumPy scalar must not be

activation_funcs = {
    "linear": _activation(lambda x, **_: x, 1, gain=1, ref="", second=False),
    "relu": _activation(lambda x, **_: F.relu(x), 2, gain=_ROOT2, second=False),
    "lrelu": _activation(
        lambda x, alpha, **_: F.leaky_relu(x, alpha), 3, alpha=0.2, gain=_ROOT2, second=False
    ),
    "tanh": _activation(lambda x, **_: torch.tanh(x), 4, gain=1),
    "sigmoid": _activation(lambda x, **_: torch.sigmoid(x), 5, gain=1),
    "elu": _activation(lambda x, **_: F.elu(x), 6, gain=1),
    "selu": _activation(lambda x, **_: F.selu(x), 7, gain=1),
    "softplus": _activation(lambda x, **_: F.softplus(x), 8, gain=1),
    "swish": _activation(lambda x, **_: F.silu(x), 9, gain=_ROOT2, ref="x"),
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="cuda"):
    """clamp(act(x + b) * gain, -clamp, clamp), with gradients of any order.

    x: any shape, floating point.
    b: bias [x.shape[dim]] of the same dtype, or None; `dim` means nothing without it.
    act: a key of `activation_funcs`. alpha: slope of `lrelu` (default 0.2); the others ignore it.
    gain: default is the activation's own. clamp: >= 0, or None for none; no gradient where |y| >= clamp.
    impl: 'ref' or 'cuda'; both give the same values.
    Returns a tensor of x's shape, dtype and memory format.
    """
    assert impl in ("ref", "cuda"), f"impl is {impl!r}; accepted: 'ref', 'cuda'"
    assert act in activation_funcs, f"act is {act!r}; accepted: {', '.join(activation_funcs)}"
    assert clamp is None or clamp >= 0, f"clamp is {clamp}; accepted: None or a number >= 0"
    spec = activation_funcs[act]
    alpha = float(spec.def_alpha if alpha is None else alpha)
    gain = float(spec.def_gain if gain is None else gain)
    clamp = None if clamp is None else float(clamp)
    b = None if b is None else _aligned_bias(x, b, dim)
    slope = {"relu": 0.0, "lrelu": alpha}.get(act, -1)
    if impl == "cuda" and slope >= 0 and gain > 0:
        return _slope_act(x, b, slope, gain, clamp)
    return _composed(x, b, spec, alpha, gain, clamp)


def _aligned_bias(x, b, dim):
    """b as a view that broadcasts along `dim` of x."""
    assert isinstance(b, torch.Tensor) and b.ndim == 1, "the bias must be a tensor with one dimension"
    assert -x.ndim <= dim < x.ndim, f"dim {dim} does not exist in an input of shape {list(x.shape)}"
    assert b.shape[0] == x.shape[dim], (
        f"bias has {b.shape[0]} values, dimension {dim} of x has {x.shape[dim]}"
    )
    assert b.dtype == x.dtype, f"bias is {b.dtype}, x is {x.dtype}; they must be the same"
    shape = [1] * x.ndim
    shape[dim] = -1
    return b.reshape(shape)


def _composed(x, b, spec, alpha, gain, clamp):
    """The definition, step by step; autograd does the rest."""
    x = x if b is None else x + b
    x = spec.func(x, alpha=alpha)
    x = x if gain == 1 else x * gain
    return x if clamp is None else F.hardtanh(x, -clamp, clamp)


def _slope_act(x, b, slope, gain, clamp):
    """relu and lrelu, the networks' activations: half the passes over memory, and only the output is kept."""
    wanted = x.requires_grad or (b is not None and b.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _SlopeAct.apply(x, b, slope, gain, clamp)
    return _slope_forward(x, b, slope, gain, clamp)


def _slope_forward(x, b, slope, gain, clamp):
    """Few passes: a positive gain commutes with the activation, so it joins the addition of the bias."""
    if b is not None:
        y = torch.add(b * gain, x, alpha=gain)
    else:
        y = x * gain
    y = F.leaky_relu_(y, slope) if slope else y.relu_()
    return y if clamp is None else y.clamp_(-clamp, clamp)


class _SlopeAct(torch.autograd.Function):
    """Keeps the output alone: its sign and size say which side of each kink the input was on."""

    @staticmethod
    def forward(ctx, x, b, slope, gain, clamp):
        y = _slope_forward(x, b, slope, gain, clamp)
        ctx.save_for_backward(y)
        ctx.settings = slope, gain, clamp
        ctx.bias_shape = None if b is None else b.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = _SlopeGrad.apply(dy, y.detach(), *ctx.settings)
        db = dx.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[1] else None
        return dx if ctx.needs_input_grad[0] else None, db, None, None, None


class _SlopeGrad(torch.autograd.Function):
    """dy times the local slope of the activation. Linear in dy, hence its own gradient; constant in y."""

    @staticmethod
    def forward(ctx, dy, y, slope, gain, clamp):
        ctx.save_for_backward(y)
        ctx.settings = slope, gain, clamp
        aten = torch.ops.aten
        dx = aten.leaky_relu_backward(dy, y, slope, False) if slope else aten.threshold_backward(dy, y, 0)
        dx = dx if gain == 1 else dx.mul_(gain)
        if clamp is not None:
            aten.hardtanh_backward.grad_input(dx, y, -clamp, clamp, grad_input=dx)
        return dx

    @staticmethod
    def backward(ctx, ddx):
        (y,) = ctx.saved_tensors
        return _SlopeGrad.apply(ddx, y, *ctx.settings), None, None, None, None
