# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn.functional as F

from . import upfirdn2d


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    assert isinstance(x, torch.Tensor) and x.ndim == 4
    assert isinstance(w, torch.Tensor) and w.ndim == 4 and w.dtype == x.dtype
    assert all(type(n) is int and n >= 1 for n in (up, down, groups))
    fw, fh = upfirdn2d._size(f)
    p = upfirdn2d._padding(padding)
    if up > 1:
        p = [
            p[0] + (fw + up - 1) // 2,
            p[1] + (fw - up) // 2,
            p[2] + (fh + up - 1) // 2,
            p[3] + (fh - up) // 2,
        ]
    if down > 1:
        p = [
            p[0] + (fw - down + 1) // 2,
            p[1] + (fw - down) // 2,
            p[2] + (fh - down + 1) // 2,
            p[3] + (fh - down) // 2,
        ]
    x = upfirdn2d.upfirdn2d(x, f if up > 1 else None, up=up, padding=p, gain=up**2, flip_filter=flip_filter)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return x if down == 1 else upfirdn2d.upfirdn2d(x, f, down=down, flip_filter=flip_filter)
