# SPDX-License-Identifier: Apache-2.0
"""Reads clips of frames from a video file.

decord reads, opened anew for every clip, wherever `probe` has proved on the file itself that its frames are right.
PyAV, which decodes from the start and counts, takes over for all other files. Where the video is a folder of frames,
`reco_lightning.data.video.frames` reads.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from reco_lightning.data.video.decoders import (
    Pixels,
    VideoError,
    decode_frames,
    frame_pixels,
    open_video,
    read_decord,
    read_pyav,
)
from reco_lightning.data.video.frames import FrameFolder, is_frame_folder, probe_frames, read_frames
from reco_lightning.support.argument_checks import check_choice, check_int, check_path

__all__ = ["Resize", "VideoError", "VideoInfo", "fit_size", "probe", "read_clip"]

Resize = Literal["short_side_crop", "squash"]
Reader = Literal["decord", "pyav", "frames"]

_PRINT = 64  # side of a frame's fingerprint before pooling; decord pads the rows of some smaller widths
_LATE = 0.25  # seconds that a header may promise beyond the last frame
_TOLERANCE = 0.25  # grey levels by which another frame must match better before decord's frame counts as wrong


class VideoInfo(NamedTuple):
    """What `probe` found in a video file.

    Attributes:
        frames: Number of frames that decode.
        fps: Average frames per second; 0.0 where the file does not say.
        height: Height in pixels as displayed, rotation metadata applied.
        width: Width in pixels as displayed.
        reader: The reader that returns the right frames of this file: `decord` or `pyav`; `frames` for a folder.
    """

    frames: int
    fps: float
    height: int
    width: int
    reader: Reader = "decord"


def fit_size(height: int, width: int, *, size: int | tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Size that a whole frame is scaled to before the centre crop.

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


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Decode a file once from start to end and say what it holds and who can read it.

    Only a full decode finds damage in the middle, and only a comparison finds the files in which decord returns frames
    other than those asked for (it does in some HEVC, MPEG-TS, MPEG-4 and edited MP4 files): its frames at the start,
    middle and end are matched with those that PyAV counted.

    Args:
        path: The video file, or a folder of frames, all of which are decoded; see `FrameFolder`.

    Returns:
        Frames, frames per second, displayed size and reader.

    Raises:
        VideoError: If the file is missing, empty, no video, cut off or damaged anywhere.

    Example:
        >>> probe("missing.mp4")
        Traceback (most recent call last):
        ...
        reco_lightning.data.video.decoders.VideoError: ...missing.mp4: is not a file
    """
    check_path(path=path)
    path = os.path.abspath(path)
    if is_frame_folder(path):
        frames, height, width = probe_frames(path)
        return VideoInfo(frames, 0.0, height, width, "frames")
    if not os.path.isfile(path):
        raise VideoError(path, "is not a file")
    if os.path.getsize(path) == 0:
        raise VideoError(path, "is empty (0 bytes)")
    prints: list[Pixels] = []
    first, end = math.inf, 0.0
    with open_video(path) as (container, stream):
        scaler = VideoReformatter()
        turns, height, width = 0, 0, 0
        for frame in decode_frames(path, container, stream):
            if not prints:
                turns, height, width = frame.rotation // 90, frame.height, frame.width
            prints.append(_fingerprint(frame_pixels(scaler, frame, height=_PRINT, width=_PRINT)))
            if frame.pts is not None and frame.time_base is not None:
                first = min(first, float(frame.pts * frame.time_base))
                end = max(end, float((frame.pts + (frame.duration or 0)) * frame.time_base))
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        declared = _declared_end(container, stream, first)
    if not prints:
        raise VideoError(path, "holds no frame that decodes")
    if declared is not None and declared - end > max(_LATE, 0.02 * declared):
        raise VideoError(path, f"is cut off: its frames end at {end:.1f} of {declared:.1f} seconds")
    if turns % 2:
        height, width = width, height
    reader: Reader = "decord" if _decord_agrees(path, np.stack(prints)) else "pyav"
    return VideoInfo(len(prints), fps, height, width, reader)


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
    """Read one clip of T frames, resized in the decoder.

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
    path = os.path.abspath(path)
    known = _remembered_probe(path) if info is None else info
    indices = range(start, start + frames * stride, stride)
    if indices[-1] >= known.frames:
        need = f"a clip of {frames} at stride {stride} from frame {start} needs {indices[-1] + 1}"
        raise VideoError(path, f"holds {known.frames} frames; {need}")
    scaled = fit_size(known.height, known.width, size=(high, wide), resize=resize)
    clip = None
    if known.reader == "frames":
        clip = read_frames(path, indices, total=known.frames, size=scaled)
    elif known.reader == "decord":
        clip = read_decord(path, indices, total=known.frames, size=scaled)
    if clip is None:
        clip = read_pyav(path, indices, size=scaled)
    top, left = (scaled[0] - high) // 2, (scaled[1] - wide) // 2
    return np.ascontiguousarray(clip[:, top : top + high, left : left + wide])  # (T, H, W, 3)


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = size if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    for side in sides:
        check_int(size=side)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be a positive side or a pair (height, width) in pixels, got {size!r}")
    return sides[0], sides[1]


def _declared_end(container: InputContainer, stream: VideoStream, first: float) -> float | None:
    """Second at which the file's header says that the video ends; None where it does not say or nothing has a time."""
    if first == math.inf:
        return None
    if container.format.name.startswith("matroska"):  # the end of this stream as HH:MM:SS.fraction
        with contextlib.suppress(KeyError, ValueError):
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration is not None and stream.time_base:
        return first + float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be the sound's
        return first + container.duration / av.time_base
    return None


def _fingerprint(pixels: Pixels) -> Pixels:
    cell = _PRINT // 16
    grey = pixels.reshape(16, cell, 16, cell, 3).mean((1, 3, 4))  # (16, 16)
    return grey.round().astype(np.uint8)


def _decord_agrees(path: str, truth: Pixels) -> bool:
    """Whether decord returns the frames of `truth`, fingerprints (frames, 16, 16), where it is asked for them."""
    total = len(truth)
    for start in sorted({max(0, total - 3), total // 2, 0}, reverse=True):
        indices = range(start, min(start + 3, total))
        clip = read_decord(path, indices, total=total, size=(_PRINT, _PRINT))
        if clip is None:
            return False
        for index, pixels in zip(indices, clip, strict=True):
            distance = np.abs(truth.astype(np.int16) - _fingerprint(pixels)).mean((1, 2))  # (frames,)
            if distance[index] > distance.min() + _TOLERANCE:
                return False
    return True


def _remembered_probe(path: str) -> VideoInfo:
    try:
        if is_frame_folder(path):
            return _probe_unchanged(path, *FrameFolder(path).stamp())
        status = os.stat(path)
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from error
    return _probe_unchanged(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _probe_unchanged(path: str, size: int, changed: int) -> VideoInfo:
    return probe(path)
