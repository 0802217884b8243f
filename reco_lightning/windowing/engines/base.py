# SPDX-License-Identifier: Apache-2.0
"""The base of all engines: replaces a network's forwards and runs its head on windows alone.

Rows are positions of the network's sequence (B, T, D), prefix included; tokens are video tokens, prefix not included.
Row r predicts the token that stands at row r + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from reco_lightning.windowing.engines.call_slicing import map_hidden, pack, take_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.engines.linear_calls import LINEAR_FUNCTIONS, LinearCall, find_linear_call
from reco_lightning.windowing.rows import HeadInput, RowLayout, WindowGroup, WindowOutput, split_batch
from reco_lightning.windowing.sampler import Window

__all__ = ["BlockCall", "Engine", "ForwardState", "Head", "place_rows"]


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
    """What makes logits of states, and the values that stand in for rows outside the windows.

    Args:
        module: Maps the states (B, T, D) to logits (B, T, V); ``None`` where a function does, as a linear layer.
        call: Which call of such a function behind the blocks and outside other heads, counted from 0.
        outside_value: Logits of other rows in training: NaN, so that a wrong alignment cannot pass unseen, or 0 where
            parameters follow the head, whose gradients NaN would poison. In a verification it is always NaN.
        placeholder: One NaN, of the logits' type and device, that a training forward returns expanded in the place of
            logits; ``None`` places the windows' logits on rows of the full sequence.
        deferred: Whether the loss makes the logits: for a linear layer, with a placeholder.
    """

    module: nn.Module | None
    call: int = 0
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
        states: What the windows' states are taken from, once it is there.
        hidden: The states of each group.
        made: What heads made of them, or what the loss is to make logits of, where the network returns a placeholder.
        linear_calls: Calls of linear functions since the blocks were left; ``None`` before.
    """

    groups: tuple[WindowGroup, ...]
    rows: int
    batch: int
    whole: bool
    states: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] = ()
    made: dict[int, HeadInput | tuple[torch.Tensor, ...]] = field(default_factory=dict)
    linear_calls: int | None = None

    def take(self, states: torch.Tensor) -> None:
        """Takes the windows' states out of those of all rows, (B, T, D), (B * T, D) or (B, T, H, W, C)."""
        self.states, self.hidden = states, self.windows(states)

    def windows(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns each group's rows (B_g, rows, D) of states."""
        rows = states.reshape(self.batch, self.rows, -1)
        return tuple(rows[group.samples, group.loss_start : group.stop] for group in self.groups)


class BlockCall(NamedTuple):
    """A call of a block: its forward, the states (B, T, D) among its arguments, and these."""

    original: Callable[..., Any]
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Engine:
    """Runs a network on windows: replaces methods while installed, and knows the windows while active.

    Installed once per fit, activated once per step. While active, the network's training forward computes the windows
    alone, and its heads return logits (B, T, V) with ``Head.outside_value`` in all other rows; where the loss reads a
    head's output as it is, ``Head.placeholder`` expanded to (B, T, V) without memory, and ``output`` holds the windows'
    logits or, where the loss makes them, what they are made of. Inactive, the network is exactly what it was.

    Args:
        name: What the engine is called in reports.
        blocks: The network's blocks in order.
        heads: The heads that read windows alone.
        layout: Where the video's tokens lie in the network's sequence.
        is_open: Whether something else reads the states too, those of all rows: outside the windows they are zero, and
            NaN in a verification.
        patches: The methods that it replaces besides the forwards of blocks and heads.

    Attributes:
        returned: Called with what stands in for logits or states, when it leaves heads or blocks outside compiled code.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[nn.Module],
        heads: Sequence[Head],
        layout: RowLayout,
        *,
        is_open: bool = False,
        patches: Sequence[PatchedMethod] = (),
    ) -> None:
        self.name = name
        self.heads = tuple(heads)
        self.layout = layout
        self.is_open = is_open
        self._patches = [
            *patches,
            *(PatchedMethod(block, "forward", partial(self._block, index)) for index, block in enumerate(blocks)),
        ]
        self._calls: dict[int, int] = {}  # numbers of the heads that are functions, by their call
        for index, head in enumerate(self.heads):
            if head.module is None:
                self._calls[head.call] = index
            else:
                self._patches.append(PatchedMethod(head.module, "forward", partial(self._head, index)))
        self._last = len(blocks) - 1
        self._windows: tuple[Window, ...] | None = None
        self._attached = 0
        self._inference = False
        self._finished = False
        self._in_head = False
        self._run: ForwardState | None = None
        self.returned: Callable[[torch.Tensor], None] | None = None

    @property
    def handlers(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What stands in for functions of torch while the engine is active."""
        if not self._calls:
            return {}
        return {function: partial(self._linear, function) for function in LINEAR_FUNCTIONS}

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
            self._run.states, self._run.hidden, self._run.made = None, (), {}
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
        return WindowOutput(run.groups, run.hidden, run.rows, run.batch, run.whole, run.states, run.made)

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

    def _block(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for a block's forward."""
        hidden = None if self._windows is None else take_hidden(args, kwargs)
        if hidden is None or not self._is_live(hidden):
            return original(*args, **kwargs)
        if index == 0:
            self._enter(hidden)
        run = self._run
        if run is None:
            return original(*args, **kwargs)
        call = BlockCall(original, hidden, args, kwargs)
        output = original(*args, **kwargs) if run.whole else self._run_block(index, run, call)
        if index == self._last:
            run.linear_calls = 0
            return map_hidden(output, partial(self._exit, run))
        return output

    def _enter(self, hidden: torch.Tensor) -> None:
        """Begins a windowed forward with the states that the first block is called with."""
        batch, rows = hidden.shape[0], hidden.shape[1:-1].numel()
        groups, whole = self._split(batch, rows)
        if self._run is None or (self._run.groups, self._run.rows) != (groups, rows):
            self._run = self._start(ForwardState(groups, rows, batch, whole), hidden.device)

    def _start(self, run: ForwardState, device: torch.device) -> ForwardState:
        """What the blocks of a forward are to know of it; engines add to it."""
        return run

    def _run_block(self, index: int, run: Any, call: BlockCall) -> Any:
        """Runs a block on windows; what leaves the last one has T rows again, for what follows may count on them."""
        raise NotImplementedError

    def _exit(self, run: ForwardState, states: torch.Tensor) -> torch.Tensor:
        """The states that leave the blocks, for the heads and, where it is open, for other readers."""
        if self.is_open and not _in_backward():
            run.take(states)
        if self.is_open and self._inference and not run.whole:
            states = place_rows(pack(run.hidden), run.groups, run.rows, outside_value=float("nan")).view_as(states)
        return states if run.whole else self._returned(states)

    def _linear(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for a function that may be a head."""
        run = self._run
        if run is None or run.linear_calls is None or self._in_head:
            return NotImplemented
        call = find_linear_call(function, args, kwargs)
        if call is None or not self._is_live(call.states):
            return NotImplemented
        number = self._calls.get(run.linear_calls)
        run.linear_calls += 1
        return NotImplemented if number is None else self._head(number, call, call.states)

    def _head(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a head on the windows' rows of its states, (B, T, D), (B * T, D) or (B, T, H, W, C)."""
        run = self._run
        states = take_hidden(args, kwargs)
        if run is None or not self._is_live(states):
            return original(*args, **kwargs)
        if not self.is_open:
            run.take(states)
        windows = run.windows(states)
        # of a window that is the whole sequence the loss may cover other rows too
        head_input = [states.reshape(run.batch, run.rows, -1)] if run.whole else windows
        placeholder = self._defer(index, original, states, head_input)
        if placeholder is not None:
            return placeholder
        self._in_head = True
        try:
            if run.whole:
                return original(*args, **kwargs)
            return self._leave(index, original(pack(windows)), states.shape[:-1])
        finally:
            self._in_head = False

    def _defer(
        self,
        index: int,
        original: Callable[..., Any],
        states: torch.Tensor,
        head_input: Sequence[torch.Tensor],
    ) -> torch.Tensor | None:
        """What the network returns where the loss makes the logits of these states; ``None`` where it does not."""
        head, run = self.heads[index], self._run
        assert run is not None
        run.made.pop(index, None)
        linear = original if isinstance(original, LinearCall) else head.module
        placeholder = head.placeholder
        if not (head.deferred and isinstance(linear, (nn.Linear, LinearCall))) or placeholder is None:
            return None
        if self._inference or is_traceable_wrapper_subclass(linear.weight):  # distributed or quantised
            return None
        device, dtype = states.device.type, placeholder.dtype
        autocast = torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else states.dtype) != dtype:
            return None
        # taken here: until the loss is met autocast may end, and torch.func.functional_call put other weights back
        bias = None if linear.bias is None else linear.bias.to(dtype)
        run.made[index] = HeadInput(tuple(part.to(dtype) for part in head_input), linear.weight.to(dtype), bias)
        return self._returned(placeholder.expand(*states.shape[:-1], len(linear.weight)))

    def _leave(self, index: int, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """What the network returns, given the windows' logits packed (B, R, V): of that shape and V."""
        head, run = self.heads[index], self._run
        assert run is not None
        placeholder = head.placeholder
        if placeholder is None or self._inference or placeholder.dtype != packed.dtype:
            value = float("nan") if self._inference else head.outside_value
            return self._returned(place_rows(packed, run.groups, run.rows, outside_value=value).view(*shape, -1))
        run.made[index] = tuple(packed[group.samples, : group.stop - group.loss_start] for group in run.groups)
        return self._returned(placeholder.expand(*shape, packed.shape[-1]))

    def _returned(self, values: torch.Tensor) -> torch.Tensor:
        if self.returned is not None and not torch.compiler.is_compiling():
            self.returned(values)
        return values


def _in_backward() -> bool:
    """Whether the caller is run by a backward pass, as what activation checkpointing recomputes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
