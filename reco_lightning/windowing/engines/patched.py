# SPDX-License-Identifier: Apache-2.0
"""What all engines share: forwards that are replaced while installed, windows while armed, and the head on windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.windowing.engines.call_slicing import pack, take_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.rows import Group, Unread, WindowOutput, split_batch
from reco_lightning.windowing.sampler import Window

__all__ = ["PatchedEngine", "Run", "place_rows"]


def place_rows(logits: torch.Tensor, groups: Sequence[Group], rows: int, *, fill: float) -> torch.Tensor:
    """Places window logits on the rows of the full sequence.

    Args:
        logits: Packed window logits, (B, R, V); group g fills its first ``stop - loss_start`` rows.
        groups: The groups of the batch.
        rows: T, the length of the full sequence.
        fill: What all other rows hold.

    Returns:
        Logits of the full length, (B, T, V).

    Example:
        >>> group = Group(Window(1, 2), slice(0, 1), first=1, loss_start=1, stop=2)
        >>> place_rows(torch.zeros(1, 1, 1), [group], 3, fill=float("nan")).flatten().tolist()
        [nan, 0.0, nan]
    """
    parts = []
    for group in groups:
        length = group.stop - group.loss_start
        part = logits[group.samples, :length]
        parts.append(F.pad(part, (0, 0, group.loss_start, rows - group.stop), value=fill))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class Run:
    """One armed forward.

    Args:
        groups: The groups of the batch.
        rows: T, the length of the network's sequence.
        batch: B, the size of the batch.
        whole: Whether the one window is the whole sequence: the plain forward is run then.
        states: What the head was called with, once it was.
        hidden: What it read of each group.
        logits: What it made of it, where the network returns a placeholder.
        unread: What it is to read, where the loss makes the logits.
    """

    groups: tuple[Group, ...]
    rows: int
    batch: int
    whole: bool
    states: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] = ()
    logits: tuple[torch.Tensor, ...] | None = None
    unread: Unread | None = None


class PatchedEngine:
    """Replaces methods of a network while installed, and knows the windows while armed; see ``Engine``.

    Args:
        patches: The replaced methods.
        tokens: N, video tokens of a sample.
        tail: Rows after the one that predicts the last video token, 0 or 1.
        fill: What logits of other rows hold in training; in a proof it is NaN.
        placeholder: One NaN, of the logits' type and device, that a training forward returns expanded in the place of
            logits; ``None`` places the windows' logits on rows of the full sequence.
        linear_head: The head, where it is a linear layer whose logits the loss makes; needs a placeholder.
    """

    def __init__(
        self,
        patches: Sequence[PatchedMethod],
        *,
        tokens: int,
        tail: int,
        fill: float,
        placeholder: torch.Tensor | None = None,
        linear_head: nn.Linear | None = None,
    ) -> None:
        self.tokens = tokens
        self.tail = tail
        self.linear_head = linear_head
        self._patches = list(patches)
        self._fill = fill
        self.placeholder = placeholder
        self._windows: tuple[Window, ...] | None = None
        self._attached = 0
        self._inference = False
        self._finished = False
        self._run: Run | None = None

    def install(self) -> None:
        """Replaces the methods."""
        for patch in self._patches:
            patch.install()

    def remove(self) -> None:
        """Restores them."""
        self.disarm()
        for patch in reversed(self._patches):
            patch.remove()

    def arm(self, windows: Sequence[Window], *, attached: int = 0, inference: bool = False) -> None:
        """Makes the next forwards run these windows; ``inference`` is a proof, under ``no_grad`` too."""
        self.disarm()
        self._attached = attached
        self._windows = tuple(windows) if len(set(windows)) > 1 else tuple(windows[:1])
        self._inference = inference

    def finish(self) -> WindowOutput | None:
        """Ends the windowed forward: later forwards are plain, and what the backward pass runs again is windowed."""
        output = self.output
        self._finished = True
        if self._run is not None:
            self._run.states, self._run.hidden, self._run.logits, self._run.unread = None, (), None, None
        return output

    def disarm(self) -> None:
        """Back to the plain network."""
        self._windows, self._run, self._finished = None, None, False

    @property
    def output(self) -> WindowOutput | None:
        """Groups and states of the last armed forward."""
        run = self._run
        if run is None or run.states is None:
            return None
        return WindowOutput(run.groups, run.hidden, run.rows, run.batch, run.states, run.logits, run.unread)

    @property
    def _other_rows(self) -> float:
        return float("nan") if self._inference else self._fill

    def _is_live(self, states: torch.Tensor) -> bool:
        # A forward without gradient inside a training step (sampling, a teacher) is the user's own: it stays plain.
        # Reentrant checkpointing runs without gradient too, on states that require it.
        if self._finished and not _in_backward():
            return False
        return self._inference or torch.is_grad_enabled() or states.requires_grad

    def _split(self, batch: int, rows: int) -> tuple[tuple[Group, ...], bool]:
        """The groups of a forward, and whether they are the whole sequence."""
        assert self._windows is not None
        groups = split_batch(
            self._windows, batch=batch, rows=rows, tokens=self.tokens, tail=self.tail, attached=self._attached
        )
        return groups, len(groups) == 1 and len(groups[0].window) == self.tokens

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
        self, run: Run, states: torch.Tensor, unread: Sequence[torch.Tensor], shape: torch.Size
    ) -> torch.Tensor | None:
        """What the network returns where the loss makes the logits of these states; ``None`` where it does not."""
        run.unread = None
        head, placeholder = self.linear_head, self.placeholder
        if head is None or placeholder is None or self._inference:
            return None
        device, dtype = states.device.type, placeholder.dtype
        autocast = torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else states.dtype) != dtype:
            return None
        # taken here: until the loss is met autocast may end, and torch.func.functional_call put other weights back
        bias = None if head.bias is None else head.bias.to(dtype)
        run.unread = Unread(tuple(part.to(dtype) for part in unread), head.weight.to(dtype), bias)
        return placeholder.expand(*shape, head.out_features)

    def _leave(self, packed: torch.Tensor, run: Run, shape: torch.Size) -> torch.Tensor:
        """What the network returns, given the windows' logits packed (B, R, V): of that shape and V."""
        run.logits = None
        if self.placeholder is None or self._inference or self.placeholder.dtype != packed.dtype:
            return place_rows(packed, run.groups, run.rows, fill=self._other_rows).view(*shape, -1)
        run.logits = tuple(packed[group.samples, : group.stop - group.loss_start] for group in run.groups)
        return self.placeholder.expand(*shape, packed.shape[-1])


def _in_backward() -> bool:
    """Whether the caller is run by a backward pass, as what activation checkpointing recomputes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
