# SPDX-License-Identifier: Apache-2.0
"""Samples windows in proportion to their running loss.

Beside ``windows`` in the pipeline; the callback feeds it with the losses of its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reco_lightning.support.argument_checks import check_finite
from reco_lightning.windowing.sampler import Window, WindowSampler

__all__ = ["RunningLosses"]

_EVERY = 20  # steps between two looks at the losses: each look waits for the device, and for all ranks
_KEPT = 0.8  # of the running loss, at each look


class RunningLosses:
    """Running cross-entropy of every window, the same on all ranks and after a resume.

    A window's probability is the sampler's own times (its running loss / their mean) to the power of ``exponent``.

    Args:
        exponent: How strongly losses decide, above 0; 1 draws a window of twice the loss twice as often.

    Raises:
        ValueError: If the exponent is out of its range.

    Example:
        >>> sampler = WindowSampler(3, 4, first_window_prob=None)
        >>> losses = RunningLosses(1.0)
        >>> for window, loss in zip(sampler.windows, (3.0, 1.0)):
        ...     losses.add(window, torch.tensor(loss))
        >>> losses.update(sampler, step=20)
        >>> losses.probabilities(sampler)
        [0.75, 0.25]
    """

    def __init__(self, exponent: float) -> None:
        check_finite(loss_aware=exponent)
        if exponent <= 0:
            raise ValueError(f"loss_aware must be a finite number of 0 or more, got {exponent!r}; 0 turns it off")
        self.exponent = exponent
        self._running: dict[Window, float] = {}
        self._sums: dict[Window, torch.Tensor] = {}
        self._counts: dict[Window, int] = {}

    def add(self, window: Window, loss: torch.Tensor) -> None:
        """Takes the loss of a step; nothing waits for the device.

        Args:
            window: The window.
            loss: Its mean cross-entropy, a scalar without graph.
        """
        self._sums[window] = self._sums[window] + loss if window in self._sums else loss
        self._counts[window] = self._counts.get(window, 0) + 1

    def update(
        self, sampler: WindowSampler, *, step: int, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    ) -> None:
        """Takes the collected losses into the running ones, where the step is one to do so.

        Args:
            sampler: The sampler, with all its stages.
            step: Index of the training batch.
            reduce: Sums a tensor over the ranks.
        """
        if step % _EVERY or not self._sums:
            return
        windows = sampler.all_windows
        device = next(iter(self._sums.values())).device
        rows = [[float(self._counts.get(window, 0)) for window in windows]]
        counts = torch.tensor(rows, dtype=torch.float64, device=device)
        sums = torch.zeros_like(counts)
        for place, window in enumerate(windows):
            if window in self._sums:
                sums[0, place] = self._sums[window]
        total, count = reduce(torch.cat([sums, counts])).tolist()
        for window, value, number in zip(windows, total, count, strict=True):
            if number:
                loss = value / number
                self._running[window] = _KEPT * self._running.get(window, loss) + (1 - _KEPT) * loss
        self._sums, self._counts = {}, {}

    def probabilities(self, sampler: WindowSampler) -> list[float]:
        """Returns the probabilities of a sampler's windows; windows never met count as mean ones.

        Args:
            sampler: A sampler without a schedule.

        Returns:
            Probabilities in the order of its starts; they add up to 1.
        """
        known = [self._running[window] for window in sampler.windows if window in self._running]
        mean = sum(known) / len(known) if known else 1.0
        shares = [
            own * (self._running.get(window, mean) / mean) ** self.exponent if mean > 0 else own
            for window, own in zip(sampler.windows, sampler.probabilities, strict=True)
        ]
        return [share / sum(shares) for share in shares]

    def state_dict(self) -> dict[str, Any]:
        """Returns the running losses and those collected since the last update, as plain values."""
        return {
            "running": {(w.start, w.stop): loss for w, loss in self._running.items()},
            "collected": {(w.start, w.stop): (float(self._sums[w]), self._counts[w]) for w in self._sums},
        }

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device) -> None:
        """Takes them back.

        Args:
            state: What ``state_dict`` gave.
            device: Where the losses of the coming steps lie.
        """
        self._running = {Window(*place): loss for place, loss in state["running"].items()}
        collected = {Window(*place): pair for place, pair in state["collected"].items()}
        self._sums = {window: torch.tensor(pair[0], device=device) for window, pair in collected.items()}
        self._counts = {window: pair[1] for window, pair in collected.items()}
