# SPDX-License-Identifier: Apache-2.0
"""Decodes frames with decord, which is fast, or with PyAV, which is exact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

__all__ = [
    "Pixels",
    "VideoError",
    "VideoInfo",
    "decode_frames",
    "frame_pixels",
    "open_video",
    "read_decord",
    "read_pyav",
]

Pixels = npt.NDArray[np.uint8]
Reader = Literal["decord", "pyav", "frames"]

_GAP = 1024  # bytes between the packets of a Matroska file, where only short headers lie
_HOLE = bytes(64)  # no entropy-coded picture holds a run of 64 zero bytes: it is a part that was never written
_HOLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "mpeg4"})
# Titles in other encodings than UTF-8 must not stop a video from opening; from PyAV 19 on they never do.
_OPEN_OPTIONS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(ValueError):
    """A video file that cannot be used: names the file and the reason.

    Args:
        path: The file; or the whole message when `reason` is None.
        reason: What is wrong with it.

    Attributes:
        reason: What is wrong, without the file's name.

    Example:
        >>> VideoError("clip.mp4", "holds no video stream")
        VideoError('clip.mp4: holds no video stream')
    """

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        super().__init__(os.fspath(path) if reason is None else f"{os.fspath(path)}: {reason}")
        self.reason = os.fspath(path) if reason is None else reason


class VideoInfo(NamedTuple):
    """The findings of `probe` about a video.

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


@contextmanager
def open_video(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file and its main video stream with PyAV; whatever FFmpeg raises meanwhile becomes a `VideoError`.

    Args:
        path: Absolute path of the file.

    Yields:
        The container and the stream that decord would choose too.

    Raises:
        VideoError: If the file cannot be opened, holds no video stream, or decoding inside the block fails.
    """
    try:
        with av.open(path, **_OPEN_OPTIONS) as opened:  # type: ignore[call-overload]
            container = cast(InputContainer, opened)
            stream = cast("VideoStream | None", container.streams.best("video"))
            if stream is None or stream.disposition & Disposition.attached_pic:  # a cover picture is no video
                raise VideoError(path, "holds no video stream")
            if stream.codec_context is None:
                raise VideoError(path, "is coded in a way that FFmpeg does not know")
            stream.codec_context.thread_count = 1  # workers are the parallelism; decoding threads would fight them
            yield container, stream
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


def decode_frames(path: str, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Decodes frames in display order; the first sign of damage raises, also where FFmpeg would paint over it.

    Args:
        path: The file, for the message.
        container: From `open_video`.
        stream: From `open_video`.

    Yields:
        Every frame of the stream.

    Raises:
        VideoError: At the first damaged packet or frame.
    """
    count = 0
    holes = stream.codec_context.name in _HOLE_CODECS
    for packet in _packets(path, container, stream):
        if packet.is_corrupt or (holes and _HOLE in bytes(packet)):
            raise VideoError(path, f"is damaged or cut off after frame {count}")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise VideoError(path, f"is damaged at frame {count}")
            yield frame
            count += 1


def frame_pixels(scaler: VideoReformatter, frame: VideoFrame, *, height: int, width: int) -> Pixels:
    """Scales one frame as decord does and turns it as the file's metadata says.

    Args:
        scaler: One per file: it keeps its tables from frame to frame.
        frame: A decoded frame.
        height: Height as displayed.
        width: Width as displayed.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    turns = frame.rotation // 90 % 4
    if turns % 2:
        height, width = width, height
    small = scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
    return np.rot90(cast(Pixels, small.to_ndarray()), turns)


def read_decord(path: str, indices: range, *, total: int, size: tuple[int, int]) -> Pixels | None:
    """Reads the frames at `indices` with decord, opened for this call alone and with one thread.

    Args:
        path: Absolute path of the file.
        indices: Frame numbers.
        total: Number of frames of the file; decord must count as many.
        size: (height, width) as displayed.

    Returns:
        uint8 (T, height, width, 3), or None where decord is missing, refuses the file or visibly misreads it.
    """
    try:
        import decord
    except (ImportError, OSError):  # no wheel for this platform
        return None
    try:
        reader = decord.VideoReader(path, width=size[1], height=size[0], num_threads=1)
        if len(reader) != total:
            return None
        batch = reader.get_batch(list(indices))
    except (RuntimeError, IndexError, decord.DECORDError):
        return None
    clip = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # the user may have set a bridge
    return clip if clip.shape == (len(indices), *size, 3) else None  # rows of some widths come back padded


def read_pyav(path: str, indices: range, *, size: tuple[int, int]) -> Pixels:
    """Reads the frames at `indices` with PyAV, decoding from the start of the file and counting.

    Seeking by time stamps would be faster far into a file, and wrong wherever stamps are missing or out of order.

    Args:
        path: Absolute path of the file.
        indices: Frame numbers, ascending.
        size: (height, width) as displayed.

    Returns:
        uint8 (T, height, width, 3).

    Raises:
        VideoError: If the file is damaged or ends before the last of them.
    """
    clip = np.empty((len(indices), *size, 3), np.uint8)
    filled = 0
    with open_video(path) as (container, stream):
        scaler = VideoReformatter()
        for count, frame in enumerate(decode_frames(path, container, stream)):
            if count == indices[filled]:
                clip[filled] = frame_pixels(scaler, frame, height=size[0], width=size[1])
                filled += 1
                if filled == len(indices):
                    return clip
    raise VideoError(path, f"ended before frame {indices[filled]}")


def _packets(path: str, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Packets of one stream. FFmpeg jumps silently over damaged parts of Matroska files; where it did raises."""
    if not container.format.name.startswith("matroska") or "alpha_mode" in stream.metadata:  # transparency lies between
        yield from container.demux(stream)
        return
    last, end = -1, None
    for packet in container.demux():
        if packet.size and packet.pos is not None:
            if end is not None and packet.pos - end > _GAP:
                raise VideoError(path, f"is damaged: {packet.pos - end} bytes from byte {end} on cannot be read")
            end = packet.size + (end if packet.pos == last and end is not None else packet.pos)  # laced: one place
            last = packet.pos
        if packet.stream.index == stream.index:
            yield cast("Packet[VideoStream]", packet)
