# SPDX-License-Identifier: Apache-2.0
"""The base of all engines: replaces a network's forwards and runs its head on windows alone.

Rows are positions of the network's sequence (B, T, D), prefix included; tokens are video tokens, prefix not included.
Row r predicts the token that stands at row r + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.windowing.engines.call_slicing import pack, take_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.rows import HeadInput, RowLayout, WindowGroup, WindowOutput, split_batch
from reco_lightning.windowing.sampler import Window

__all__ = ["Engine", "ForwardState", "Head", "place_rows"]


def place_rows(logits: torch.Tensor, groups: Sequence[WindowGroup], rows: int, *, outside_value: float) -> torch.Tensor:
    """Places window logits on the rows of the full sequence.

    Args:
        logits: Packed window logits, (B, R, V); group g fills its first ``stop - loss_start`` rows.
        groups: The groups of the batch.
        rows: T, the length of the full sequence.
        outside_value: What all other rows hold.

    Returns:
        Logits of the full length, (B, T, V).

    Example:
        >>> group = WindowGroup(Window(1, 2), slice(0, 1), first=1, loss_start=1, stop=2)
        >>> place_rows(torch.zeros(1, 1, 1), [group], 3, outside_value=float("nan")).flatten().tolist()
        [nan, 0.0, nan]
    """
    parts = []
    for group in groups:
        length = group.stop - group.loss_start
        part = logits[group.samples, :length]
        parts.append(F.pad(part, (0, 0, group.loss_start, rows - group.stop), value=outside_value))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Head:
    """The module that makes the logits, and the values that stand in for rows outside the windows.

    Args:
        module: Maps the states (B, T, D) to logits (B, T, V).
        outside_value: Logits of other rows in training: NaN, so that a wrong alignment cannot pass unseen, or 0 where
            parameters follow the head, whose gradients NaN would poison. In a verification it is always NaN.
        placeholder: One NaN, of the logits' type and device, that a training forward returns expanded in the place of
            logits; ``None`` places the windows' logits on rows of the full sequence.
        deferred: Whether the loss makes the logits: for an ``nn.Linear``, with a placeholder.
    """

    module: nn.Module
    outside_value: float = float("nan")
    placeholder: torch.Tensor | None = None
    deferred: bool = False


@dataclass
class ForwardState:
    """One windowed forward.

    Args:
        groups: The groups of the batch.
        rows: T, the length of the network's sequence.
        batch: B, the size of the batch.
        whole: Whether the one window is the whole sequence: the plain forward is run then.
        states: What the head was called with, once it was.
        hidden: What it read of each group.
        logits: What it made of it, where the network returns a placeholder.
        head_input: What it is to read, where the loss makes the logits.
    """

    groups: tuple[WindowGroup, ...]
    rows: int
    batch: int
    whole: bool
    states: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] = ()
    logits: tuple[torch.Tensor, ...] | None = None
    head_input: HeadInput | None = None


class Engine:
    """Runs a network on windows: replaces methods while installed, and knows the windows while active.

    Installed once per fit, activated once per step. While active, the network's training forward computes the windows
    alone and returns logits (B, T, V) with ``Head.outside_value`` in all other rows; where the loss reads the head's
    output as it is, ``Head.placeholder`` expanded to (B, T, V) without memory, and ``output`` holds the windows' logits
    or, where the loss makes them, what they are made of. Inactive, the network is exactly what it was.

    Args:
        name: What the engine is called in reports.
        patches: The methods that it replaces besides the head's forward.
        head: The head.
        layout: Where the video's tokens lie in the network's sequence.

    Attributes:
        returned: Called with what stands in for the logits, when the network returns it outside compiled code.
    """

    def __init__(self, name: str, patches: Sequence[PatchedMethod], head: Head, layout: RowLayout) -> None:
        self.name = name
        self.head = head
        self.layout = layout
        self._patches = [*patches, PatchedMethod(head.module, "forward", self._head)]
        self._windows: tuple[Window, ...] | None = None
        self._attached = 0
        self._inference = False
        self._finished = False
        self._run: ForwardState | None = None
        self.returned: Callable[[torch.Tensor], None] | None = None

    def install(self) -> None:
        """Replaces the methods."""
        for patch in self._patches:
            patch.install()

    def remove(self) -> None:
        """Restores them."""
        self.deactivate()
        for patch in reversed(self._patches):
            patch.remove()

    def activate(self, windows: Sequence[Window], *, attached: int = 0, inference: bool = False) -> None:
        """Makes the next forwards run these windows, one per group of the batch.

        Args:
            windows: The windows, in tokens.
            attached: Tokens in front of each window that are trained through, without a loss of their own.
            inference: Whether this is a verification: forwards under ``no_grad`` run them too.
        """
        self.deactivate()
        self._attached = attached
        self._windows = tuple(windows) if len(set(windows)) > 1 else tuple(windows[:1])
        self._inference = inference

    def finish(self) -> WindowOutput | None:
        """Ends the windowed forward and returns its output.

        Later forwards are plain; blocks that the backward pass runs again (activation checkpointing) are windowed.
        """
        output = self.output
        self._finished = True
        if self._run is not None:
            self._run.states, self._run.hidden, self._run.logits, self._run.head_input = None, (), None, None
        return output

    def deactivate(self) -> None:
        """Back to the plain network; drops everything that was kept for the backward pass."""
        self._windows, self._run, self._finished = None, None, False

    @property
    def output(self) -> WindowOutput | None:
        """Groups and states of the last windowed forward."""
        run = self._run
        if run is None or run.states is None:
            return None
        return WindowOutput(run.groups, run.hidden, run.rows, run.batch, run.states, run.logits, run.head_input)

    @property
    def _other_rows(self) -> float:
        return float("nan") if self._inference else self.head.outside_value

    def _is_live(self, states: torch.Tensor) -> bool:
        # A forward without gradient inside a training step (sampling, a teacher) is the user's own: it stays plain.
        # Reentrant checkpointing runs without gradient too, on states that require it.
        if self._finished and not _in_backward():
            return False
        return self._inference or torch.is_grad_enabled() or states.requires_grad

    def _split(self, batch: int, rows: int) -> tuple[tuple[WindowGroup, ...], bool]:
        """The groups of a forward, and whether they are the whole sequence."""
        assert self._windows is not None
        groups = split_batch(self._windows, self.layout, batch=batch, rows=rows, attached=self._attached)
        return groups, len(groups) == 1 and len(groups[0].window) == self.layout.tokens

    def _windowed_states(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The states that a block is called with, where it is to be run on windows; ``None`` where it runs as it is."""
        if self._windows is None:
            return None
        hidden = take_hidden(args, kwargs)
        if not self._is_live(hidden):
            return None
        if index == 0:
            batch, rows = hidden.shape[0], hidden.shape[1:-1].numel()
            groups, whole = self._split(batch, rows)
            if self._run is None or (self._run.groups, self._run.rows) != (groups, rows):
                self._run = self._start(ForwardState(groups, rows, batch, whole), hidden.device)
        return None if self._run is None or self._run.whole else hidden

    def _start(self, run: ForwardState, device: torch.device) -> ForwardState:
        """What the blocks of a forward are to know of it; engines add to it."""
        return run

    def _head(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the head on the windows' rows of its states, (B, T, D) or (B, T, H, W, C)."""
        run = self._run
        states = take_hidden(args, kwargs)
        if run is None or not self._is_live(states):
            return original(*args, **kwargs)
        rows = states.flatten(1, -2)
        windows = [rows[group.samples, group.loss_start : group.stop] for group in run.groups]
        run.states, run.hidden = states, tuple(windows)
        # of a window that is the whole sequence the loss may cover other rows too
        placeholder = self._defer(run, states, [rows] if run.whole else windows, states.shape[:-1])
        if placeholder is not None:
            return placeholder
        if run.whole:
            return original(*args, **kwargs)
        return self._leave(original(pack(windows)), run, states.shape[:-1])

    def _defer(
        self, run: ForwardState, states: torch.Tensor, head_input: Sequence[torch.Tensor], shape: torch.Size
    ) -> torch.Tensor | None:
        """What the network returns where the loss makes the logits of these states; ``None`` where it does not."""
        run.head_input = None
        head, placeholder = self.head.module, self.head.placeholder
        if not (self.head.deferred and isinstance(head, nn.Linear)) or placeholder is None or self._inference:
            return None
        device, dtype = states.device.type, placeholder.dtype
        autocast = torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else states.dtype) != dtype:
            return None
        # taken here: until the loss is met autocast may end, and torch.func.functional_call put other weights back
        bias = None if head.bias is None else head.bias.to(dtype)
        run.head_input = HeadInput(tuple(part.to(dtype) for part in head_input), head.weight.to(dtype), bias)
        return self._returned(placeholder.expand(*shape, head.out_features))

    def _leave(self, packed: torch.Tensor, run: ForwardState, shape: torch.Size) -> torch.Tensor:
        """What the network returns, given the windows' logits packed (B, R, V): of that shape and V."""
        run.logits = None
        placeholder = self.head.placeholder
        if placeholder is None or self._inference or placeholder.dtype != packed.dtype:
            placed = place_rows(packed, run.groups, run.rows, outside_value=self._other_rows)
            return self._returned(placed.view(*shape, -1))
        run.logits = tuple(packed[group.samples, : group.stop - group.loss_start] for group in run.groups)
        return self._returned(placeholder.expand(*shape, packed.shape[-1]))

    def _returned(self, logits: torch.Tensor) -> torch.Tensor:
        if self.returned is not None and not torch.compiler.is_compiling():
            self.returned(logits)
        return logits


def _in_backward() -> bool:
    """Whether the caller is run by a backward pass, as what activation checkpointing recomputes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
