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

from reco_lightning.data.video.frame_prints import FrameTable

__all__ = [
    "OnDamage",
    "Pixels",
    "VideoError",
    "VideoInfo",
    "decode_frames",
    "frame_pixels",
    "open_video",
    "refuse_animated_webp",
]

Pixels = npt.NDArray[np.uint8]
Reader = Literal["decord", "pyav", "frames"]
OnDamage = Literal["skip", "keep"]

_HERE = "<frame>"  # stands in a reason for a number that is known later
_ANIMATION = 2  # bit of a WebP's flags
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
        frames: Number of frames: the pictures that decode, in the order in which they are shown.
        fps: Average frames per second; 0.0 where the file does not say.
        height: Height in pixels as displayed, rotation metadata applied.
        width: Width in pixels as displayed.
        reader: What reads this file first: `decord` or `pyav`; `frames` for a folder.
        table: What proves a clip of a file; without it PyAV reads from the start and counts.
        runs: First frame, and the one behind the last, of every part without damage in it; empty for a sound video.
        damage: What is wrong with a damaged video, in words; empty for a sound one.
    """

    frames: int
    fps: float
    height: int
    width: int
    reader: Reader = "decord"
    table: FrameTable | None = None
    runs: tuple[tuple[int, int], ...] = ()
    damage: str = ""

    def parts(self) -> tuple[tuple[int, int], ...]:
        """Returns the runs of frames that a clip may lie in, of a sound video too."""
        return self.runs or ((0, self.frames),)


def refuse_animated_webp(path: str, name: str, head: bytes) -> None:
    """Refuses a file that no decoder of FFmpeg reads.

    Args:
        path: Of the video.
        name: What to call the file.
        head: Its first 32 bytes.

    Raises:
        VideoError: It is an animated WebP.
    """
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20] & _ANIMATION:
        what = "an animated WebP, which FFmpeg does not decode"
        raise VideoError(path, f"{name} is {what}; convert it first, for instance: magick {name} {name}.gif")


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


def decode_frames(
    path: str, container: InputContainer, stream: VideoStream, damage: list[tuple[int, str]] | None = None
) -> Iterator[VideoFrame]:
    """Decodes frames in display order; damage is told also where FFmpeg would paint over it.

    Args:
        path: The file, for the message.
        container: From `open_video`.
        stream: From `open_video`.
        damage: Takes the number of the frame that follows each damage, and what it is. Decoding then goes on at the
            next key frame; frames of which it is not sure that they need nothing lost, are dropped on both sides.

    Yields:
        Every sound frame of the stream.

    Raises:
        VideoError: At the first damaged packet or frame, where `damage` is None.
    """
    count, waiting, earliest = 0, False, None
    codec = stream.codec_context
    for packet, flaw in _packets(container, stream, keep=damage is not None):
        frames: list[VideoFrame] = []
        if packet is not None and not flaw and not (waiting and packet.size and not packet.is_keyframe):
            if waiting and packet.size:
                waiting, earliest = False, packet.pts
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if damage is None:
                    raise
                flaw = f"cannot be decoded: {error.strerror}"
        for frame in frames:
            if earliest is not None and frame.pts is not None and frame.pts < earliest:
                continue  # it needs what was lost
            if frame.is_corrupt:
                flaw = f"is damaged at frame {count}"
                break
            yield frame
            count += 1
        if flaw:
            flaw = flaw.replace(_HERE, str(count))
            if damage is None:
                raise VideoError(path, flaw)
            if not waiting:
                damage.append((count, flaw))
            waiting = True
            codec.flush_buffers()


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


def _packets(
    container: InputContainer, stream: VideoStream, *, keep: bool
) -> Iterator[tuple[Packet[VideoStream] | None, str]]:
    """Packets of the stream, each with what is wrong with it; None where nothing of the stream can be read."""
    holes = stream.codec_context.name in _HOLE_CODECS
    # FFmpeg jumps silently over damaged parts of Matroska files; transparency lies between the packets
    gaps = container.format.name.startswith("matroska") and "alpha_mode" not in stream.metadata
    last, end = -1, None
    held: Packet[VideoStream] | None = None  # whether a packet is whole shows where the next one lies
    try:
        for packet in container.demux() if gaps else container.demux(stream):
            missing = gap = 0
            if gaps and packet.size and packet.pos is not None:
                missing, gap = (0, 0) if end is None else (packet.pos - end, end)
                end = packet.size + (end if packet.pos == last and end is not None else packet.pos)  # laced: one place
                last = packet.pos
            if missing > _GAP:
                yield held, f"is damaged: {missing} bytes from byte {gap} on cannot be read"
            elif held is not None:
                damaged = held.is_corrupt or (holes and _HOLE in bytes(held))
                yield held, f"is damaged or cut off after frame {_HERE}" if damaged else ""
            held = cast("Packet[VideoStream]", packet) if packet.stream.index == stream.index else None
        if held is not None:
            yield held, ""  # it is empty and asks for the frames that are left
    except av.FFmpegError as error:
        if not keep:
            raise
        yield None, f"cannot be decoded: {error.strerror}"
