# SPDX-License-Identifier: Apache-2.0
"""The pictures that the networks can make: h0 x w0 pixels, doubled n times."""

SMALLEST, LARGEST = 4, 32  # sides of the constant that a generator begins with


def split_shape(height: int, width: int) -> tuple[int, int, int]:
    """(h0, w0, n) with height = h0 * 2^n, width = w0 * 2^n and n as large as it can be with h0, w0 >= 4.

    A power of two gives h0 = w0 = 4, as in the family. ValueError, which names sizes that can be had, where a side is
    below 4 or h0 or w0 comes out above 32.
    """
    h0, w0, n = height, width, 0
    while h0 % 2 == 0 and w0 % 2 == 0 and min(h0, w0) >= 2 * SMALLEST:
        h0, w0, n = h0 // 2, w0 // 2, n + 1
    if min(h0, w0) < SMALLEST:
        raise ValueError(f"pictures must be at least {SMALLEST} pixels a side, not {width}x{height}")
    if max(h0, w0) > LARGEST:
        raise ValueError(
            f"pictures of {width}x{height} pixels are {w0}x{h0} doubled {n} times, and {LARGEST}x{LARGEST} is the most"
            f" that can be doubled; {_nearest(height, width)} would do"
        )
    return h0, w0, n


def shape_of(G) -> list[int]:
    """[H, W] of a generator's pictures; networks of the family, which know squares only, have no img_shape."""
    return list(getattr(G, "img_shape", [G.img_resolution] * 2))


def _nearest(height: int, width: int) -> str:
    """'WxH' of the largest size within the picture's, whose sides are multiples of one power of two, that can be
    had."""
    step = 1
    while max(height, width) // step > LARGEST:
        step *= 2
    return f"{max(width // step, 1) * step}x{max(height // step, 1) * step}"


def network_shapes(data):
    """What both networks are told of a data set: c_dim, img_resolution, img_channels and, unless pictures are square,
    img_shape (left out for squares: their pickles keep the family's arguments)."""
    common = dict(c_dim=data.label_dim, img_resolution=data.resolution, img_channels=data.num_channels)
    height, width = data.image_shape[1:]
    return common if height == width else dict(common, img_shape=[height, width])
