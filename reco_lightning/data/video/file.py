# SPDX-License-Identifier: Apache-2.0
"""Probes a video file and reads frames of it.

`VideoFile.probe` decodes a file once with PyAV, counts its frames and keeps a print of each. decord, opened anew for
every clip, reads; the prints prove what it returns. A file that it misreads is PyAV's from then on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from reco_lightning.data.video.decoders import (
    OnDamage,
    Pixels,
    Reader,
    VideoError,
    VideoInfo,
    decode_frames,
    frame_pixels,
    open_video,
    refuse_animated_webp,
)
from reco_lightning.data.video.frame_prints import FrameTable, frame_prints
from reco_lightning.data.video.readers import read_decord, read_pyav, seek_pyav

__all__ = ["VideoFile"]

_SIDE = 64  # pixels to which a frame is scaled for its print
_RATE_ERROR = 0.02
_LATE = 0.25  # seconds that a header may promise beyond the last frame

_misread: set[str] = set()  # files that decord has misread in this process


class VideoFile:
    """A video file; does what `FrameFolder` does.

    Args:
        path: The file; need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)

    def probe(self, on_damage: OnDamage = "skip") -> VideoInfo:
        """Decodes all frames once and says what they are.

        Only a full decode finds damage in the middle, and only a comparison finds the files in which decord returns
        frames other than those asked for. Its frames at the start, middle and end are compared here, all others when
        they are read.

        Args:
            on_damage: `keep` goes on behind damage.

        Raises:
            VideoError: The file is missing, empty, no video, cut off or damaged anywhere; with `keep` nothing of it is
                sound.
        """
        path = self.path
        if not os.path.isfile(path):
            raise VideoError(path, "is not a file")
        if os.path.getsize(path) == 0:
            raise VideoError(path, "is empty (0 bytes)")
        with open(path, "rb") as file:
            refuse_animated_webp(path, os.path.basename(path), file.read(32))
        damage: list[tuple[int, str]] = []
        prints: list[Pixels] = []
        times: list[int | None] = []
        first, end = math.inf, 0.0
        with open_video(path) as (container, stream):
            scaler = VideoReformatter()
            turns, height, width = 0, 0, 0
            for frame in decode_frames(path, container, stream, damage if on_damage == "keep" else None):
                if not prints:
                    turns, height, width = frame.rotation // 90, frame.height, frame.width
                prints.append(frame_prints(frame_pixels(scaler, frame, height=_SIDE, width=_SIDE)[None])[0])
                times.append(frame.pts)
                if frame.pts is not None and frame.time_base is not None:
                    first = min(first, float(frame.pts * frame.time_base))
                    end = max(end, float((frame.pts + (frame.duration or 0)) * frame.time_base))
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            declared = _declared_end(container, stream, first)
        total = len(prints)
        if declared is not None and total and not damage and declared - end > max(_LATE, 0.02 * declared):
            damage.append((total, f"is cut off: its frames end at {end:.1f} of {declared:.1f} seconds"))
        measured = total / (end - first) if end > first else fps
        if not damage and abs(measured - fps) > _RATE_ERROR * fps:  # FFmpeg guesses that of a GIF
            fps = measured
        if damage and (on_damage == "skip" or not prints):
            raise VideoError(path, damage[0][1])
        if not prints:
            raise VideoError(path, "holds no frame that decodes")
        if turns % 2:
            height, width = width, height
        info = VideoInfo(total, fps, height, width, "pyav", FrameTable(np.stack(prints), _ascending(times)))
        if damage:
            edges = sorted({0, total, *(number for number, _ in damage)})
            runs = tuple(itertools.pairwise(edges))
            return info._replace(runs=runs, damage="; ".join(dict.fromkeys(reason for _, reason in damage)))
        return info._replace(reader=_first_reader(path, info))

    def read(self, indices: range, *, info: VideoInfo, size: tuple[int, int]) -> Pixels:
        """Reads the frames at ascending `indices`, scaled to `size` (height, width): uint8 (T, height, width, 3)."""
        if info.table is None or info.damage:
            return read_pyav(self.path, indices, size=size, keep=bool(info.damage))
        if info.reader == "decord" and self.path not in _misread:
            clip = read_decord(self.path, indices, total=info.frames, size=size)
            if clip is not None and info.table.shows(clip, indices):
                return clip
            _misread.add(self.path)
        clip = seek_pyav(self.path, indices, table=info.table, size=size)
        if clip is not None and info.table.shows(clip, indices):
            return clip
        return read_pyav(self.path, indices, size=size)

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
        # an AVI that starts late counts from 0
        since = first if stream.start_time is None else min(first, float(stream.start_time * stream.time_base))
        return since + float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be the sound's
        return first + container.duration / av.time_base
    return None


def _ascending(times: list[int | None]) -> npt.NDArray[np.int64]:
    """The time stamps (N,) if each frame has its own and they ascend, else (0,)."""
    stamps = np.array([time for time in times if time is not None], dtype=np.int64)
    return stamps if len(stamps) == len(times) and (np.diff(stamps) > 0).all() else stamps[:0]


def _first_reader(path: str, info: VideoInfo) -> Reader:
    """decord, where it returns the right frames at the start, middle and end."""
    assert info.table is not None
    for start in sorted({max(0, info.frames - 3), info.frames // 2, 0}, reverse=True):
        indices = range(start, min(start + 3, info.frames))
        clip = read_decord(path, indices, total=info.frames, size=(_SIDE, _SIDE))
        if clip is None or not info.table.shows(clip, indices):
            return "pyav"
    return "decord"
