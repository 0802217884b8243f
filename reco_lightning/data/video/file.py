# SPDX-License-Identifier: Apache-2.0
"""Probes a video file and reads frames of it.

decord reads, opened anew for every clip, wherever `VideoFile.probe` has proved on the file itself that its frames are
right. PyAV, which decodes from the start and counts, takes over for all other files.
"""

from __future__ import annotations

import contextlib
import math
import os

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from reco_lightning.data.video.decoders import (
    Pixels,
    Reader,
    VideoError,
    VideoInfo,
    decode_frames,
    frame_pixels,
    open_video,
    read_decord,
    read_pyav,
)

__all__ = ["VideoFile"]

_PRINT = 64  # side of a frame's fingerprint before pooling; decord pads the rows of some smaller widths
_LATE = 0.25  # seconds that a header may promise beyond the last frame
_TOLERANCE = 0.25  # grey levels by which another frame must match better before decord's frame counts as wrong


class VideoFile:
    """A video file; does what `FrameFolder` does.

    Args:
        path: The file; need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)

    def probe(self) -> VideoInfo:
        """Decodes all frames once and says what they are.

        Only a full decode finds damage in the middle, and only a comparison finds the files in which decord returns
        frames other than those asked for (it does in some HEVC, MPEG-TS, MPEG-4 and edited MP4 files): its frames at
        the start, middle and end are matched with those that PyAV counted.

        Raises:
            VideoError: The file is missing, empty, no video, cut off or damaged anywhere.
        """
        path = self.path
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

    def read(self, indices: range, *, info: VideoInfo, size: tuple[int, int]) -> Pixels:
        """Reads the frames at ascending `indices`, scaled to `size` (height, width): uint8 (T, height, width, 3)."""
        clip = None
        if info.reader == "decord":
            clip = read_decord(self.path, indices, total=info.frames, size=size)
        return read_pyav(self.path, indices, size=size) if clip is None else clip

    def stamp(self) -> list[int]:
        """Returns the size in bytes and time of change in ns; while both stay, `probe` would return the same."""
        status = os.stat(self.path)
        return [status.st_size, status.st_mtime_ns]


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
