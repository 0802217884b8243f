# SPDX-License-Identifier: Apache-2.0
"""Optical flow between frames of one video against their distance (arXiv 2604.07402, Figures 5, 7 and 11, right).

Farnebäck's method in OpenCV's implementation; `motion_groups` sorts videos by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from reco_lightning.metrics.interval import INTERVALS, IntervalMetric, Pairs, check_videos, frame_pairs
from reco_lightning.support.argument_checks import check_int_sequence, check_size

__all__ = ["FARNEBACK", "IntervalOpticalFlow", "flow_magnitude", "interval_optical_flow", "mean_flow"]

#: Settings of ``cv2.calcOpticalFlowFarneback``; flow depends on them.
FARNEBACK: dict[str, Any] = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}

_Grey = npt.NDArray[np.uint8]


def flow_magnitude(source: _Grey, target: _Grey) -> float:
    r"""Returns the mean flow between two pictures: :math:`\frac{1}{HW} \sum_p \lVert (u_p, v_p) \rVert_2`.

    Args:
        source: Grey values, uint8 (H, W).
        target: The same place later, uint8 (H, W).

    Returns:
        Pixels.

    Raises:
        ModuleNotFoundError: If OpenCV is missing.

    Example:
        >>> picture = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
        >>> round(flow_magnitude(picture, picture), 1)
        0.0
    """
    flow = _cv2().calcOpticalFlowFarneback(source, target, None, **FARNEBACK)  # (H, W, 2)
    return float(np.linalg.norm(flow, axis=-1).mean(dtype=np.float64))


def interval_optical_flow(videos: Tensor, intervals: Sequence[int] = INTERVALS, *, pairs: Pairs = "all") -> Tensor:
    r"""Returns the mean flow between frames at a distance, for each video.

    .. math::
        \mathrm{Flow}(\Delta) = \frac{1}{|P_\Delta|} \sum_{(s, t) \in P_\Delta} \frac{1}{HW} \sum_p
        \lVert \mathbf{f}_{s \to t}(p) \rVert_2

    with :math:`P_\Delta` from ``frame_pairs`` and :math:`\mathbf{f}` Farnebäck's flow of the grey frames. It grows with
    the number of pixels, and saturates at long distances. About 12 ms a pair of 256 x 256 on one core.

    Args:
        videos: uint8, (B, 3, T, H, W), 0 to 255.
        intervals: K distances in frames, each from 1 to T - 1.
        pairs: Which pairs stand for a distance, as in ``frame_pairs``.

    Returns:
        Pixels of the given resolution, (B, K) float64.

    Raises:
        ValueError: If an argument is not as described.
        ModuleNotFoundError: If OpenCV is missing.

    Example:
        >>> interval_optical_flow(torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), (1, 2)).tolist()
        [[0.0, 0.0]]
    """
    check_videos(videos)
    check_int_sequence(intervals=intervals)
    if not intervals:
        raise ValueError("intervals must be one or more whole numbers, got []")
    places = [frame_pairs(videos.shape[2], interval, pairs) for interval in intervals]
    rows = []
    for frames in _grey(videos):
        rows.append([np.mean([flow_magnitude(frames[s], frames[t]) for s, t in found]) for found in places])
    return torch.tensor(np.array(rows), dtype=torch.float64)


def mean_flow(videos: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
    """Returns the mean flow between adjacent frames, for each video: how much moves in it.

    Args:
        videos: uint8, (B, 3, T, H, W), 0 to 255, with T of 2 or more.
        size: Height and width in pixels to measure at; other videos are resized (bilinear when they grow, by area when
            they shrink). None measures at the videos' own.

    Returns:
        Pixels per frame, (B,) float64.

    Raises:
        ValueError: If an argument is not as described.
        ModuleNotFoundError: If OpenCV is missing.

    Example:
        >>> mean_flow(torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)).tolist()
        [0.0, 0.0]
    """
    check_videos(videos)
    if size is not None:
        check_size(size=size)
    places = frame_pairs(videos.shape[2], 1, "all")
    means = []
    for frames in _grey(videos):
        resized = frames if size is None else _resized(frames, size)
        means.append(np.mean([flow_magnitude(resized[s], resized[t]) for s, t in places]))
    return torch.tensor(np.array(means), dtype=torch.float64)


class IntervalOpticalFlow(IntervalMetric):
    r"""Optical flow between frames of one video against their distance, of generated videos and of real ones.

    The mean of ``interval_optical_flow`` over the videos of each kind. A frozen video has none: what counts is the gap
    to the real data.

    - ``update(videos, real)``: uint8 (B, 3, T, H, W).
    - ``compute()``: ``real``, ``generated`` and ``gap``, (K,) float64 in pixels.

    Args:
        intervals: K distances in frames, rising.
        pairs: Which pairs stand for a distance, as in ``frame_pairs``.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range.
        ModuleNotFoundError: If OpenCV is missing.

    Example:
        >>> metric = IntervalOpticalFlow((1, 2))
        >>> for real in (True, False):
        ...     metric.update(torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), real=real)
        >>> metric.compute()["gap"].tolist()
        [0.0, 0.0]
    """

    y_label = "mean optical flow, source to target (pixels)"

    def __init__(self, intervals: Sequence[int] = INTERVALS, *, pairs: Pairs = "all", **kwargs: Any) -> None:
        super().__init__(intervals, pairs=pairs, **kwargs)
        _cv2()

    @override
    def measure(self, videos: Tensor) -> Tensor:
        """Returns ``interval_optical_flow`` of each video, (B, K)."""
        return interval_optical_flow(videos, self.intervals, pairs=self.pairs)


def _grey(videos: Tensor) -> list[_Grey]:
    """Grey frames of each video, (T, H, W)."""
    cv2 = _cv2()
    frames = videos.permute(0, 2, 3, 4, 1).cpu().contiguous().numpy()  # (B, T, H, W, 3)
    return [np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]) for video in frames]


def _resized(frames: _Grey, size: tuple[int, int]) -> _Grey:
    if frames.shape[1:] == tuple(size):
        return frames
    cv2 = _cv2()
    shrinks = frames.shape[1] * frames.shape[2] > size[0] * size[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (size[1], size[0]), interpolation=how) for frame in frames])


def _cv2() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Optical flow needs OpenCV: pip install "reco_lightning[metrics]"') from error
    return cv2
