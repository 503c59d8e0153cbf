# SPDX-License-Identifier: Apache-2.0
"""Every kind of picture becomes the 8-bit pixels that its numbers mean; crops and filters against their formulas."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from training.data_images import Recipe, Unusable, looks_grey, make_picture

RANDOM = np.random.RandomState(0)
COLOURS = RANDOM.randint(256, size=[6, 8, 3]).astype(np.uint8)
VALUES = RANDOM.randint(256, size=[6, 8]).astype(np.uint8)
ALPHA = RANDOM.randint(256, size=[6, 8]).astype(np.uint8)
DEEP = RANDOM.randint(65536, size=[6, 8]).astype(np.uint16)
BITS = RANDOM.rand(6, 8) > 0.5
RED = (200, 30, 40)


def saved(image, kind="png", **options):
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(picture):
    with PIL.Image.open(io.BytesIO(picture.png)) as image:
        assert image.format == "PNG" and image.mode in ("RGB", "L")
        return np.array(image)


def made(data, **recipe):
    return opened(make_picture(data, Recipe(**recipe)))


def png16(pixels, transparent=None):
    """A 16-bit PNG of uint16 [H, W, 3], made from the specification; Pillow cannot write one."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))]
    parts += [] if transparent is None else [chunk(b"tRNS", struct.pack(">3H", *transparent))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def palette(indices, colours):
    image = PIL.Image.fromarray(indices.astype(np.uint8)).convert("L")
    image = PIL.Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([int(c) for c in np.asarray(colours).ravel()])
    return image


def over(colours, alpha, background):
    """The compositing equation, in floats."""
    a = alpha[..., None] / 255
    return np.asarray(colours, float) * a + np.asarray(background, float) * (1 - a)


def rgb(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


PALETTE = RANDOM.randint(256, size=[4, 3])
INDICES = RANDOM.randint(4, size=[6, 8])
CMYK = RANDOM.randint(256, size=[6, 8, 4]).astype(np.uint8)
KEYED = np.where(BITS[..., None], COLOURS, np.uint8([1, 2, 3]))

# name -> (file, kind, remark, expected RGB, how far off by rounding)
KINDS = {
    "rgb": (saved(COLOURS), "RGB", None, COLOURS, 0),
    "grey": (saved(VALUES), "grey", None, rgb(VALUES), 0),
    "rgba": (
        saved(np.dstack([COLOURS, ALPHA])),
        "RGBA",
        "transparent",
        over(COLOURS, ALPHA, RED),
        1,
    ),
    "la": (
        saved(np.dstack([VALUES, ALPHA])),
        "grey with alpha",
        "transparent",
        over(rgb(VALUES), ALPHA, RED),
        1,
    ),
    "palette": (saved(palette(INDICES, PALETTE)), "palette", None, PALETTE[INDICES], 0),
    "palette-2-colours": (
        saved(palette(BITS, [[255, 0, 0], [0, 255, 0]])),
        "palette",
        None,
        np.array([[255, 0, 0], [0, 255, 0]])[BITS.astype(int)],
        0,
    ),
    "palette-keyed": (
        saved(palette(INDICES, PALETTE), transparency=2),
        "palette with transparency",
        "transparent",
        over(PALETTE[INDICES], (INDICES != 2) * 255, RED),
        0,
    ),
    "palette-alpha": (
        saved(palette(INDICES, PALETTE), transparency=bytes([0, 100, 200, 255])),
        "palette with transparency",
        "transparent",
        over(PALETTE[INDICES], np.array([0, 100, 200, 255])[INDICES], RED),
        1,
    ),
    "gif": (saved(palette(INDICES, PALETTE), "gif"), "palette", None, PALETTE[INDICES], 0),
    "rgb-keyed": (
        saved(KEYED, transparency=(1, 2, 3)),
        "RGB with transparency",
        "transparent",
        over(COLOURS, BITS * 255, RED),
        0,
    ),
    "grey-keyed": (
        saved(np.where(BITS, VALUES | 1, 2).astype(np.uint8), transparency=2),
        "grey with transparency",
        "transparent",
        over(rgb(VALUES | 1), BITS * 255, RED),
        0,
    ),
    "1-bit": (saved(BITS), "1-bit", None, rgb(BITS * 255), 0),
    "1-bit-keyed": (
        saved(BITS, transparency=0),
        "1-bit with transparency",
        "transparent",
        over(rgb(BITS * 255), BITS * 255, RED),
        0,
    ),
    "16-bit": (saved(DEEP), "16-bit grey", None, np.rint(rgb(DEEP) / 257), 0),
    "16-bit-tiff": (saved(DEEP, "tiff"), "16-bit grey", None, np.rint(rgb(DEEP) / 257), 0),
    "16-bit-pgm": (saved(DEEP, "ppm"), "16-bit grey", None, np.rint(rgb(DEEP) / 257), 0),
    "16-bit-rgb": (
        png16(rgb(DEEP)),
        "16-bit RGB",
        None,
        rgb(DEEP) / 257,
        1,
    ),
    "cmyk": (
        saved(PIL.Image.frombytes("CMYK", (8, 6), CMYK.tobytes()), "tiff"),
        "CMYK",
        None,
        (255.0 - CMYK[..., :3]) * (255 - CMYK[..., 3:]) / 255,
        1,
    ),
    "ycbcr": (
        saved(PIL.Image.fromarray(COLOURS).convert("YCbCr"), "tiff"),
        "YCbCr",
        None,
        COLOURS,
        3,
    ),
    "bmp": (saved(COLOURS, "bmp"), "RGB", None, COLOURS, 0),
    "webp": (saved(COLOURS, "webp", lossless=True), "RGB", None, COLOURS, 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_means_what_it_says(name):
    data, kind, remark, expected, tolerance = KINDS[name]
    picture = make_picture(data, Recipe(background=RED))
    assert picture.kind == kind and picture.notes == frozenset([remark] if remark else [])
    assert picture.size == (8, 6)
    pixels = opened(picture)
    assert pixels.shape == (6, 8, 3)
    np.testing.assert_allclose(pixels.astype(float), expected, atol=tolerance + 1e-6)

    luma = np.asarray(expected, float) @ [0.299, 0.587, 0.114]
    grey = made(data, background=RED, channels="grey")
    assert grey.shape == (6, 8)
    np.testing.assert_allclose(grey.astype(float), luma, atol=tolerance + 1)


def test_arrays_are_pictures_too():
    np.testing.assert_array_equal(made(VALUES, channels="grey"), VALUES)
    np.testing.assert_array_equal(made(COLOURS), COLOURS)


def test_a_camera_jpeg_keeps_its_colours():
    """Four inks through a JPEG, whose encoder inverts them."""
    flat = np.full([16, 16, 4], [10, 200, 100, 20], np.uint8)
    data = saved(PIL.Image.frombytes("CMYK", (16, 16), flat.tobytes()), "jpeg", quality=100)
    expected = (255 - np.array([10, 200, 100.0])) * (255 - 20) / 255
    np.testing.assert_allclose(made(data).astype(float).mean(axis=(0, 1)), expected, atol=3)
    assert make_picture(data, Recipe()).kind == "CMYK"


UPRIGHT = {  # EXIF orientation -> what brings the stored rows and columns upright
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_pictures_are_turned_upright(orientation, kind):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    picture = make_picture(saved(COLOURS, kind, exif=exif, **options), Recipe())
    np.testing.assert_array_equal(opened(picture), UPRIGHT[orientation](COLOURS))
    assert ("turned" in picture.notes) == (orientation != 1)


def test_of_several_frames_the_first_is_taken():
    frames = [PIL.Image.fromarray(np.full([8, 8], v, np.uint8)) for v in (10, 200)]
    picture = make_picture(saved(frames[0], "gif", save_all=True, append_images=frames[1:]), Recipe())
    assert picture.notes == {"first frame"} and (opened(picture) == 10).all()


def test_a_cameras_second_picture_is_no_frame():
    small = PIL.Image.fromarray(COLOURS[:3, :4].copy())
    data = saved(COLOURS, "mpo", save_all=True, append_images=[small])
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.is_animated
    picture = make_picture(data, Recipe())
    assert picture.notes == frozenset() and picture.size == (8, 6)


def test_pngs_are_not_compressed():
    assert len(make_picture(saved(np.zeros([40, 40, 3], np.uint8)), Recipe()).png) > 40 * 40 * 3


# ----------------------------------------------------------------------------------------
# Sizes


def test_box_is_the_mean_of_blocks():
    pixels = RANDOM.randint(256, size=[64, 32, 3]).astype(np.uint8)
    picture = make_picture(saved(pixels), Recipe(width=8, height=16, resize_filter="box"))
    means = pixels.reshape(16, 4, 8, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(
        opened(picture).astype(float), means, atol=1.01
    )  # rounded after each direction
    assert picture.notes == {"resized"}


def lanczos_matrix(before, after):
    """[after, before]: windowed sinc with three lobes, widened by the reduction, rows summing to 1."""
    scale = before / after
    centre = (np.arange(after)[:, None] + 0.5) * scale
    x = (np.arange(before) + 0.5 - centre) / max(scale, 1)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("width, height", [(8, 16), (48, 24), (20, 40)])
def test_lanczos_is_its_formula(width, height):
    pixels = RANDOM.randint(60, 190, size=[40, 32, 3]).astype(np.uint8)
    expected = np.einsum("yh,xw,hwc->yxc", lanczos_matrix(40, height), lanczos_matrix(32, width), pixels)
    result = made(saved(pixels), width=width, height=height)
    np.testing.assert_allclose(result.astype(float), expected.clip(0, 255), atol=1.6)


def test_a_picture_of_the_right_size_is_not_touched():
    picture = make_picture(saved(COLOURS), Recipe(width=8, height=6))
    assert picture.notes == frozenset()
    np.testing.assert_array_equal(opened(picture), COLOURS)


@pytest.mark.parametrize("width, height", [(None, 3), (4, None)])
def test_one_side_alone_leaves_the_other(width, height):
    picture = make_picture(saved(COLOURS), Recipe(width=width, height=height))
    assert opened(picture).shape[:2] == (height or 6, width or 8)
    assert picture.notes == {"resized", "stretched"}


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (41, 64), (50, 51)])
def test_center_crop_is_the_square_in_the_middle(shape):
    pixels = RANDOM.randint(256, size=[*shape, 3]).astype(np.uint8)
    side = min(shape)
    y, x = (shape[0] - side) // 2, (shape[1] - side) // 2
    picture = make_picture(saved(pixels), Recipe(width=side, height=side, transform="center-crop"))
    np.testing.assert_array_equal(opened(picture), pixels[y : y + side, x : x + side])
    assert picture.notes == frozenset()


@pytest.mark.parametrize(
    "shape, size, part",
    [
        ((60, 90), (4, 4), (slice(0, 60), slice(15, 75))),
        ((60, 90), (8, 4), (slice(7, 52), slice(0, 90))),
        ((60, 90), (4, 8), (slice(0, 60), slice(30, 60))),
        ((90, 60), (8, 4), (slice(30, 60), slice(0, 60))),
        ((1, 90), (4, 8), (slice(0, 1), slice(44, 45))),
    ],
)
def test_center_crop_has_the_proportions_asked_for(shape, size, part):
    """The crop, resized, is the same as that very part of the picture resized."""
    pixels = RANDOM.randint(256, size=[*shape, 3]).astype(np.uint8)
    recipe = dict(width=size[0], height=size[1], resize_filter="box")
    result = made(saved(pixels), transform="center-crop", **recipe)
    np.testing.assert_array_equal(result, made(saved(pixels[part]), **recipe))


@pytest.mark.parametrize("shape, rows", [((96, 128), (24, 48)), ((64, 64), (0, 64)), ((90, 96), (15, 60))])
def test_center_crop_wide_is_the_familys(shape, rows):
    """round(width * H / W) rows of the picture, resized to width x height, on a black square."""
    first, count = rows
    pixels = RANDOM.randint(1, 256, size=[*shape, 3]).astype(np.uint8)
    picture = make_picture(saved(pixels), Recipe(width=64, height=48, transform="center-crop-wide"))
    result = opened(picture)
    assert picture.size == (64, 64) and (result[:8] == 0).all() and (result[56:] == 0).all()
    part = pixels[first : first + count]
    np.testing.assert_array_equal(result[8:56], made(saved(part), width=64, height=48))


def test_center_crop_wide_leaves_out_what_is_too_small():
    recipe = Recipe(width=64, height=48, transform="center-crop-wide")
    for shape in [(64, 63, 3), (47, 64, 3), (94, 128, 3)]:  # the last has 47 rows at 64 columns
        assert make_picture(saved(np.ones(shape, np.uint8)), recipe).png is None
    assert make_picture(saved(np.ones([48, 64, 3], np.uint8)), recipe).png is not None


# ----------------------------------------------------------------------------------------
# What cannot be used


def huge():
    """A PNG of 100 bytes whose header promises 900 million pixels."""
    small = bytearray(saved(VALUES))
    small[16:24] = struct.pack(">II", 30000, 30000)
    small[29:33] = struct.pack(">I", zlib.crc32(bytes(small[12:29])))
    return bytes(small)


UNUSABLE = {
    "empty": (b"", "^not a picture of a known format$"),
    "text": (b"no picture", "^not a picture of a known format$"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a known format"),
    "cut png": (saved(COLOURS)[:-30], r"^damaged \(.+\)$"),
    "cut jpeg": (saved(COLOURS.repeat(20, 0).repeat(20, 1), "jpeg")[:-200], r"^damaged \(.*truncated.*\)$"),
    "huge": (huge(), "^too large to be safe: .*900000000 pixels"),
    "floats": (saved(VALUES.astype(np.float32), "tiff"), "^Input images must be stored as RGB or grayscale.* has F$"),
    "32-bit": (saved(VALUES.astype(np.int32), "tiff"), "^Input images must be stored as RGB or grayscale.* has I$"),
    "lab": (saved(PIL.Image.new("LAB", (4, 4)), "tiff"), "^Input images must be stored .* has LAB$"),
    "16-bit keyed": (saved(DEEP, transparency=5), "16 bits and a transparent colour"),
    "16-bit rgb keyed": (png16(rgb(DEEP), (1, 2, 3)), "16 bits and a transparent colour"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_pictures_say_why_in_one_line(name, recwarn):
    data, reason = UNUSABLE[name]
    with pytest.raises(Unusable, match=reason) as info:
        make_picture(data, Recipe())
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm", "tga", "ico"])
@pytest.mark.filterwarnings("ignore")
def test_damage_never_ends_in_another_error(kind):
    whole = saved(COLOURS.repeat(4, 0).repeat(4, 1), kind)
    random = np.random.RandomState(1)
    outcomes = {"made": 0, "unusable": 0}
    for _ in range(60):
        data = bytearray(whole)
        for place in random.randint(min(len(data), 300), size=random.randint(1, 6)):
            data[place] = random.randint(256)
        try:
            assert (
                opened(make_picture(bytes(data[: random.randint(20, 2 * len(data))]), Recipe(4, 4))).size
                == 48
            )
            outcomes["made"] += 1
        except Unusable:
            outcomes["unusable"] += 1
    assert outcomes["unusable"] > 5


# ----------------------------------------------------------------------------------------
# Grey or colours, by the first bytes


@pytest.mark.parametrize("name", [*KINDS, *UNUSABLE])
@pytest.mark.filterwarnings("ignore")
def test_grey_is_told_from_the_first_bytes(name):
    white, red = (255, 255, 255), RED
    if name in UNUSABLE:
        data = UNUSABLE[name][0]
        assert looks_grey(io.BytesIO(data), white) == (
            name not in ("cut png", "cut jpeg", "16-bit rgb keyed", "floats", "lab")
        )
        return
    data, kind, remark, _, _ = KINDS[name]
    grey = "grey" in kind or "1-bit" in kind
    assert looks_grey(io.BytesIO(data), white) == grey
    assert looks_grey(io.BytesIO(data), red) == (grey and remark != "transparent")


def test_grey_arrays():
    assert looks_grey(VALUES, RED) and not looks_grey(COLOURS, RED)
