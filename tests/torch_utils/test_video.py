# SPDX-License-Identifier: Apache-2.0
"""Videos: what was written is read back."""

import sys

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest

from torch_utils import video

NEEDS_FFMPEG = pytest.mark.skipif(
    not video.has_ffmpeg(), reason=f"needs an optional package: {video.INSTALL}"
)


def frames(count=6, height=10, width=14, channels=3):
    """Flat frames, each of a grey of its own."""
    return [np.full([height, width, channels], 40 * i, dtype=np.uint8) for i in range(count)]


def gif_frames(path):
    with PIL.Image.open(path) as image:
        return [np.array(each.convert("RGB")) for each in PIL.ImageSequence.Iterator(image)]


@pytest.mark.parametrize("channels", [1, 3])
def test_gifs_hold_the_frames_and_loop(tmp_path, channels):
    path = tmp_path / "walk.gif"
    video.write_video(path, iter(frames(channels=channels)), fps=20)
    found = gif_frames(path)
    assert len(found) == 6
    for expected, frame in zip(frames(), found, strict=True):
        assert (frame == expected).all()
    with PIL.Image.open(path) as image:
        assert image.info["duration"] == 50 and image.info["loop"] == 0
    assert [each.name for each in tmp_path.iterdir()] == ["walk.gif"]


def test_a_gif_shows_at_most_50_frames_a_second(tmp_path):
    video.write_video(tmp_path / "fast.gif", frames(), fps=100)
    with PIL.Image.open(tmp_path / "fast.gif") as image:
        assert image.info["duration"] == 20


@NEEDS_FFMPEG
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader leaves pipes open
def test_mp4_holds_all_frames_also_with_odd_sides(tmp_path):
    import imageio_ffmpeg

    path = str(tmp_path / "walk.mp4")
    video.write_video(path, frames(height=21, width=31, channels=1), fps=12)
    reader = imageio_ffmpeg.read_frames(path)
    info = next(reader)
    found = [np.frombuffer(each, dtype=np.uint8).reshape(22, 32, 3) for each in reader]
    assert info["fps"] == 12 and info["codec"] == "h264" and info["size"] == (32, 22)
    assert [abs(each.mean() - 40 * i) < 4 for i, each in enumerate(found)] == [True] * 6


def test_an_interrupted_video_leaves_nothing(tmp_path):
    def some():
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.write_video(tmp_path / "walk.gif", some(), fps=10)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Videos are .mp4 or .gif files, not 'walk.avi'"):
        video.check_video_path("walk.avi")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # import says ImportError
    assert not video.has_ffmpeg()
    with pytest.raises(
        ValueError, match=r"package imageio-ffmpeg \(pip install imageio-ffmpeg\); walk.gif works"
    ):
        video.write_video("walk.mp4", frames(), fps=10)
