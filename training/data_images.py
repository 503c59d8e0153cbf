# SPDX-License-Identifier: Apache-2.0
"""One picture of a new data set: from whatever a file holds to 8-bit RGB or grey of the size asked for. No torch."""

import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

from training.data_sources import formats

# Pillow's modes that are read, in words.
KINDS = {
    "RGB": "RGB", "RGBA": "RGBA", "P": "palette", "PA": "palette with alpha", "CMYK": "CMYK", "YCbCr": "YCbCr",
    "L": "grey", "LA": "grey with alpha", "1": "1-bit",
    "I;16": "16-bit grey", "I;16L": "16-bit grey", "I;16B": "16-bit grey", "I;16N": "16-bit grey", "I": "16-bit grey",
}  # fmt: skip
GREY = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"}
ORIENTATION = 0x0112  # the EXIF tag
STRETCH = 0.02  # proportions that change by more are worth a remark


class Unusable(ValueError):
    """Why a picture cannot be used, in a few words."""


@dataclass(frozen=True)
class Recipe:
    """What is done to each picture.

    width, height   of the result; None: the picture's own
    transform       None: resize to width x height; 'center-crop': of the largest part in the middle that has their
                    proportions; 'center-crop-wide': the family's for wide pictures, on a square black canvas
    resize_filter   'lanczos' or 'box'
    channels        'rgb', or 'grey' (ITU-R 601 luma); 'auto', which is one of them, is for looks_grey() to decide
    background      RGB, 0..255: what transparent pictures are put on
    """

    width: int | None = None
    height: int | None = None
    transform: str | None = None
    resize_filter: str = "lanczos"
    channels: str = "rgb"
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A picture of the new set.

    png    the file, or None where center-crop-wide leaves out a picture that is too small
    size   (width, height) in pixels
    kind   what the source held, in words
    notes  any of 'turned' (by its EXIF orientation), 'first frame' (of several), 'transparent' (put on the background),
           'resized', 'stretched' (its proportions changed)
    """

    png: bytes | None
    size: tuple[int, int]
    kind: str
    notes: frozenset[str]


def make_picture(data: bytes | np.ndarray, recipe: Recipe) -> Picture:
    """A file's content, or pixels, as a picture of the new set. Unusable if it cannot be had."""
    image, kind, notes = _decode(data)
    if image.has_transparency_data:
        notes.add("transparent")
    image = _flatten(image, recipe.background).convert("L" if recipe.channels == "grey" else "RGB")
    before = image.size
    image = _crop(image, recipe)
    if image is None:
        return Picture(None, before, kind, frozenset(notes))
    size = (recipe.width or image.width, recipe.height or image.height)
    if size != image.size:
        change = (size[0] * image.height) / (size[1] * image.width)
        notes |= {"resized"} | ({"stretched"} if abs(change - 1) > STRETCH else set())
        image = image.resize(size, PIL.Image.Resampling[recipe.resize_filter.upper()])
    if recipe.transform == "center-crop-wide":
        canvas = PIL.Image.new(image.mode, (image.width, image.width))
        canvas.paste(image, (0, (image.width - image.height) // 2))
        image = canvas
    stream = io.BytesIO()
    image.save(stream, format="png", compress_level=0, optimize=False)
    return Picture(stream.getvalue(), image.size, kind, frozenset(notes))


def looks_grey(data: BinaryIO | np.ndarray, background: tuple[int, int, int]) -> bool:
    """Whether a picture is stored as grey, which its first bytes tell, and is on this background.

    A palette counts as colours. True for what cannot be opened: that has no say, and is reported when it is decoded.
    """
    if isinstance(data, np.ndarray):
        return data.ndim == 2
    try:
        with PIL.Image.open(data, formats=formats()) as image:
            return image.mode in GREY and (len(set(background)) == 1 or not image.has_transparency_data)
    except Exception:  # decoders raise whatever broken data makes them raise
        return True


# ----------------------------------------------------------------------------------------


def _decode(data: bytes | np.ndarray) -> tuple[PIL.Image.Image, str, set[str]]:
    """The picture upright, what it is in words, and notes on it."""
    if isinstance(data, np.ndarray):
        image = PIL.Image.fromarray(data)
        return image, KINDS[image.mode], set()
    try:
        with PIL.Image.open(io.BytesIO(data), formats=formats()) as image:
            kind, notes = _kind(image), set()
            # The further pictures of a camera's .mpo are the same photograph, smaller.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                notes.add("first frame")
            if image.getexif().get(ORIENTATION, 1) in range(2, 9):  # before loading, which turns a TIFF
                notes.add("turned")
            image.load()
            return PIL.ImageOps.exif_transpose(image), kind, notes
    except Unusable:
        raise
    except PIL.UnidentifiedImageError as error:
        raise Unusable("not a picture of a known format") from error
    except PIL.Image.DecompressionBombError as error:
        raise Unusable(f"too large to be safe: {error}") from error
    except Exception as error:  # decoders raise whatever broken data makes them raise
        raise Unusable(f"damaged ({' '.join(str(error).split()) or type(error).__name__})") from error


def _kind(image: PIL.Image.Image) -> str:
    """What an opened picture holds, in words. Unusable where the meaning of its numbers is not known."""
    kind = KINDS.get(image.mode)
    if kind is None or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise Unusable(
            f"Input images must be stored as RGB or grayscale, or as {_OTHERS}; this one has {image.mode}"
        )
    if image.mode not in GREY and any(";16" in str(tile[3]) for tile in image.tile):
        kind = f"16-bit {kind}"
    if image.has_transparency_data and image.mode not in ("RGBA", "LA", "PA"):
        if kind.startswith("16-bit"):
            raise Unusable("it has 16 bits and a transparent colour, which is not supported")
        kind += " with transparency"
    return kind


_OTHERS = "palette, CMYK, YCbCr, 1-bit or 16-bit grey"


def _flatten(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """Eight bits without transparency: 16-bit grey divided by 257, transparent pixels on the background."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        return PIL.Image.fromarray((values / 257 + 0.5).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    canvas = PIL.Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas


def _crop(image: PIL.Image.Image, recipe: Recipe) -> PIL.Image.Image | None:
    """The middle of the picture that the transform takes; None where it leaves the picture out."""
    if recipe.transform is None:
        return image
    w, h = image.size
    if recipe.transform == "center-crop":
        width = min(w, round(h * recipe.width / recipe.height))
        height = min(h, round(w * recipe.height / recipe.width))
    else:
        # The family's: as many rows as the whole picture would have at the new width, before it is resized.
        width, height = w, round(recipe.width * h / w)
        if w < recipe.width or height < recipe.height:
            return None
    left, top = (w - max(width, 1)) // 2, (h - max(height, 1)) // 2
    return image.crop((left, top, left + max(width, 1), top + max(height, 1)))
