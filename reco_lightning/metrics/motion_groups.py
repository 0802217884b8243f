# SPDX-License-Identifier: Apache-2.0
"""Groups a distance such as FVD by the motion of the videos (arXiv 2604.07402, Table 6).

Groups come from the mean optical flow at one resolution and stride; `motion_manifest` keeps them for the next run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.metrics.interval import check_videos
from reco_lightning.metrics.motion_manifest import BOUNDS, GROUPS, motion_group
from reco_lightning.metrics.optical_flow import mean_flow
from reco_lightning.support.argument_checks import check_int, check_size
from reco_lightning.support.plots import group_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MotionGroups"]


class MotionGroups(Metric):
    """A metric of real against generated videos, such as FVD, for each group of motion.

    Which group a generated video belongs to is for the user to say, and belongs beside the number: by default that of
    its own flow; with ``groups`` that of the real clip which it continues or shares the prompt with.

    - ``update(videos, real, groups)``: uint8 (B, 3, T, H, W).
    - ``compute()``: the metric of ``low``, ``medium`` and ``high`` motion, and the numbers of videos of each group,
      ``real_count`` and ``generated_count``, (3,) int64.

    Args:
        metric: Any torchmetrics metric with ``update(videos, real=...)``; a copy of it serves each group.
        size: Height and width in pixels that flow is measured at.
        min_count: Videos of each kind below which a group's value is NaN, 1 or more.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> from reco_lightning.metrics.interval import IntervalPSNR
        >>> groups = MotionGroups(IntervalPSNR((1,)), size=(32, 32))
        >>> for real in (True, False):
        ...     groups.update(torch.zeros(2, 3, 5, 32, 32, dtype=torch.uint8), real=real)
        >>> groups.compute()["real_count"].tolist()
        [2, 0, 0]
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    counts: Tensor

    def __init__(
        self, metric: Metric, *, size: tuple[int, int] = (256, 256), min_count: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, Metric):
            raise ValueError(f"metric must be a torchmetrics.Metric, got {type(metric).__name__}")
        check_size(size=size)
        check_int(at_least=1, min_count=min_count)
        self.size = (size[0], size[1])
        self.min_count = min_count
        self.metrics = nn.ModuleList([metric.clone() for _ in GROUPS])
        self.add_state("counts", torch.zeros(2, len(GROUPS), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, videos: Tensor, real: bool, groups: Tensor | None = None) -> None:
        """Adds videos to the metrics of their groups.

        Args:
            videos: uint8, (B, 3, T, H, W), 0 to 255.
            real: Whether they are real ones.
            groups: Number of each video's group, (B,) int64, as ``MotionManifest.groups`` gives it; None measures it.

        Raises:
            ValueError: If an argument is not as described.
        """
        check_videos(videos)
        if groups is None:
            groups = motion_group(mean_flow(videos, size=self.size))
        if groups.shape != videos.shape[:1] or not bool(((groups >= 0) & (groups < len(GROUPS))).all()):
            raise ValueError(
                f"groups must be ({len(videos)},) numbers from 0 to {len(GROUPS) - 1}, one a video, got "
                f"{groups.tolist()} of shape {tuple(groups.shape)}"
            )
        for number, metric in enumerate(self.metrics):
            members = groups == number
            if bool(members.any()):
                assert isinstance(metric, Metric)
                metric.update(videos[members.to(videos.device)], real=real)
        self.counts = self.counts.clone()
        self.counts[0 if real else 1] += torch.bincount(groups, minlength=len(GROUPS)).to(self.counts)

    @override
    def compute(self) -> dict[str, Any]:
        """Returns the metric of each group, and how many videos it rests on.

        Returns:
            By group what the metric computes, NaN for groups with too few videos; ``real_count`` and
            ``generated_count``, (3,) int64.
        """
        enough = (self.counts >= self.min_count).all(0).tolist()
        values: dict[str, Any] = {}
        for name, metric, counted in zip(GROUPS, self.metrics, enough, strict=True):
            assert isinstance(metric, Metric)
            with warnings.catch_warnings():
                # on a process that met no video of this group, though others did
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric .* was called before")
                values[name] = metric.compute() if counted else torch.tensor(float("nan"))
        return values | {"real_count": self.counts[0], "generated_count": self.counts[1]}

    @override
    def reset(self) -> None:
        """Forgets all videos."""
        super().reset()
        for metric in self.metrics:
            assert isinstance(metric, Metric)
            metric.reset()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not for single batches.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("MotionGroups measures sets of videos, not batches; call update() and compute()")

    def record(self) -> dict[str, Any]:
        """Returns the metric of each group, and what it rests on; JSON values, None for groups with too few videos."""
        found = self.compute()
        counts = {kind: found[f"{kind}_count"].tolist() for kind in ("real", "generated")}
        values = {name: float(found[name]) for name in GROUPS}
        return {
            "metric": type(self).__name__,
            "of": type(self.metrics[0]).__name__,
            "value": {name: None if math.isnan(value) else value for name, value in values.items()},
            "clips": {kind: dict(zip(GROUPS, numbers, strict=True)) for kind, numbers in counts.items()},
            "bounds": list(BOUNDS),
            "size": list(self.size),
        }

    @override
    def plot(
        self, val: Mapping[str, Any] | None = None, ax: Axes | None = None, *, y_label: str = "distance to real data"
    ) -> tuple[Figure, Axes]:
        """Draws a bar for each group, with the numbers of videos under it.

        Args:
            val: What ``compute`` returned; None computes. The metric's values are single numbers.
            ax: Axes to draw into; None makes a figure.
            y_label: Name and unit of the metric.

        Returns:
            The figure and its axes.
        """
        val = self.compute() if val is None else val
        low, high = (f"{bound:g}" for bound in BOUNDS)
        ranges = (f"low (< {low})", f"medium ({low} to {high})", f"high (> {high})")
        counts = zip(ranges, val["real_count"].tolist(), val["generated_count"].tolist(), strict=True)
        names = [f"{name}\n{real} real, {generated} generated" for name, real, generated in counts]
        height, width = self.size
        return group_bars(
            {"generated against real": [float(val[name]) for name in GROUPS]},
            names,
            x_label=f"mean optical flow (pixels per frame at {height} x {width})",
            y_label=y_label,
            ax=ax,
        )
