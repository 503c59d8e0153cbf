# SPDX-License-Identifier: Apache-2.0
"""Videos from frames: .gif always, .mp4 where the package imageio-ffmpeg is installed."""

import os
import tempfile
from collections.abc import Iterable

import imageio.v2
import numpy as np

INSTALL = "pip install imageio-ffmpeg"
GIF_UNIT = (
    10  # milliseconds: GIFs count time in hundredths of a second, and viewers slow down below two of them
)


def has_ffmpeg() -> bool:
    """Whether .mp4 files can be written."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # no package; a package without its program
        return False
    return True


def check_video_path(path: str | os.PathLike) -> None:
    """ValueError, with what would do, for a file that write_video cannot write."""
    stem, extension = os.path.splitext(path)
    if extension not in (".gif", ".mp4"):
        raise ValueError(f"Videos are .mp4 or .gif files, not {os.fspath(path)!r}")
    if extension == ".mp4" and not has_ffmpeg():
        raise ValueError(f"{path} needs the package imageio-ffmpeg ({INSTALL}); {stem}.gif works without it")


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: int) -> None:
    """Writes uint8 frames [H, W, 1 or 3] as .mp4 (H.264, 16 Mbit/s) or as .gif (palette, endless loop).

    The file appears when complete. GIFs round the time of a frame to 0.01 s and show at most 50 a second; H.264 wants
    even sides, so an odd one gets its last row or column twice. ValueError as check_video_path.
    """
    check_video_path(path)
    gif = os.path.splitext(path)[1] == ".gif"
    if gif:
        settings = dict(duration=max(round(100 / fps), 2) * GIF_UNIT, loop=0)
    else:
        settings = dict(fps=fps, codec="libx264", bitrate="16M", macro_block_size=1)
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory(
        prefix=".video-", dir=folder
    ) as drafts:  # ffmpeg needs a name, not a file
        draft = os.path.join(drafts, name)
        with imageio.v2.get_writer(draft, mode="I", **settings) as writer:
            for frame in frames:
                rgb = np.broadcast_to(frame, (*frame.shape[:2], 3))
                writer.append_data(np.ascontiguousarray(rgb) if gif else _even_sides(rgb))
        os.replace(draft, path)


def _even_sides(frame: np.ndarray) -> np.ndarray:
    """[H, W, 3] with its last row and column repeated where H or W is odd."""
    return np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")
