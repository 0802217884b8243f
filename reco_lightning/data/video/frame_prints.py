# SPDX-License-Identifier: Apache-2.0
"""Small prints of all frames of a file, which prove that a clip shows the frames that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

__all__ = ["PRINT_BYTES", "FrameTable", "frame_prints"]

Bytes = npt.NDArray[np.uint8]

_ROWS, _COLUMNS = 6, 8
PRINT_BYTES = _ROWS * _COLUMNS
_SAME = 0.5  # grey levels that two readers of one frame differ by; measured: 0.3 from 32 pixels on, more below
_LIGHTER = 2.0  # grey levels by which FFmpeg makes frames of an odd size lighter
_STRANGE = 10.0  # grey levels by which a whole clip may differ where no other frame matches better


def frame_prints(clip: Bytes) -> Bytes:
    """Shrinks frames to greys that do not depend on the size that a reader scaled them to.

    Args:
        clip: uint8 (T, H, W, 3), whole frames.

    Returns:
        uint8 (T, 48): 6 rows of 8 greys.

    Example:
        >>> frame_prints(np.full((2, 40, 60, 3), 7, np.uint8)).shape
        (2, 48)
    """
    frames = torch.from_numpy(np.require(clip, requirements=["C", "W"])).permute(0, 3, 1, 2)
    cells = F.interpolate(frames, size=(_ROWS, _COLUMNS), mode="bilinear", antialias=True)  # weighs every pixel
    return cells.sum(1, dtype=torch.int32).flatten(1).div(3).round().to(torch.uint8).numpy()


class FrameTable:
    """What a scan keeps of each of the N frames of a file: 56 bytes.

    Args:
        prints: uint8 (N, 48), from `frame_prints`.
        times: int64 (N,), time stamps in units of the stream; (0,) where they do not ascend or some are missing.

    Example:
        >>> clip = np.arange(4, dtype=np.uint8).repeat(300).reshape(4, 10, 10, 3) * 20
        >>> table = FrameTable(frame_prints(clip), np.arange(4))
        >>> table.shows(clip[1:3], range(1, 3)), table.shows(clip[1:3], range(2, 4)), table
        (True, False, FrameTable(4 frames))
    """

    def __init__(self, prints: Bytes, times: npt.NDArray[np.int64]) -> None:
        self.prints, self.times = prints, times

    def __repr__(self) -> str:
        return f"FrameTable({len(self.prints)} frames)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrameTable):
            return NotImplemented
        return np.array_equal(self.prints, other.prints) and np.array_equal(self.times, other.times)

    def __hash__(self) -> int:
        return hash((self.prints.tobytes(), self.times.tobytes()))

    def shows(self, clip: Bytes, indices: Sequence[int]) -> bool:
        """Returns whether a clip shows these frames: no other frame of the file is more like one of its frames.

        Frames that look alike pass for each other.

        Args:
            clip: uint8 (T, H, W, 3), whole frames of any size.
            indices: T frame numbers.
        """
        own = frame_prints(clip).astype(np.float32)  # (T, 48)
        shades = {0.0, _LIGHTER * (clip.shape[1] % 2 or clip.shape[2] % 2)}
        asked = _distances(own, self.prints[list(indices)], shades)
        if (asked > _STRANGE).any():
            return False
        doubtful = asked > _SAME
        nearest = np.array([_distances(one, self.prints, shades).min() for one in own[doubtful]])
        return bool((asked[doubtful] <= nearest + _SAME).all())


def _distances(own: npt.NDArray[np.float32], prints: Bytes, shades: set[float]) -> npt.NDArray[np.float32]:
    """Grey levels (N,) between prints (N, 48) at the better of the shades: the root of the mean square."""
    return np.sqrt(np.min([np.square(own - shade - prints).mean(-1) for shade in shades], axis=0))
