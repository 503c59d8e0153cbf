# SPDX-License-Identifier: Apache-2.0
import math

import torch
import torch.nn.functional as F

import dnnlib

_ROWS = {  # name: function, alpha, gain
    "linear": (lambda x, **_: x, 0, 1),
    "relu": (lambda x, **_: F.relu(x), 0, math.sqrt(2)),
    "lrelu": (lambda x, alpha, **_: F.leaky_relu(x, alpha), 0.2, math.sqrt(2)),
    "tanh": (lambda x, **_: torch.tanh(x), 0, 1),
    "sigmoid": (lambda x, **_: torch.sigmoid(x), 0, 1),
    "elu": (lambda x, **_: F.elu(x), 0, 1),
    "selu": (lambda x, **_: F.selu(x), 0, 1),
    "softplus": (lambda x, **_: F.softplus(x), 0, 1),
    "swish": (lambda x, **_: torch.sigmoid(x) * x, 0, math.sqrt(2)),
}
activation_funcs = {
    name: dnnlib.EasyDict(func=func, def_alpha=alpha, def_gain=gain)
    for name, (func, alpha, gain) in _ROWS.items()
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="cuda"):
    assert isinstance(x, torch.Tensor) and impl in ("ref", "cuda")
    assert clamp is None or clamp >= 0
    spec = activation_funcs[act]
    if b is not None:
        assert isinstance(b, torch.Tensor) and b.ndim == 1 and 0 <= dim < x.ndim
        assert b.shape[0] == x.shape[dim] and b.dtype == x.dtype and b.device == x.device
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = spec.func(x, alpha=float(spec.def_alpha if alpha is None else alpha))
    x = x * float(spec.def_gain if gain is None else gain)
    return x if clamp is None or clamp < 0 else x.clamp(-float(clamp), float(clamp))
