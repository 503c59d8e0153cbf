# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn.functional as F


def _pair(value):
    value = [value, value] if isinstance(value, int) else value
    assert isinstance(value, (list, tuple)) and all(type(v) is int and v >= 1 for v in value)
    return value


def _padding(value):
    value = [value] * 2 if isinstance(value, int) else value
    assert isinstance(value, (list, tuple)) and all(type(v) is int for v in value)
    return [value[0], value[0], value[1], value[1]] if len(value) == 2 else value


def _size(f):
    """(width, height)"""
    if f is None:
        return 1, 1
    assert isinstance(f, torch.Tensor) and 1 <= f.ndim <= 2 and f.dtype == torch.float32
    return f.shape[-1], f.shape[0]


def setup_filter(f, device="cpu", normalize=True, flip_filter=False, gain=1, separable=None):
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32).clone()
    assert f.ndim <= 2 and f.numel() > 0
    f = f[None] if f.ndim == 0 else f
    separable = f.ndim == 1 and f.numel() >= 8 if separable is None else separable
    f = f.ger(f) if f.ndim == 1 and not separable else f
    f = f / f.sum() if normalize else f
    f = f.flip(list(range(f.ndim))) if flip_filter else f
    return (f * gain ** (f.ndim / 2)).to(device)


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
    assert isinstance(x, torch.Tensor) and x.ndim == 4 and impl in ("ref", "cuda")
    f = torch.ones([1, 1], dtype=torch.float32, device=x.device) if f is None else f
    assert f.dtype == torch.float32 and not f.requires_grad and f.device == x.device and f.ndim in (1, 2)
    (upx, upy), (downx, downy), (px0, px1, py0, py1) = _pair(up), _pair(down), _padding(padding)
    n, c, h, w = x.shape
    big = x.new_zeros([n, c, h, upy, w, upx])
    big[:, :, :, 0, :, 0] = x
    x = F.pad(big.reshape(n, c, h * upy, w * upx), [max(p, 0) for p in (px0, px1, py0, py1)])
    x = x[:, :, max(-py0, 0) : x.shape[2] - max(-py1, 0), max(-px0, 0) : x.shape[3] - max(-px1, 0)]
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    for kernel in [f] if f.ndim == 2 else [f[None, :], f[:, None]]:
        x = F.conv2d(x, kernel[None, None].repeat(c, 1, 1, 1), groups=c)
    return x[:, :, ::downy, ::downx]


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (fw, fh), p = _size(f), _padding(padding)
    p = [p[0] + fw // 2, p[1] + (fw - 1) // 2, p[2] + fh // 2, p[3] + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=p, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (fw, fh), p, (ux, uy) = _size(f), _padding(padding), _pair(up)
    p = [p[0] + (fw + ux - 1) // 2, p[1] + (fw - ux) // 2, p[2] + (fh + uy - 1) // 2, p[3] + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=p, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (fw, fh), p, (dx, dy) = _size(f), _padding(padding), _pair(down)
    p = [p[0] + (fw - dx + 1) // 2, p[1] + (fw - dx) // 2, p[2] + (fh - dy + 1) // 2, p[3] + (fh - dy) // 2]
    return upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter, gain=gain, impl=impl)
