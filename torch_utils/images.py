# SPDX-License-Identifier: Apache-2.0
"""Pictures: uint8 pixels <-> floats in [-1, 1], grids, reading and writing files. The one home of the
rounding."""

import os
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from dnnlib.util import open_atomic


def to_float(x: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape -> float32 in [-1, 1]: x / 127.5 - 1."""
    return x.to(torch.float32) / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Floats of any shape, [-1, 1] -> uint8 pixels: floor(x * 127.5 + 128), clamped to 0..255.

    Inverse of to_float on all 256 values. Half precision is computed in float32.
    """
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    return (x * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


def picture_pixels(x: torch.Tensor) -> torch.Tensor:
    """`to_uint8` of a network's pictures; ValueError where values are not numbers, which would become black pixels."""
    if torch.isnan(x).any():
        raise ValueError(
            "the network draws pictures with values that are no numbers (NaN): its training has diverged, or its "
            "latents are out of all proportion (--trunc, --projected-w)"
        )
    return to_uint8(x)


def make_grid(images: np.ndarray | torch.Tensor, grid_size: tuple) -> np.ndarray:
    """Puts uint8 images [N, C, H, W] into a grid of (columns, rows), row by row -> [rows * H, columns * W,
    C].

    ValueError unless the images are uint8, four-dimensional and as many as the grid has places.
    """
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    columns, rows = grid_size
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(
            f"Grids are made of uint8 images [N, C, H, W], not {array.dtype} {list(array.shape)}"
        )
    count, channels, height, width = array.shape
    if count != columns * rows:
        raise ValueError(f"A grid of {columns} x {rows} needs {columns * rows} images, not {count}")
    array = array.reshape(rows, columns, channels, height, width)
    return array.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)


def write_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes a uint8 array [H, W], or [H, W, C] with 1, 3 or 4 channels, as PNG; the file appears when
    complete."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        shape = list(array.shape)
        raise ValueError(
            f"A PNG is made of uint8 [H, W] or [H, W, 1 | 3 | 4], not {array.dtype} {shape}: {path}"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    with open_atomic(path) as file:
        PIL.Image.fromarray(np.ascontiguousarray(array)).save(file, format="PNG")


def read_image(path: str | os.PathLike, mode: str | None = None) -> np.ndarray:
    """Reads a picture -> uint8 [H, W, C].

    `mode`: 'L', 'LA', 'RGB' or 'RGBA' converts; by default C is 1 for grey, 4 with transparency, else 3. A camera's
    note on how it was held (EXIF) is heeded. IOError, naming the path, for a file that is no picture.
    """
    try:
        with PIL.Image.open(path) as image:
            image = _eight_bits(PIL.ImageOps.exif_transpose(image))
            image = image.convert(mode or _natural_mode(image))
    except PIL.UnidentifiedImageError as error:
        raise OSError(f"Not a picture of a known format: {path}") from error
    array = np.array(image)
    return array.reshape(*array.shape[:2], -1)


def read_white(path: str | os.PathLike) -> np.ndarray:
    """Reads a painted mask -> uint8 [H, W]: how white it is; what is transparent is not painted.

    IOError as of read_image.
    """
    grey, alpha = np.moveaxis(read_image(path, "LA").astype(np.uint16), 2, 0)
    return (grey * alpha // 255).astype(np.uint8)


def read_label_map(path: str | os.PathLike) -> np.ndarray:
    """Reads a segmentation -> int64 [H, W]: grey values, 8 or 16 bits, or the numbers of a palette's colours.

    OSError for a file that is no picture, ValueError, naming the path, for one of true colours.
    """
    try:
        with PIL.Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
                raise ValueError(
                    f"{path} has colours (mode {image.mode}): a label map is grey or has a palette"
                )
            return np.asarray(image).astype(np.int64)
    except PIL.UnidentifiedImageError as error:
        raise OSError(f"Not a picture of a known format: {path}") from error


def _natural_mode(image: PIL.Image.Image) -> str:
    if image.has_transparency_data:
        return "RGBA"
    return "L" if image.mode in ("1", "L", "I", "F") else "RGB"


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales 16-bit grey to 8 bits, which Pillow would clip instead."""
    if not image.mode.startswith("I"):
        return image
    return PIL.Image.fromarray(
        (np.asarray(image).astype(np.float64) / 257 + 0.5).clip(0, 255).astype(np.uint8)
    )


def save_image_grid(img: Any, fname: str | os.PathLike, drange: tuple | list, grid_size: tuple) -> None:
    """Writes images [N, C, H, W] with 1 or 3 channels and values in `drange` = (lo, hi) as one PNG of
    (columns, rows).

    Scaled as in the StyleGAN2-ADA family: (x - lo) * 255 / (hi - lo), rounded to the nearest, clipped.
    """
    lo, hi = drange
    array = img.detach().cpu().numpy() if isinstance(img, torch.Tensor) else np.asarray(img)
    pixels = np.rint((array.astype(np.float32) - lo) * (255 / (hi - lo))).clip(0, 255).astype(np.uint8)
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"Image grids have 1 or 3 channels, not {pixels.shape[1]}: {fname}")
    write_png(fname, make_grid(pixels, grid_size))
