# SPDX-License-Identifier: Apache-2.0
"""The base of metrics on running sums of features: update, file and label.

The extractor is no submodule: its weights enter no checkpoint, no optimizer and no count of parameters.
"""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from reco_lightning.metrics.features import FeatureExtractor, weights_id
from reco_lightning.metrics.moments import Moments, load_moments, save_moments
from reco_lightning.metrics.protocols import check_clips
from reco_lightning.support.argument_checks import check_int

__all__ = ["MomentMetric"]

_SUMS = ("count", "total", "outer", "fourth")


class MomentMetric(Metric):
    """A distance between two sets of clips that needs no more than the sums in `Moments`.

    The states are float64 whatever the precision of the module that holds the metric, and add up over processes.

    Args:
        extractor: Clips (B, 3, T, H, W) uint8 to features (B, D). A module is put into evaluation mode, and follows the
            clips to their device.
        frames: T of every clip; None allows any, but the same for all.
        width: D; None reads the extractor's attribute `width`.
        settings: What else has to agree between two numbers that are compared: goes into `record` and into the file of
            the real clips' statistics.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If the extractor is not callable, or D is not known.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    extractor: FeatureExtractor

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        frames: int | None,
        width: int | None,
        settings: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not callable(extractor):
            raise ValueError(f"extractor must be a function from clips to features, got {type(extractor).__name__}")
        check_int(at_least=1, or_none=True, frames=frames)
        check_int(or_none=True, width=width)
        width = getattr(extractor, "width", None) if width is None else width
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(
                f"width must be the number of features of a clip, 1 or more, got {width!r}: give it, as the extractor "
                f"{type(extractor).__name__} has no attribute `width`"
            )
        if isinstance(extractor, nn.Module):
            extractor.eval()
        object.__setattr__(self, "extractor", extractor)  # past nn.Module, which would make it a submodule
        self.frames, self.width = frames, width
        self.settings = dict(settings)
        self.weights = weights_id(extractor)
        self.size: tuple[int, ...] | None = None  # (T, H, W) of the clips
        self._stored: Moments | None = None
        self._stored_size: tuple[int, ...] | None = None
        for kind in ("real", "generated"):
            for name, value in zip(_SUMS, vars(Moments.zero(width)).values(), strict=True):
                self.add_state(f"{kind}_{name}", default=value, dist_reduce_fx="sum")

    def update(self, clips: Tensor, *, real: bool) -> None:
        """Adds clips to one of the two sets.

        Args:
            clips: uint8, (B, 3, T, H, W); all clips of both sets have one size.
            real: Whether they are of the data; otherwise they were generated.

        Raises:
            ValueError: If the clips do not fit, the extractor returns something else than (B, D), or the statistics of
                real clips were loaded already.
        """
        if real and self._stored is not None:
            raise ValueError("real must be False after load_real, got True: the real clips would count twice")
        check_clips(clips, self.frames)
        size = tuple(clips.shape[2:])
        if self.size not in (None, size):
            raise ValueError(
                f"clips must all have T, H, W of {self.size}, as the first ones, got {size}: resize them all in one way"
            )
        sums = Moments.of(self._features(clips))
        self.size = size
        kind = "real" if real else "generated"
        for name in _SUMS:
            setattr(self, f"{kind}_{name}", getattr(self, f"{kind}_{name}") + getattr(sums, name))

    @abstractmethod
    def distance(self, real: Moments, generated: Moments) -> Tensor:
        """Returns the distance, from the sums of both sets."""

    def compute(self) -> Tensor:
        """Returns the distance, a scalar of float64.

        Raises:
            ValueError: If there are too few clips of a kind.
        """
        real, generated = self.moments(real=True), self.moments(real=False)
        for name, sums in (("real", real), ("generated", generated)):
            if sums.clips < 2:
                raise ValueError(
                    f"a distance needs 2 clips of each kind or more, got {sums.clips} {name}; call update(clips, "
                    f"real={name == 'real'})"
                )
        return self.distance(real, generated)

    def moments(self, *, real: bool) -> Moments:
        """Returns the sums of one set; over all processes inside `compute`, of this process elsewhere."""
        kind = "real" if real else "generated"
        sums = Moments(*(getattr(self, f"{kind}_{name}") for name in _SUMS))
        return sums if self._stored is None or not real else sums + self._stored

    def save_real(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics of the real clips, of all processes; to be called on all of them.

        Args:
            path: The file, `.npz`, written by the first process.

        Raises:
            ValueError: If there is no real clip.
        """
        with self.sync_context(should_sync=self.sync_on_compute):
            sums = self.moments(real=True)
        if sums.clips == 0:
            raise ValueError("save_real needs real clips, got none; call update(clips, real=True)")
        rank_zero_only(save_moments)(path, sums, self._about(self.size))

    def load_real(self, path: str | os.PathLike[str]) -> None:
        """Takes the statistics of the real clips from a file; to be called on all processes. `reset` keeps them.

        Args:
            path: What `save_real` wrote, under the same protocol, with clips of the same size and the same weights.

        Raises:
            ValueError: If there are real clips already, or the file does not fit; the message names what differs.
        """
        if self.moments(real=True).clips:
            raise ValueError("load_real must come before real clips, got some; call reset, or make a new metric")
        self._stored, about = load_moments(path, self._about(self.size))
        self.size = self._stored_size = tuple(about["size"]) if about.get("size") else self.size

    def record(self) -> dict[str, Any]:
        """Returns the distance, and everything without which it means nothing; JSON values."""
        value = float(self.compute())
        with self.sync_context(should_sync=self.sync_on_compute):
            counts = {kind: self.moments(real=kind == "real").clips for kind in ("real", "generated")}
        return {"metric": type(self).__name__, "value": value, "clips": counts, **self._about(self.size)}

    def describe(self) -> str:
        """Returns the distance in one line, with protocol, numbers of clips, frames and weights."""
        record = self.record()
        return f"{record['metric']} {record['value']:.4f} | {self._label(record['clips'])}"

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentMetric:
        memo[id(self.extractor)] = self.extractor  # copies share the weights
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __str__(self) -> str:
        counts = {kind: self.moments(real=kind == "real").clips for kind in ("real", "generated")}
        return f"{type(self).__name__} | {self._label(counts)}"

    def reset(self) -> None:
        """Forgets all clips; statistics from a file stay."""
        super().reset()
        self.size = self._stored_size

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draws one value or several; needs matplotlib (extra `metrics`).

        Args:
            val: What `compute` returned, or a list of such values; None computes one.
            ax: Axes to draw into; None makes a figure.

        Returns:
            The figure and its axes.
        """
        fig, ax = self._plot(val, ax)
        ax.set_ylabel(f"{type(self).__name__} (lower is better)")
        return fig, ax

    def _about(self, size: tuple[int, ...] | None) -> dict[str, Any]:
        about = {**self.settings, "frames": self.frames, "width": self.width, "weights": self.weights}
        about["extractor"] = type(self.extractor).__name__
        return about if size is None else {**about, "size": list(size)}

    def _label(self, counts: Mapping[str, int]) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        frames, pixels = (self.size[0], f"{self.size[1]} x {self.size[2]}") if self.size else (self.frames, "no")
        return (
            f"{settings} | N {counts['real']} real, {counts['generated']} generated | {frames} frames, {pixels} pixels"
            f" | {type(self.extractor).__name__}, {self.width} features, weights {self.weights}"
        )

    def _features(self, clips: Tensor) -> Tensor:
        extractor: Any = self.extractor
        if hasattr(extractor, "to"):
            extractor.to(clips.device)
        # a trainer's mixed precision would change the features
        with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):
            features = extractor(clips)
        if not isinstance(features, Tensor) or features.shape != (len(clips), self.width):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"extractor must return features of shape {(len(clips), self.width)}, got {found}")
        return features

    def _warn_few(self, real: Moments, generated: Moments) -> None:
        few = min(real.clips, generated.clips)
        if few < self.width:
            rank_zero_warn(
                f"{type(self).__name__} of {few} clips with {self.width} features: below the feature width the "
                "covariance is singular and the number mostly bias, which falls with 1 / N; "
                f"take {self.width} clips or more"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def keep_double(tensor: Tensor) -> Tensor:
            moved = fn(tensor)  # a module's conversion to bfloat16 would round the sums
            return tensor.to(moved.device) if tensor.dtype == torch.float64 else moved

        return super()._apply(keep_double, exclude_state)
