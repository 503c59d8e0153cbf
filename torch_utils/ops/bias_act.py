# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one call."""

import math

import torch
import torch.nn.functional as F

import dnnlib
from torch_utils import custom_ops


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
    impl: 'cuda' uses own kernels for CUDA tensors where custom_ops allows it: one pass, computed in float32
    for 16-bit types and rounded once. 'ref' never does. Both give the same values up to rounding.
    Returns a tensor of x's shape, dtype and memory format.
    """
    assert impl in ("ref", "cuda"), f"impl is {impl!r}; accepted: 'ref', 'cuda'"
    assert act in activation_funcs, f"act is {act!r}; accepted: {', '.join(activation_funcs)}"
    assert clamp is None or clamp >= 0, f"clamp is {clamp}; accepted: None or a number >= 0"
    spec = activation_funcs[act]
    alpha = float(spec.def_alpha if alpha is None else alpha)
    gain = float(spec.def_gain if gain is None else gain)
    clamp = None if clamp is None else float(clamp)
    bias, b = b, None if b is None else _aligned_bias(x, b, dim)
    if impl == "cuda" and _has_kernel(act, alpha, gain) and custom_ops.kernels(x) and x.numel():
        return _fused(x, bias, (dim, act, alpha, gain, clamp))
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


# --------------------------------------------------------------------------------------------------
# Own kernels


def _has_kernel(act, alpha, gain):
    """The kernels' gradients tell from the output which side of a kink the input was on."""
    return gain != 0 and not (act == "lrelu" and alpha < 0)


def _fused(x, b, settings):
    """bias_act by kernels. settings: dim, act, alpha, gain, clamp (None: none)."""
    wanted = x.requires_grad or (b is not None and b.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _Fused.apply(x, b, settings)
    return run_kernel(custom_ops.kernels(x), 0, x, b, None, None, None, *settings)


class _Fused(torch.autograd.Function):
    """Keeps what the derivatives of the activation refer to; x too where there is a second derivative."""

    @staticmethod
    def forward(ctx, x, b, settings):
        _, act, _, _, clamp = settings
        spec = activation_funcs[act]
        y = run_kernel(custom_ops.kernels(x), 0, x, b, None, None, None, *settings)
        inputs = (x, b) if spec.has_2nd_grad else (None, None)
        ctx.save_for_backward(*inputs, y if spec.ref == "y" or (not spec.ref and clamp is not None) else None)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx, dy):
        x, b, y = ctx.saved_tensors
        dx = _FusedGrad.apply(dy, x, b, None if y is None else y.detach(), ctx.settings)
        db = _sum_to_bias(dx, ctx.settings[0]) if ctx.needs_input_grad[1] else None
        return dx if ctx.needs_input_grad[0] else None, db, None


class _FusedGrad(torch.autograd.Function):
    """dy times the local slope of the activation at x + b: linear in dy."""

    @staticmethod
    def forward(ctx, dy, x, b, y, settings):
        ctx.save_for_backward(dy if activation_funcs[settings[1]].has_2nd_grad else None, x, b, y)
        ctx.settings = settings
        return run_kernel(custom_ops.kernels(dy), 1, dy, b, x, y, None, *settings)

    @staticmethod
    def backward(ctx, d_dx):
        dy, x, b, y = ctx.saved_tensors
        settings = ctx.settings
        d_dy = _FusedGrad.apply(d_dx, x, b, y, settings) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return d_dy, None, None, None, None
        if torch.is_grad_enabled():  # a third derivative is wanted, for which there is no kernel
            d_x = _second_derivative(d_dx, dy, x, b, settings)
        else:
            d_x = run_kernel(custom_ops.kernels(d_dx), 2, d_dx, b, x, y, dy, *settings)
        db = _sum_to_bias(d_x, settings[0]) if ctx.needs_input_grad[2] else None
        return d_dy, d_x if ctx.needs_input_grad[1] else None, db, None, None


def _second_derivative(d_dx, dy, x, b, settings):
    """d_dx * dy * (second derivative at x + b), itself differentiable any number of times."""
    dim, act, alpha, gain, clamp = settings
    bias = None if b is None else _aligned_bias(x, b, dim)
    t = x if bias is None else x + bias
    y = _composed(t, None, activation_funcs[act], alpha, gain, clamp)
    (dx,) = torch.autograd.grad(y, t, dy, create_graph=True)
    return torch.autograd.grad(dx, t, d_dx, create_graph=True)[0]


def _sum_to_bias(dx, dim):
    shape = [1] * dx.ndim
    shape[dim] = dx.shape[dim]
    return dx.sum_to_size(shape).flatten()


def run_kernel(backend, grad, x, b, xref, yref, dy, dim, act, alpha, gain, clamp):
    """One launch of kernels/bias_act.cu, without autograd; what the arguments mean is said there.

    Moves, an element: grad 0 one read and one write; grad 1 one or two reads (dy, and yref or xref) and one
    write; grad 2 three reads and one write; 16 bytes a thread. b, xref, yref and dy may be None where they are
    not read. Returns a tensor of x's shape and dtype, in the layout of the reference tensor (else of x).
    """
    spec = activation_funcs[act]
    clamp = -1.0 if clamp is None else clamp
    if grad:
        b, xref, yref = (b, xref, None) if spec.ref == "x" else (None, None, yref)
    like = next(t for t in (xref, yref, x) if t is not None)
    layout = _layout(like)
    x, xref, yref, dy = (
        None if t is None else t.contiguous(memory_format=layout) for t in (x, xref, yref, dy)
    )
    b = None if b is None else b.contiguous()
    if isinstance(backend, custom_ops.Plugins):
        empty = x.new_empty([0])
        b, xref, yref, dy = (empty if t is None else t for t in (b, xref, yref, dy))
        return backend.bias_act(x, b, xref, yref, dy, grad, dim, spec.cuda_idx, alpha, gain, clamp)
    y = torch.empty_like(x)
    channels, step = (1, 1) if b is None else (x.shape[dim], max(x.stride(dim), 1))
    width = 16 // x.element_size() if custom_ops.aligned(x, xref, yref, dy, y) else 1
    index = "unsigned int" if x.numel() < 2**31 else "unsigned long long"
    defines = (
        f"SCALAR={custom_ops.DTYPES[x.dtype]}", f"INDEX={index}", f"GRAD={grad}", f"ACT={spec.cuda_idx}",
        f"VEC={width}",
    )  # fmt: skip
    args = x, b, xref, yref, dy, y, x.numel(), step, channels, alpha, gain, clamp
    backend.launch("bias_act.cu", "bias_act", defines, -(-x.numel() // width), args, x.device)
    return y


def _layout(x):
    """Channels-last if x is so, else contiguous: the order in which the kernel walks its tensors."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last if last is not None and x.stride(1) == 1 else torch.contiguous_format
