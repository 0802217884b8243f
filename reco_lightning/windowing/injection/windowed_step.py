# SPDX-License-Identifier: Apache-2.0
"""One windowed training step: the network runs on windows, with their cross-entropy plus continuity (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.windowing.engines.base import Engine
from reco_lightning.windowing.engines.interception import FunctionInterceptor
from reco_lightning.windowing.injection.derived_values import DerivedValues
from reco_lightning.windowing.injection.foreign_losses import ForeignLosses
from reco_lightning.windowing.injection.loss_calls import LossCall
from reco_lightning.windowing.injection.step_trace import Trace
from reco_lightning.windowing.losses.continuity import Continuity, ContinuityNorm, continuity_loss, gradient_norm
from reco_lightning.windowing.losses.cross_entropy import (
    WindowCrossEntropy,
    plain_cross_entropy,
    read_options,
    select_rows,
    window_cross_entropy,
)
from reco_lightning.windowing.rows import HeadInput, LossRows, RowLayout, WindowOutput
from reco_lightning.windowing.sampler import Window

__all__ = ["Injection", "StepReport", "WindowLoss", "mean_continuity"]

_COPIES = tuple(
    getattr(torch.Tensor, name)
    for name in ("bfloat16", "clone", "contiguous", "double", "float", "half", "to", "type", "type_as")
)


@dataclass(frozen=True)
class StepReport:
    """Measurements of a windowed step, without graph.

    Args:
        cross_entropy: Mean over the windows' tokens, nats; of several cross-entropies what the step makes of them.
        continuity: The continuity term before its weight.
        window_start: Mean start of the step's windows, tokens.
        losses: For each group its window and cross-entropy; empty where nobody asked for them.
        parts: Mean of each of several cross-entropies, in their order, nats; empty where there is one.
    """

    cross_entropy: torch.Tensor
    continuity: torch.Tensor
    window_start: float
    losses: tuple[tuple[Window, torch.Tensor], ...] = ()
    parts: tuple[torch.Tensor, ...] = ()


def mean_continuity(output: WindowOutput, norm: ContinuityNorm, lag: int = 1) -> torch.Tensor:
    """Computes the continuity of a windowed run: the mean over the groups' states, by the number of samples."""
    if len(output.hidden) == 1:
        return continuity_loss(output.hidden[0], norm=norm, lag=lag)
    parts = [continuity_loss(states, norm=norm, lag=lag) * (len(states) / output.batch) for states in output.hidden]
    return torch.stack(parts).sum()


class WindowLoss:
    """Computes the losses of windowed forwards: cross-entropies of the windows' rows, and continuity (Eq. 11).

    Args:
        calls: The network's cross-entropies.
        continuity: The continuity term.
        layout: Where the video's tokens lie in the network's sequence.
        by_group: Whether the report holds each group's cross-entropy too.

    Attributes:
        main: Number of the cross-entropy that the continuity is added to: the last of those on the most rows.
    """

    def __init__(
        self, calls: Sequence[LossCall], continuity: Continuity, *, layout: RowLayout, by_group: bool = False
    ) -> None:
        self.calls = tuple(calls)
        self.continuity = continuity
        self.layout = layout
        self.by_group = by_group
        counted = [index for index, call in enumerate(self.calls) if call.weight] or range(len(self.calls))
        self.main = max(counted, key=lambda index: (self.calls[index].length, index))
        self._sizes: dict[int, tuple[int, int]] = {}

    def cross_entropy(
        self, index: int, output: WindowOutput, logits: torch.Tensor, target: torch.Tensor, **options: Any
    ) -> WindowCrossEntropy:
        """Computes one of the cross-entropies on the windows' rows.

        Args:
            index: Its number among ``calls``.
            output: What the windowed forward left behind.
            logits: What the loss was given: logits of all rows, or the engine's placeholder; see ``loss_rows``.
            target: Likewise.
            **options: Further arguments of ``F.cross_entropy``.
        """
        call = self.calls[index]
        rows = self._rows(index, output, target, options.get("ignore_index", -100))
        made = None if call.head is None else output.made.get(call.head)
        if made is not None and any(logits.stride()):
            raise RuntimeError(
                "F.cross_entropy was given the head's output itself on the first batch, and a copy now; the step "
                "must always compute its loss in one way"
            )
        groups = output.groups
        if len(groups) == 1 and len(groups[0].window) == self.layout.tokens:
            if made is None:
                return plain_cross_entropy(logits, target, **options)
            if output.whole and isinstance(made, HeadInput):  # the plain loss may cover rows beside the tokens'
                groups = (replace(groups[0], loss_start=0, stop=output.rows),)
        return window_cross_entropy(logits, target, groups, batch=output.batch, rows=rows, own=made, **options)

    def add_continuity(
        self, found: Mapping[int, WindowCrossEntropy], output: WindowOutput, *, progress: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the continuity term to the main cross-entropy.

        It is added once to what the step makes of all cross-entropies: the main one's own weight is divided out.

        Args:
            found: The cross-entropies that were computed so far, by number; the main one among them.
            output: What the windowed forward left behind.
            progress: Fraction of the training that is done, 0 to 1.

        Returns:
            The value that the step gets, and the term before its weight, without graph.
        """
        entropy, weight = found[self.main], self.continuity.at(progress)
        with torch.set_grad_enabled(torch.is_grad_enabled() if weight else False):
            continuity = mean_continuity(output, self.continuity.norm, self.continuity.lag)
        if not weight:
            return entropy.value, continuity.detach()
        factor = self._factor(weight, self.total(found), continuity, output)
        share = entropy.divisor / (self.calls[self.main].weight or 1.0)
        return entropy.value + share * factor * continuity, continuity.detach()

    def total(self, found: Mapping[int, WindowCrossEntropy]) -> torch.Tensor:
        """Returns the means of cross-entropies as the step adds them up."""
        if len(self.calls) == 1:
            return found[0].mean
        return torch.stack([self.calls[index].weight * entropy.mean for index, entropy in found.items()]).sum()

    def report(
        self, found: Mapping[int, WindowCrossEntropy], output: WindowOutput, continuity: torch.Tensor
    ) -> StepReport:
        """Returns the measurements of a step."""
        losses: tuple[tuple[Window, torch.Tensor], ...] = ()
        if self.by_group:
            weighted = [
                [self.calls[index].weight * mean for mean in entropy.group_means()] for index, entropy in found.items()
            ]
            windows = [group.window for group in output.groups]
            sums = [torch.stack(of_group).sum() for of_group in zip(*weighted, strict=True)]
            losses = tuple(zip(windows, sums, strict=True))
        parts = tuple(entropy.mean.detach() for _, entropy in sorted(found.items())) if len(found) > 1 else ()
        start = sum(g.window.start * (g.samples.stop - g.samples.start) for g in output.groups) / output.batch
        return StepReport(self.total(found).detach(), continuity, start, losses, parts)

    def select(
        self, output: WindowOutput, logits: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the windows' own logits (R, V) and targets (R,) of the first cross-entropy, as ``select_rows``."""
        rows = self._rows(0, output, target)
        own = output.made.get(0)
        if isinstance(own, HeadInput):
            own = replace(own, states=output.hidden).logits()
        return select_rows(logits, target, output.groups, batch=output.batch, rows=rows, own=own)

    def _rows(self, index: int, output: WindowOutput, target: torch.Tensor, ignore_index: int = -100) -> LossRows:
        """The network's rows that feed the loss rows; refuses a batch whose rows are not those of the first."""
        length = target.numel() // output.batch
        rows, first = self._sizes.setdefault(index, (output.rows, length))
        fits = length in (first, first + output.rows - rows)
        if self.calls[index].scattered is not None:
            fits = (output.rows, length) == (rows, first)
        if not fits:
            raise RuntimeError(
                f"F.cross_entropy was given {first} of {rows} rows of the network on the first batch, and {length} of "
                f"{output.rows} now; take no rows out before the loss, use ignore_index"
            )
        found = self.calls[index].loss_rows(output.rows, length)
        if length != first and not torch.compiler.is_compiling():
            self._check_further_rows(output, target.reshape(output.batch, length) != ignore_index, found.start, first)
        return found

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
        self.loss = WindowLoss(trace.calls, continuity, layout=engine.layout, by_group=by_group)
        self.derived = DerivedValues()
        self.unlogged = trace.unlogged
        self.returns_loss = trace.returns_loss
        self.steps = 0
        self._indices = {call.number: index for index, call in enumerate(trace.calls)}
        self._copied = any(
            traced.is_copied and head.placeholder is not None
            for head, traced in zip(engine.heads, trace.heads, strict=True)
        )
        self._placeholders: list[tuple[torch.Tensor, int]] = []  # and copies of them, with the head's number
        self._foreign_losses = ForeignLosses()
        self._progress = 0.0
        self._calls = 0
        self._found: dict[int, WindowCrossEntropy] = {}
        self._continuity: tuple[WindowOutput, torch.Tensor] | None = None

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
        self._calls, self._found, self._continuity, self._progress = 0, {}, None, progress
        self.steps += 1
        self.engine.activate(windows, attached=attached)
        handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.cross_entropy: self.cross_entropy,
            F.nll_loss: partial(self.cross_entropy, function=F.nll_loss),
            **self.engine.handlers,
        }
        heads = self.engine.heads
        self._placeholders = [(head.placeholder, i) for i, head in enumerate(heads) if head.placeholder is not None]
        if self._copied:
            handlers |= {function: partial(self._copy, function) for function in _COPIES}
        self.derived = DerivedValues(hides_numbers=True)
        self.engine.returned = self.derived.follow
        try:
            with FunctionInterceptor(handlers, self.derived.call), self._foreign_losses:
                result = step()
        finally:
            self.engine.returned = None
        found, continuity = self._found, self._continuity
        self._found, self._continuity = {}, None  # a graph is not kept until the next step
        if self.engine.output is not None and len(found) < len(self._indices):
            numbers = [number + 1 for number in self._indices]
            raise RuntimeError(
                f"this training step ran the network and called F.cross_entropy {self._calls} times, where the "
                f"network's own call was number {', '.join(map(str, numbers))} on the first batch; the step must "
                "always compute its losses in one order"
            )
        return result, None if continuity is None else self.loss.report(found, *continuity)

    def _copy(self, function: Callable[..., Any], values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for copies: that of a placeholder is one number too."""
        compiling = torch.compiler.is_compiling()
        head = None if compiling else self._head_of(values)
        # a compiler, which knows no bases, is asked for the strides
        if head is None and not (compiling and values.ndim > 1 and not any(values.stride())):
            return NotImplemented
        number = function(values[(0,) * values.ndim], *args, **kwargs)
        copied = number.expand(values.shape)
        if head is not None:
            self._placeholders.append((number, head))
            self.derived.follow(copied)
        return copied

    def _head_of(self, values: torch.Tensor) -> int | None:
        """Number of the head of whose placeholder a tensor is a view."""
        return next((head for known, head in self._placeholders if values._base is known), None)

    def cross_entropy(
        self, logits: torch.Tensor, target: torch.Tensor, *args: Any, function: Any = F.cross_entropy, **kwargs: Any
    ) -> torch.Tensor:
        """Stands in for a loss function during a step: the network's own calls give the windows'."""
        index = self._indices.get(self._calls)
        self._calls += 1
        output = self.engine.output
        if index is None or output is None:  # it may be the turn of another network
            return self._other_loss(function, logits, target, *args, **kwargs)
        head = None if torch.compiler.is_compiling() else self._head_of(logits)
        if head is not None and head != self.loss.calls[index].head:
            raise RuntimeError(
                f"the cross-entropy number {self._calls} of this training step reads the logits of another head than "
                "on the first batch; the step must always compute its losses in one order"
            )
        self._found[index] = entropy = self.loss.cross_entropy(
            index, output, logits, target, function=function, **read_options(args, kwargs)
        )
        if index != self.loss.main:
            return entropy.value
        value, continuity = self.loss.add_continuity(self._found, output, progress=self._progress)
        self._continuity = output, continuity
        return value

    def _other_loss(
        self, function: Any, logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A loss that the trace did not meet, or without gradient: refused if it is on windowed logits."""
        is_placeholder = bool(self.engine.output and self.engine.output.made) and not any(logits.stride())
        if torch.is_grad_enabled() and (is_placeholder or self.derived.names(logits)):
            raise RuntimeError(
                "training_step calls F.cross_entropy a second time on the windowed logits, as it did not on the first "
                "batch; it must always compute its losses in one order, and what is no loss without gradient"
            )
        loss: torch.Tensor = self.derived.call(function, (logits, target, *args), kwargs)
        return loss
