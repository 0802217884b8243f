# SPDX-License-Identifier: Apache-2.0
"""PSNR between frames of one video against their distance (arXiv 2604.07402, Figures 5, 7 and 11, left).

Measures decoded videos, generated ones and real ones side by side; `optical_flow` has the twin of the same figures.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.support.argument_checks import (
    check_choice,
    check_int,
    check_int_sequence,
    check_tensor,
)
from reco_lightning.support.plots import interval_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INTERVALS", "IntervalMetric", "IntervalPSNR", "Pairs", "check_videos", "frame_pairs", "interval_psnr"]

Pairs = Literal["all", "from_first"]

#: Distances in frames for clips of 17 frames.
INTERVALS = (1, 2, 4, 8, 16)

_CAP = 100.0  # dB; equal frames would have infinitely many


def check_videos(videos: Tensor) -> None:
    """Raises unless the videos are a batch of RGB videos.

    Args:
        videos: uint8, (B, 3, T, H, W), 0 to 255.

    Raises:
        ValueError: If dtype or shape differ.

    Example:
        >>> check_videos(torch.zeros(2, 3, 17, 8, 8, dtype=torch.uint8))
    """
    check_tensor(videos=videos)
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[1] != 3 or 0 in videos.shape:
        raise ValueError(
            f"videos must be uint8 of shape (B, 3, T, H, W), got {videos.dtype} of shape {tuple(videos.shape)}; "
            "tokenizers.base.to_uint8 converts a decoder's output, and permute(0, 4, 1, 2, 3) what it returns"
        )


def frame_pairs(frames: int, interval: int, pairs: Pairs) -> list[tuple[int, int]]:
    """Returns the source and target frames at a distance, in one of the two readings of "varying source-target frames".

    Args:
        frames: T, frames of the clip.
        interval: Distance in frames, 1 to T - 1.
        pairs: ``"all"`` takes every source that has a target; ``"from_first"`` the first frame alone.

    Returns:
        Pairs (source, target).

    Raises:
        ValueError: If ``interval`` or ``pairs`` is none of these.

    Example:
        >>> frame_pairs(4, 2, "all"), frame_pairs(4, 2, "from_first")
        ([(0, 2), (1, 3)], [(0, 2)])
    """
    check_choice(get_args(Pairs), pairs=pairs)
    check_int(intervals=interval)
    if not 1 <= interval < frames:
        raise ValueError(
            f"intervals must lie from 1 to {frames - 1} for clips of {frames} frames, got {interval}; give shorter "
            "intervals=, or longer clips"
        )
    sources = range(frames - interval) if pairs == "all" else range(1)
    return [(source, source + interval) for source in sources]


def interval_psnr(videos: Tensor, intervals: Sequence[int] = INTERVALS, *, pairs: Pairs = "all") -> Tensor:
    r"""Returns the PSNR between frames at a distance, for each video.

    .. math::
        \mathrm{PSNR}(\Delta) = \frac{1}{|P_\Delta|} \sum_{(s, t) \in P_\Delta} 10 \log_{10}
        \frac{255^2}{\mathrm{MSE}(x_s, x_t)}

    with :math:`P_\Delta` from ``frame_pairs`` and the squared error averaged over channels and pixels. Decibels are
    averaged, not errors; equal frames count as 100 dB.

    Args:
        videos: uint8, (B, 3, T, H, W), 0 to 255.
        intervals: K distances in frames, each from 1 to T - 1.
        pairs: Which pairs stand for a distance, as in ``frame_pairs``.

    Returns:
        Decibels up to 100, (B, K) float64.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> videos = torch.zeros(1, 3, 3, 4, 4, dtype=torch.uint8)
        >>> videos[:, :, 2] = 255
        >>> interval_psnr(videos, (1, 2)).tolist()
        [[50.0, 0.0]]
    """
    check_videos(videos)
    check_int_sequence(intervals=intervals)
    if not intervals:
        raise ValueError("intervals must be one or more whole numbers, got []")
    frames = videos.shape[2]
    columns = []
    for interval in intervals:
        found = frame_pairs(frames, interval, pairs)
        columns.append(torch.stack([_psnr(videos[:, :, s], videos[:, :, t]) for s, t in found]).mean(0))
    return torch.stack(columns, dim=1)  # (B, K)


class IntervalMetric(Metric):
    """The base of interval metrics: sums over videos by distance, of real and of generated ones.

    A subclass says by ``measure`` what a video's value at each distance is.

    Args:
        intervals: K distances in frames, rising.
        pairs: Which pairs stand for a distance, as in ``frame_pairs``.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    y_label: str

    totals: Tensor
    counts: Tensor
    shape: Tensor

    def __init__(self, intervals: Sequence[int] = INTERVALS, *, pairs: Pairs = "all", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_int_sequence(intervals=intervals)
        self.intervals = tuple(intervals)
        if not self.intervals or list(self.intervals) != sorted(set(self.intervals)):
            raise ValueError(f"intervals must be whole numbers of 1 or more, rising, got {list(intervals)}")
        frame_pairs(self.intervals[-1] + 1, self.intervals[0], pairs)
        self.pairs: Pairs = pairs
        self.add_state("totals", torch.zeros(2, len(self.intervals), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("shape", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="max")

    @abstractmethod
    def measure(self, videos: Tensor) -> Tensor:
        """Returns the values of each video at each distance, (B, K) float64."""

    @override
    def update(self, videos: Tensor, real: bool) -> None:
        """Adds videos.

        Args:
            videos: uint8, (B, 3, T, H, W), 0 to 255; T, H and W are the same in all calls.
            real: Whether they are real ones.

        Raises:
            ValueError: If they are not as described.
        """
        check_videos(videos)
        own = tuple(videos.shape[2:])
        seen = tuple(self.shape.tolist())
        if any(seen) and own != seen:
            raise ValueError(
                f"videos must all have the same (T, H, W), here {seen}, got {own}: the measure changes with the number "
                "of pixels, and curves of different sizes cannot be compared"
            )
        values = self.measure(videos).to(self.totals)  # (B, K)
        place = 0 if real else 1
        self.totals, self.counts = self.totals.clone(), self.counts.clone()
        self.totals[place] += values.sum(0)
        self.counts[place] += len(videos)
        self.shape = self.shape.new_tensor(own)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Means over the videos.

        Returns:
            ``real`` and ``generated``, (K,) float64 each, and ``gap``, generated minus real; () for one distance.

        Raises:
            ValueError: If there was no real or no generated video.
        """
        if not bool((self.counts > 0).all()):
            real, generated = self.counts.tolist()
            raise ValueError(
                f"{type(self).__name__} needs videos of both kinds, got {real} real and {generated} generated; call "
                "update(videos, real=True) as well as update(videos, real=False)"
            )
        real, generated = self.totals / self.counts[:, None]
        return {"real": real, "generated": generated, "gap": generated - real}

    def record(self) -> dict[str, Any]:
        """Returns the curves, and everything without which they mean nothing; JSON values."""
        value = {name: line.reshape(-1).tolist() for name, line in self.compute().items()}
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            (real, generated), (frames, *size) = self.counts.tolist(), self.shape.tolist()
        return {
            "metric": type(self).__name__,
            "value": value,
            "clips": {"real": real, "generated": generated},
            "intervals": list(self.intervals),
            "pairs": self.pairs,
            "frames": frames,
            "size": size,
        }

    @override
    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draws both curves against the distance.

        Args:
            val: What ``compute`` returned; None computes.
            ax: Axes to draw into; None makes a figure.

        Returns:
            The figure and its axes.
        """
        val = self.compute() if val is None else val
        lines = (val[name].reshape(-1).tolist() for name in ("real", "generated"))
        curves = dict(zip(("real data", "generated"), lines, strict=True))
        return interval_curves(self.intervals, curves, y_label=self.y_label, ax=ax)


class IntervalPSNR(IntervalMetric):
    r"""PSNR between frames of one video against their distance, of generated videos and of real ones.

    The mean of ``interval_psnr`` over the videos of each kind. The higher curve is not the better one: a frozen video
    has the highest. Good is a small gap to the real data.

    - ``update(videos, real)``: uint8 (B, 3, T, H, W).
    - ``compute()``: ``real``, ``generated`` and ``gap``, (K,) float64 in dB.

    Args:
        intervals: K distances in frames, rising.
        pairs: Which pairs stand for a distance, as in ``frame_pairs``.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> metric = IntervalPSNR((1, 2))
        >>> videos = torch.zeros(1, 3, 3, 4, 4, dtype=torch.uint8)
        >>> metric.update(videos, real=False)
        >>> videos[:, :, 2] = 255
        >>> metric.update(videos, real=True)
        >>> metric.compute()["gap"].tolist()
        [50.0, 100.0]
    """

    y_label = "PSNR between source and target (dB)"

    @override
    def measure(self, videos: Tensor) -> Tensor:
        """Returns ``interval_psnr`` of each video, (B, K)."""
        return interval_psnr(videos, self.intervals, pairs=self.pairs)


def _psnr(source: Tensor, target: Tensor) -> Tensor:
    difference = source.int() - target.int()  # whole numbers: the sum is exact
    mean = difference.square().sum((1, 2, 3), dtype=torch.int64).double() / difference[0].numel()
    return (10 * torch.log10(255**2 / mean)).clamp_max(_CAP)  # (B,); nought gives infinity, which is capped
