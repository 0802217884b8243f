# SPDX-License-Identifier: Apache-2.0
"""One windowed training step: the network runs on windows, with their cross-entropy plus continuity (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.windowing.engines.base import Engine
from reco_lightning.windowing.engines.interception import FunctionInterceptor
from reco_lightning.windowing.injection.autograd_graph import depends
from reco_lightning.windowing.injection.derived_values import DerivedValues
from reco_lightning.windowing.injection.step_trace import Trace
from reco_lightning.windowing.losses.continuity import Continuity, ContinuityNorm, continuity_loss, gradient_norm
from reco_lightning.windowing.losses.cross_entropy import (
    WindowCrossEntropy,
    plain_cross_entropy,
    select_rows,
    window_cross_entropy,
)
from reco_lightning.windowing.rows import RowLayout, WindowOutput
from reco_lightning.windowing.sampler import Window

__all__ = ["Injection", "StepReport", "WindowLoss", "mean_continuity"]

_COPIES = tuple(
    getattr(torch.Tensor, name)
    for name in ("bfloat16", "clone", "contiguous", "double", "float", "half", "to", "type", "type_as")
)
_OPTIONS = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


@dataclass(frozen=True)
class StepReport:
    """Measurements of a windowed step, without graph.

    Args:
        cross_entropy: Mean over the windows' tokens, nats.
        continuity: The continuity term before its weight.
        window_start: Mean start of the step's windows, tokens.
        losses: For each group its window and cross-entropy; empty where nobody asked for them.
    """

    cross_entropy: torch.Tensor
    continuity: torch.Tensor
    window_start: float
    losses: tuple[tuple[Window, torch.Tensor], ...] = ()


def mean_continuity(output: WindowOutput, norm: ContinuityNorm, lag: int = 1) -> torch.Tensor:
    """Computes the continuity of a windowed run: the mean over the groups' states, by the number of samples."""
    if len(output.hidden) == 1:
        return continuity_loss(output.hidden[0], norm=norm, lag=lag)
    parts = [continuity_loss(states, norm=norm, lag=lag) * (len(states) / output.batch) for states in output.hidden]
    return torch.stack(parts).sum()


def _depends(logits: torch.Tensor, output: WindowOutput) -> bool:
    return logits.requires_grad and output.states.requires_grad and depends(logits, output.states)


def _is_placeholder(logits: torch.Tensor, output: WindowOutput) -> bool:
    """Whether logits are the engine's placeholder or a view of it: one number, expanded; no copy looks like that."""
    return output.is_placeholder and not any(logits.stride())


class WindowLoss:
    """Computes the loss of a windowed forward: cross-entropy of the windows' rows plus weighted continuity (Eq. 11).

    Args:
        continuity: The continuity term.
        layout: Where the video's tokens lie in the network's sequence.
        rows_after_loss: Rows of the network after the one that feeds the last loss row.
        by_group: Whether the report holds each group's cross-entropy too.
    """

    def __init__(
        self, continuity: Continuity, *, layout: RowLayout, rows_after_loss: int, by_group: bool = False
    ) -> None:
        self.continuity = continuity
        self.layout = layout
        self.rows_after_loss = rows_after_loss
        self.by_group = by_group
        self._sizes: tuple[int, int] | None = None

    def __call__(
        self,
        output: WindowOutput,
        logits: torch.Tensor,
        target: torch.Tensor,
        *,
        progress: float = 0.0,
        **options: Any,
    ) -> tuple[torch.Tensor, StepReport]:
        """Returns the loss in the form that the options' reduction asks for, and what was measured.

        Args:
            output: What the windowed forward left behind.
            logits: What the loss was given: logits of all rows, or the engine's placeholder; see ``loss_rows``.
            target: Likewise.
            progress: Fraction of the training that is done, 0 to 1.
            **options: Further arguments of ``F.cross_entropy``.
        """
        offset = self._offset(output, target, options.get("ignore_index", -100))
        entropy = self._cross_entropy(output, logits, target, offset=offset, options=options)
        weight = self.continuity.at(progress)
        with torch.set_grad_enabled(torch.is_grad_enabled() if weight else False):
            continuity = mean_continuity(output, self.continuity.norm, self.continuity.lag)
        losses: tuple[tuple[Window, torch.Tensor], ...] = ()
        if self.by_group:
            windows = [group.window for group in output.groups]
            losses = tuple(zip(windows, entropy.group_means(), strict=True))
        start = sum(g.window.start * (g.samples.stop - g.samples.start) for g in output.groups) / output.batch
        report = StepReport(entropy.mean.detach(), continuity.detach(), start, losses)
        if not weight:
            return entropy.value, report
        factor = self._factor(weight, entropy.mean, continuity, output)
        return entropy.value + entropy.divisor * factor * continuity, report

    def select(
        self, output: WindowOutput, logits: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the windows' own logits (R, V) and targets (R,), as ``select_rows`` does."""
        offset = self._offset(output, target)
        own = output.logits
        if output.head_input is not None:
            own = replace(output.head_input, states=output.hidden).logits()
        return select_rows(logits, target, output.groups, batch=output.batch, offset=offset, own=own)

    def _offset(self, output: WindowOutput, target: torch.Tensor, ignore_index: int = -100) -> int:
        """The network's row that feeds the first loss row; refuses a batch whose rows are not those of the first."""
        length = target.numel() // output.batch
        if self._sizes is None:
            self._sizes = (output.rows, length)
        rows, first = self._sizes
        if length not in (first, first + output.rows - rows):
            raise RuntimeError(
                f"F.cross_entropy was given {first} of {rows} rows of the network on the first batch, and {length} of "
                f"{output.rows} now; take no rows out before the loss, use ignore_index"
            )
        offset = output.rows - self.rows_after_loss - length
        if length != first and not torch.compiler.is_compiling():
            self._check_further_rows(output, target.view(output.batch, length) != ignore_index, offset, first)
        return offset

    def _check_further_rows(self, output: WindowOutput, counted: torch.Tensor, offset: int, first: int) -> None:
        """Refuses a batch with further loss rows whose targets say that the video's tokens lie elsewhere."""
        token = self.layout.prefix(output.rows) - 1 - offset  # the loss row that predicts the first one
        start, stop = max(token, 0), token + self.layout.tokens
        known = self.layout.prefix_rows is not None
        if counted[:, stop:].any() or (not known and counted[:, :start].any()):
            raise RuntimeError(
                f"F.cross_entropy was given {first} rows of a sample on the first batch and {counted.shape[1]} now, "
                f"with targets that count outside the video's {self.layout.tokens} tokens, which were taken to be the "
                f"rows {start} to {stop - 1}; "
                + (
                    "give every batch clips of one length"
                    if known
                    else "set prefix_tokens= where rows follow the video"
                )
                + ", or ignore_index to what is no token of the video"
            )

    def _cross_entropy(
        self, output: WindowOutput, logits: torch.Tensor, target: torch.Tensor, *, offset: int, options: dict[str, Any]
    ) -> WindowCrossEntropy:
        """The windows' cross-entropy, in the form that the caller's reduction asks for."""
        if output.is_placeholder and not _is_placeholder(logits, output):
            raise RuntimeError(
                "F.cross_entropy was given the head's output itself on the first batch, and a copy now; the step "
                "must always compute its loss in one way"
            )
        groups = output.groups
        places: dict[str, Any] = {"batch": output.batch, "offset": offset}
        whole = len(groups) == 1 and len(groups[0].window) == self.layout.tokens
        head_input = output.head_input
        if head_input is not None:
            # the plain loss may cover rows beside the tokens'
            if whole and head_input.states[0].shape[1] == output.rows:
                rows = slice(offset, offset + target.numel() // output.batch)
                groups = (replace(groups[0], loss_start=rows.start, stop=rows.stop),)
                head_input = replace(head_input, states=(head_input.states[0][:, rows],))
        elif whole and not output.is_placeholder:
            return plain_cross_entropy(logits, target, **options)
        return window_cross_entropy(
            logits, target, groups, **places, own=output.logits, head_input=head_input, **options
        )

    def _factor(
        self, weight: float, loss: torch.Tensor, continuity: torch.Tensor, output: WindowOutput
    ) -> torch.Tensor | float:
        """The term's factor; where it is balanced, the one that gives its gradient the wanted norm."""
        if not self.continuity.balanced or not loss.requires_grad:
            return weight
        wanted = weight * gradient_norm(loss, [output.states])
        return wanted / gradient_norm(continuity, [output.states]).clamp_min(1e-12)


class Injection:
    """Runs somebody else's training step on windows.

    Args:
        engine: The engine, installed by the caller.
        trace: What the trace found out about the step.
        continuity: The continuity term.
        by_group: Whether the report holds each group's cross-entropy too.

    Attributes:
        derived: What the last step has computed of the logits besides its loss.
        steps: How many steps were run.
    """

    def __init__(self, engine: Engine, trace: Trace, continuity: Continuity, *, by_group: bool = False) -> None:
        self.engine = engine
        self.call = trace.call
        self.loss = WindowLoss(
            continuity, layout=engine.layout, rows_after_loss=trace.rows_after_loss, by_group=by_group
        )
        self._copied = trace.copies_head and engine.head.placeholder is not None
        self._placeholders: list[torch.Tensor] = []
        self.derived = DerivedValues()
        self.unlogged = trace.unlogged
        self.returns_loss = trace.returns_loss
        self.steps = 0
        self._progress = 0.0
        self._calls = 0
        self._report: StepReport | None = None

    def run(
        self, windows: Sequence[Window], step: Callable[[], Any], *, attached: int = 0, progress: float = 0.0
    ) -> tuple[Any, StepReport | None]:
        """Runs the step on windows. The engine stays active for the backward pass; ``engine.deactivate()`` ends it.

        Args:
            windows: One window per group of the batch.
            step: Runs the training step.
            attached: Tokens in front of each window that are trained through.
            progress: Share of the training that is done, 0 to 1.

        Returns:
            What the step returned, and the report; ``None`` where the step ended without running the network.

        Raises:
            RuntimeError: If the network ran and its cross-entropy was not met, or the reverse.
        """
        self._calls, self._report, self._progress = 0, None, progress
        self.steps += 1
        self.engine.activate(windows, attached=attached)
        handlers: dict[Callable[..., Any], Callable[..., Any]] = {F.cross_entropy: self.cross_entropy}
        if self._copied:
            assert self.engine.head.placeholder is not None
            self._placeholders = [self.engine.head.placeholder]
            handlers |= {function: partial(self._copy, function) for function in _COPIES}
        self.derived = DerivedValues(hides_numbers=True)
        self.engine.returned = self.derived.follow
        try:
            with FunctionInterceptor(handlers, self.derived.call):
                result = step()
        finally:
            self.engine.returned = None
        if self.engine.output is not None and self._report is None:
            raise RuntimeError(
                f"this training step ran the network and called F.cross_entropy {self._calls} times, where the "
                f"network's own call was number {self.call + 1} on the first batch; the step must always compute its "
                "losses in one order"
            )
        return result, self._report

    def _copy(self, function: Callable[..., Any], values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for copies: that of a placeholder is one number too."""
        if not self._is_known(values):
            if torch.compiler.is_compiling():
                return function(values, *args, **kwargs)
            return self.derived.call(function, (values, *args), kwargs)
        number = function(values[(0,) * values.ndim], *args, **kwargs)
        copied = number.expand(values.shape)
        if not torch.compiler.is_compiling():
            self._placeholders.append(number)
            self.derived.follow(copied)
        return copied

    def _is_known(self, values: torch.Tensor) -> bool:
        """Whether a tensor is a view of a placeholder; a compiler, which knows no bases, is asked for its strides."""
        if torch.compiler.is_compiling():
            return values.ndim > 1 and not any(values.stride())
        return any(values._base is known for known in self._placeholders)

    def cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for ``F.cross_entropy`` during a step: the network's own call gives the windows'."""
        call = self._calls
        self._calls += 1
        output = self.engine.output
        if call != self.call:
            if (
                call > self.call
                and output is not None
                and (_is_placeholder(logits, output) or (self.steps == 1 and _depends(logits, output)))
            ):
                raise RuntimeError(
                    "training_step calls F.cross_entropy a second time on the windowed logits; windows serve one "
                    "loss: join the two, or compute the second without gradient from a forward of its own"
                )
            return F.cross_entropy(logits, target, *args, **kwargs)
        if output is None:
            raise RuntimeError("the network's cross-entropy was met before the network's head had run")
        options = {_OPTIONS[place]: value for place, value in enumerate(args)} | kwargs
        loss, self._report = self.loss(output, logits, target, progress=self._progress, **options)
        return loss
