# SPDX-License-Identifier: Apache-2.0
"""Reads clips of frames from a video, whatever it is stored as."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from reco_lightning.data.video.decoders import OnDamage, Pixels, VideoError, VideoInfo
from reco_lightning.data.video.file import VideoFile
from reco_lightning.data.video.frames import FrameFolder, is_frame_folder
from reco_lightning.support.argument_checks import check_choice, check_int, check_path

__all__ = ["OnDamage", "Resize", "VideoError", "VideoInfo", "fit_size", "open_source", "probe", "read_clip"]

Resize = Literal["short_side_crop", "squash"]


def fit_size(height: int, width: int, *, size: int | tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Returns the size that a whole frame is scaled to before the centre crop.

    Args:
        height: Height of the frame in pixels.
        width: Width of the frame in pixels.
        size: Side, or (height, width), of the clip that is wanted, in pixels.
        resize: `squash` scales both sides independently; `short_side_crop` keeps the aspect ratio and covers `size`.

    Returns:
        (height, width), nowhere smaller than `size`.

    Raises:
        ValueError: If `size` is not positive or `resize` unknown.

    Example:
        >>> fit_size(360, 640, size=256, resize="short_side_crop")
        (256, 455)
        >>> fit_size(360, 640, size=256, resize="squash")
        (256, 256)
    """
    check_choice(get_args(Resize), resize=resize)
    high, wide = _sides(size)
    if resize == "squash":
        return high, wide
    scale = max(high / height, wide / width)
    return max(high, round(height * scale)), max(wide, round(width * scale))


def open_source(path: str | os.PathLike[str]) -> VideoFile | FrameFolder:
    """Chooses how a video is read: as a file, or as a folder of frames where the path leads to a folder.

    Args:
        path: The video; one inside a zip file is `videos.zip/first`. A file need not exist.

    Raises:
        VideoError: The zip file cannot be read.
    """
    return FrameFolder(path) if is_frame_folder(path) else VideoFile(path)


def probe(path: str | os.PathLike[str], *, on_damage: OnDamage = "skip") -> VideoInfo:
    """Decodes a video once from start to end and reports what it holds; see `VideoFile.probe`.

    Args:
        path: The video file, or a folder of frames, all of which are decoded; see `FrameFolder`.
        on_damage: `skip` refuses a video with damage anywhere; `keep` takes the parts in front of and behind it.

    Returns:
        Frames, frames per second, displayed size, reader, what proves its clips, and the sound parts.

    Raises:
        ValueError: If `on_damage` is neither.
        VideoError: If the file is missing, empty or no video; cut off or damaged anywhere, with `keep` throughout.

    Example:
        >>> probe("missing.mp4")
        Traceback (most recent call last):
        ...
        reco_lightning.data.video.decoders.VideoError: ...missing.mp4: is not a file
    """
    check_path(path=path)
    check_choice(get_args(OnDamage), on_damage=on_damage)
    return open_source(path).probe(on_damage)


def read_clip(
    path: str | os.PathLike[str],
    *,
    start: int,
    frames: int,
    stride: int = 1,
    size: int | tuple[int, int] = 256,
    resize: Resize = "short_side_crop",
    info: VideoInfo | None = None,
) -> Pixels:
    """Reads one clip of T frames, resized in the decoder.

    Rotation metadata is applied; pixels are taken as square. The reader is opened here and dropped on return, with one
    thread, so the function may be called from any worker process.

    Args:
        path: The video file, or a folder of frames; see `FrameFolder`.
        start: Index of the first frame.
        frames: Number of frames T.
        stride: Distance between two frames of the clip, in frames of the file.
        size: Side, or (height, width), of the clip in pixels.
        resize: `short_side_crop` scales the frame until it covers `size` and crops the centre; `squash` distorts.
        info: What `probe` returned for this file. Without it the file is probed first, that is decoded as a whole;
            the answer is remembered for as long as the file does not change.

    Returns:
        Pixels, uint8 (T, H, W, 3), RGB in 0..255.

    Raises:
        ValueError: If an argument is out of range.
        VideoError: If the file is broken or shorter than the clip.

    Example:
        >>> import tempfile, pathlib
        >>> from reco_lightning.support.media import write_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_video(pathlib.Path(folder, "a.mp4"), np.zeros((8, 48, 64, 3), np.uint8))
        ...     read_clip(path, start=1, frames=3, stride=2, size=32).shape
        (3, 32, 32, 3)
    """
    check_path(path=path)
    check_int(at_least=0, start=start)
    check_int(at_least=1, frames=frames, stride=stride)
    high, wide = _sides(size)
    source = open_source(path)
    try:
        known = _probe_unchanged(source.path, *source.stamp()) if info is None else info
    except OSError as error:
        raise VideoError(source.path, f"cannot be read: {error.strerror}") from error
    indices = range(start, start + frames * stride, stride)
    if indices[-1] >= known.frames:
        need = f"a clip of {frames} at stride {stride} from frame {start} needs {indices[-1] + 1}"
        raise VideoError(source.path, f"holds {known.frames} frames; {need}")
    if not any(first <= start and indices[-1] < stop for first, stop in known.parts()):
        parts = ", ".join(f"{first} to {stop - 1}" for first, stop in known.parts())
        raise VideoError(source.path, f"{known.damage}; frames {start} to {indices[-1]} do not lie in one of {parts}")
    scaled = fit_size(known.height, known.width, size=(high, wide), resize=resize)
    clip = source.read(indices, info=known, size=scaled)
    top, left = (scaled[0] - high) // 2, (scaled[1] - wide) // 2
    return np.ascontiguousarray(clip[:, top : top + high, left : left + wide])  # (T, H, W, 3)


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = size if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    for side in sides:
        check_int(size=side)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be a positive side or a pair (height, width) in pixels, got {size!r}")
    return sides[0], sides[1]


@lru_cache(maxsize=1024)
def _probe_unchanged(path: str, size: int, changed: int) -> VideoInfo:
    return probe(path)
