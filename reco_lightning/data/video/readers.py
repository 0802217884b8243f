# SPDX-License-Identifier: Apache-2.0
"""Three ways to read frames of a video file by their numbers, the quickest first."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from reco_lightning.data.video.decoders import Pixels, VideoError, decode_frames, frame_pixels, open_video
from reco_lightning.data.video.frame_prints import FrameTable

__all__ = ["read_decord", "read_pyav", "seek_pyav"]

_REORDERED = 16  # frames that a codec may show in another order than it stores them


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
    decord.logging.set_level(decord.logging.QUIET)  # hundreds of lines about what `probe` tells in one
    try:
        reader = decord.VideoReader(path, width=size[1], height=size[0], num_threads=1)
        if len(reader) != total:
            return None
        batch = reader.get_batch(list(indices))
    except (RuntimeError, IndexError, decord.DECORDError):
        return None
    clip = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # the user may have set a bridge
    return clip if clip.shape == (len(indices), *size, 3) else None  # rows of some widths come back padded


def seek_pyav(path: str, indices: range, *, table: FrameTable, size: tuple[int, int]) -> Pixels | None:
    """Reads the frames at `indices` with PyAV from the key frame before them, by their time stamps.

    Args:
        path: Absolute path of the file.
        indices: Frame numbers, ascending.
        table: Of the file.
        size: (height, width) as displayed.

    Returns:
        uint8 (T, height, width, 3), or None where the stamps do not lead to the frames.

    Raises:
        VideoError: If the file cannot be opened any more.
    """
    before = indices[0] - _REORDERED
    if before <= 0 or not len(table.times):
        return None
    wanted = [int(time) for time in table.times[list(indices)]]
    clip = np.empty((len(wanted), *size, 3), np.uint8)
    filled = 0
    with open_video(path) as (container, stream):
        scaler = VideoReformatter()
        try:
            container.seek(int(table.times[before]), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts > wanted[filled]:
                    return None
                if frame.pts == wanted[filled]:
                    clip[filled] = frame_pixels(scaler, frame, height=size[0], width=size[1])
                    filled += 1
                    if filled == len(wanted):
                        return clip
        except av.FFmpegError:
            return None
    return None


def read_pyav(path: str, indices: range, *, size: tuple[int, int], keep: bool = False) -> Pixels:
    """Reads the frames at `indices` with PyAV, decoding from the start of the file and counting.

    Args:
        path: Absolute path of the file.
        indices: Frame numbers, ascending.
        size: (height, width) as displayed.
        keep: Go on behind damage, as `probe` did.

    Returns:
        uint8 (T, height, width, 3).

    Raises:
        VideoError: If the file is damaged or ends before the last of them.
    """
    clip = np.empty((len(indices), *size, 3), np.uint8)
    filled = 0
    with open_video(path) as (container, stream):
        scaler = VideoReformatter()
        for count, frame in enumerate(decode_frames(path, container, stream, [] if keep else None)):
            if count == indices[filled]:
                clip[filled] = frame_pixels(scaler, frame, height=size[0], width=size[1])
                filled += 1
                if filled == len(indices):
                    return clip
    raise VideoError(path, f"ended before frame {indices[filled]}")
