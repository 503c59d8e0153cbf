# SPDX-License-Identifier: Apache-2.0
import warnings

import torch


def constant(value, shape=None, dtype=None, device=None, memory_format=None):
    tensor = torch.as_tensor(value, dtype=dtype or torch.get_default_dtype(), device=device or "cpu")
    return tensor if shape is None else tensor.expand(shape).contiguous()


def nan_to_num(input, nan=0.0, posinf=None, neginf=None, *, out=None):
    return torch.nan_to_num(input, nan, posinf, neginf, out=out)


class suppress_tracer_warnings(warnings.catch_warnings):
    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        return self


def assert_shape(tensor, ref_shape):
    assert tensor.ndim == len(ref_shape)
    assert all(
        ref is None or int(size) == int(ref) for size, ref in zip(tensor.shape, ref_shape, strict=True)
    )


def profiled_function(fn):
    def decorated(*args, **kwargs):
        return fn(*args, **kwargs)

    decorated.__name__ = fn.__name__
    return decorated


def params_and_buffers(module):
    return [*module.parameters(), *module.buffers()]


def named_params_and_buffers(module):
    return [*module.named_parameters(), *module.named_buffers()]


def copy_params_and_buffers(src_module, dst_module, require_all=False):
    source = dict(named_params_and_buffers(src_module))
    for name, tensor in named_params_and_buffers(dst_module):
        assert name in source or not require_all
        if name in source:
            tensor.copy_(source[name].detach()).requires_grad_(tensor.requires_grad)
