# SPDX-License-Identifier: Apache-2.0
"""One windowed training step: the network runs on windows, with their cross-entropy plus continuity (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.continuity import ContinuityNorm, continuity_loss
from reco_lightning.cross_entropy import window_cross_entropy
from reco_lightning.engines.base import Engine, WindowOutput
from reco_lightning.engines.interception import FunctionTap
from reco_lightning.engines.rehearsal import Trace
from reco_lightning.windows import Window

__all__ = ["Injection", "StepReport", "mean_continuity"]

_OPTIONS = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


@dataclass(frozen=True)
class StepReport:
    """What a windowed step measured, without graph.

    Args:
        cross_entropy: Mean over the windows' tokens, nats.
        continuity: The continuity term before its weight.
        window_start: Mean start of the step's windows, tokens.
    """

    cross_entropy: torch.Tensor
    continuity: torch.Tensor
    window_start: float


def mean_continuity(output: WindowOutput, norm: ContinuityNorm) -> torch.Tensor:
    """Continuity of a windowed run: the mean over the groups' states, by the number of samples."""
    if len(output.hidden) == 1:
        return continuity_loss(output.hidden[0], norm=norm)
    parts = [continuity_loss(states, norm=norm) * (len(states) / output.batch) for states in output.hidden]
    return torch.stack(parts).sum()


def _depends(logits: torch.Tensor, output: WindowOutput) -> bool:
    if not logits.requires_grad:
        return False
    states = [part for part in output.hidden if part.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), states, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


class Injection:
    """Runs somebody else's training step on windows.

    Args:
        engine: The engine, installed by the caller.
        trace: What the rehearsal found out about the step.
        weight: The weight of the continuity term.
        norm: The norm of the continuity term.
    """

    def __init__(self, engine: Engine, trace: Trace, *, weight: float, norm: ContinuityNorm) -> None:
        self.engine = engine
        self.call = trace.call
        self.loss_tail = trace.loss_tail
        self.weight = weight
        self.norm = norm
        self._calls = 0
        self._first = True
        self._report: StepReport | None = None

    def run(self, windows: Sequence[Window], step: Callable[[], Any]) -> tuple[Any, StepReport | None]:
        """Runs the step on windows. The engine stays armed for the backward pass; ``engine.disarm()`` ends it.

        Args:
            windows: One window per group of the batch.
            step: Runs the training step.

        Returns:
            What the step returned, and the report; ``None`` where the step ended without running the network.

        Raises:
            RuntimeError: If the network ran and its cross-entropy was not met, or the reverse.
        """
        self._calls, self._report = 0, None
        self.engine.arm(windows)
        with FunctionTap({F.cross_entropy: self.cross_entropy}):
            result = step()
        self._first = False
        if self.engine.output is not None and self._report is None:
            raise RuntimeError(
                f"this training step ran the network and called F.cross_entropy {self._calls} times, where the "
                f"network's own call was number {self.call + 1} on the first batch; the step must always compute its "
                "losses in one order"
            )
        return result, self._report

    def cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for ``F.cross_entropy`` during a step: the network's own call gives the windows'."""
        call = self._calls
        self._calls += 1
        output = self.engine.output
        if call != self.call:
            if self._first and call > self.call and output is not None and _depends(logits, output):
                raise RuntimeError(
                    "training_step calls F.cross_entropy a second time on the windowed logits; windows serve one "
                    "loss: join the two, or compute the second without gradient from a forward of its own"
                )
            return F.cross_entropy(logits, target, *args, **kwargs)
        if output is None:
            raise RuntimeError("the network's cross-entropy was met before the network's head had run")
        options = dict(zip(_OPTIONS, args, strict=False)) | kwargs
        if len(output.groups) == 1 and len(output.groups[0].window) == self.engine.tokens:
            loss = F.cross_entropy(logits, target, **options)  # the plain call itself, bit for bit
        else:
            offset = output.rows - self.loss_tail - target.numel() // output.batch
            loss = window_cross_entropy(logits, target, output.groups, batch=output.batch, offset=offset, **options)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
            continuity = mean_continuity(output, self.norm)
        # A loss that the caller divides by the number of its targets gets the continuity of as many.
        scale: torch.Tensor | float = 1.0
        mean = loss.detach()
        if options.get("reduction", "mean") != "mean":
            counted = (target != options.get("ignore_index", -100)).sum().clamp_min(1)
            mean = mean.sum() / counted
            scale = counted if options["reduction"] == "sum" else 1.0
        start = sum(g.window.start * (g.samples.stop - g.samples.start) for g in output.groups) / output.batch
        self._report = StepReport(mean, continuity.detach(), start)
        return loss + self.weight * scale * continuity if self.weight else loss
