# SPDX-License-Identifier: Apache-2.0
"""torch_utils.images: the rounding in exact arithmetic, grids by hand, files."""

import os
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch

from torch_utils import images

ALL = torch.arange(256, dtype=torch.uint8)


def exact_pixel(x):
    """floor(x * 127.5 + 128) of a float, clamped, in rational arithmetic."""
    return min(max((Fraction(x) * 255 / 2 + 128).__floor__(), 0), 255)


class TestRounding:
    def test_to_float_closed_form(self):
        x = images.to_float(ALL)
        assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
        exact = np.array([float(Fraction(2 * v, 255) - 1) for v in range(256)])
        assert np.abs(x.double().numpy() - exact).max() < 2**-23

    def test_round_trip_of_all_values(self):
        assert torch.equal(images.to_uint8(images.to_float(ALL)), ALL)
        assert torch.equal(images.to_uint8(images.to_float(ALL).double()), ALL)

    @pytest.mark.parametrize("dtype, margin", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
    def test_halves(self, dtype, margin):
        """Half-way between pixels v - 1 and v the switch happens, at v - 0.5 upwards."""
        half = (torch.arange(1, 256, dtype=torch.float64) - 128) / 127.5
        below, above = (half - margin).to(dtype), (half + margin).to(dtype)
        assert images.to_uint8(below).tolist() == list(range(255))
        assert images.to_uint8(above).tolist() == list(range(1, 256))
        for x in (below, above):
            assert images.to_uint8(x).tolist() == [exact_pixel(v) for v in x.tolist()]
        at = images.to_uint8(half.to(dtype)) - torch.arange(255)
        assert set(at.tolist()) <= {0, 1}
        assert images.to_uint8(torch.zeros([], dtype=dtype)) == 128  # the one half that is a float: upwards

    def test_clamps(self):
        x = torch.tensor([-1e9, -float("inf"), -1.004, -1.0, 1.0, 1.0039, 2.0, float("inf")])
        assert images.to_uint8(x).tolist() == [0, 0, 0, 0, 255, 255, 255, 255]

    def test_half_precision_is_computed_in_float32(self):
        x = torch.linspace(-1, 1, 999).half()
        assert images.to_uint8(x).tolist() == [exact_pixel(v) for v in x.tolist()]


class TestGrid:
    def test_row_by_row(self):
        batch = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)  # N C H W
        grid = images.make_grid(torch.from_numpy(batch), (3, 2))
        assert grid.shape == (4, 9, 2) and np.array_equal(grid, images.make_grid(batch, (3, 2)))
        for n in range(6):
            row, col = divmod(n, 3)
            part = grid[2 * row : 2 * row + 2, 3 * col : 3 * col + 3]
            assert np.array_equal(part.transpose(2, 0, 1), batch[n])

    @pytest.mark.parametrize(
        "shape, dtype", [((5, 1, 2, 2), "uint8"), ((6, 2, 2), "uint8"), ((6, 1, 2, 2), "f4")]
    )
    def test_mistakes(self, shape, dtype):
        with pytest.raises(ValueError):
            images.make_grid(np.zeros(shape, dtype), (3, 2))


class TestFiles:
    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
    def test_png_round_trip(self, tmp_path, shape):
        array = np.random.RandomState(0).randint(256, size=shape).astype(np.uint8)
        images.write_png(tmp_path / "x.png", array)
        assert np.array_equal(images.read_image(tmp_path / "x.png"), array.reshape(4, 5, -1))
        assert os.listdir(tmp_path) == ["x.png"]
        with PIL.Image.open(tmp_path / "x.png") as image:
            assert image.format == "PNG"

    def test_write_mistakes_leave_nothing(self, tmp_path):
        for array in (np.zeros([4, 4, 2], np.uint8), np.zeros([4, 4], np.float32), np.zeros([4], np.uint8)):
            with pytest.raises(ValueError, match="x.png"):
                images.write_png(tmp_path / "x.png", array)
        assert os.listdir(tmp_path) == []

    def test_failed_write_keeps_the_old_picture(self, tmp_path, monkeypatch):
        images.write_png(tmp_path / "x.png", np.full([2, 2], 7, np.uint8))

        def fail(self, file, **kwargs):
            file.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(PIL.Image.Image, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            images.write_png(tmp_path / "x.png", np.zeros([2, 2], np.uint8))
        assert images.read_image(tmp_path / "x.png").max() == 7 and os.listdir(tmp_path) == ["x.png"]

    def test_read_modes(self, tmp_path):
        red = np.zeros([2, 3, 3], np.uint8)
        red[..., 0] = 204  # in Pillow's web palette
        image = PIL.Image.fromarray(red)
        image.convert("P").save(tmp_path / "p.png")
        assert np.array_equal(images.read_image(tmp_path / "p.png"), red)
        image.convert("LA").save(tmp_path / "la.png")
        assert images.read_image(tmp_path / "la.png").shape == (2, 3, 4)
        assert images.read_image(tmp_path / "la.png", mode="L").tolist() == [[[61]] * 3] * 2  # 0.299 * 204
        PIL.Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
        assert images.read_image(tmp_path / "1.png").tolist() == [[[255], [0]]]
        deep = np.array([[0, 257, 65535, 32896]], np.uint16)
        PIL.Image.fromarray(deep).save(tmp_path / "16.png")
        assert images.read_image(tmp_path / "16.png").tolist() == [[[0], [1], [255], [128]]]

    def test_what_is_transparent_is_not_white(self, tmp_path):
        """Programs that paint keep colours under what is transparent, often white."""
        white = PIL.Image.new("RGBA", (2, 2), "white")
        white.putalpha(PIL.Image.fromarray(np.array([[0, 100], [128, 255]], np.uint8)))
        for mode in ["RGBA", "LA"]:
            white.convert(mode).save(tmp_path / "a.png")
            assert images.read_white(tmp_path / "a.png").tolist() == [[0, 100], [128, 255]]
        palette = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        palette.putpalette([255] * 6 + [0] * 3)
        palette.save(tmp_path / "p.png", transparency=0)
        assert images.read_white(tmp_path / "p.png").tolist() == [[0, 255, 0]]
        for mode, white in [("L", 255), ("RGB", (255, 255, 255)), ("1", 1), ("CMYK", (0, 0, 0, 0))]:
            PIL.Image.new(mode, (1, 1), white).save(tmp_path / "w.tif")
            assert images.read_white(tmp_path / "w.tif").tolist() == [[255]]
        PIL.Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "16.png")
        assert images.read_white(tmp_path / "16.png").tolist() == [[0, 255]]

    def test_read_mistakes(self, tmp_path):
        (tmp_path / "x.png").write_text("no picture")
        with pytest.raises(OSError, match="x.png"):
            images.read_image(tmp_path / "x.png")
        with pytest.raises(FileNotFoundError, match="none.png"):
            images.read_image(tmp_path / "none.png")

    def test_save_image_grid(self, tmp_path):
        values = torch.tensor([-1.0, -0.995, 0.0, 1.0, 1.7, -3.0]).reshape(2, 1, 1, 3)
        images.save_image_grid(values, tmp_path / "g.png", drange=[-1, 1], grid_size=(1, 2))
        # (x + 1) * 127.5 = 0, 0.6375, 127.5 (to even), 255, clipped
        assert images.read_image(tmp_path / "g.png")[..., 0].tolist() == [[0, 1, 128], [255, 255, 0]]
        pixels = np.random.RandomState(0).randint(256, size=[4, 3, 2, 2]).astype(np.uint8)
        images.save_image_grid(pixels, str(tmp_path / "u.png"), drange=[0, 255], grid_size=(2, 2))
        assert np.array_equal(images.read_image(tmp_path / "u.png"), images.make_grid(pixels, (2, 2)))
        with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
            images.save_image_grid(np.zeros([1, 2, 2, 2]), tmp_path / "x.png", [0, 1], (1, 1))
