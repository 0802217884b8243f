# SPDX-License-Identifier: Apache-2.0
"""The frozen-context engine: context without gradient, window with gradient, block by block (arXiv 2604.07402, Alg. 1).

Each block is entered once per step. Inside, it runs on the context rows under ``no_grad`` and leaves the keys and
values that it hands to attention; then it runs on the window rows with those in front of its own. The network computes
embeddings and positions itself, on the full sequence; nothing after the window's end is run, and the head runs on the
window's rows alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from reco_lightning.windowing.engines.base import BlockCall, Engine, ForwardState, Head
from reco_lightning.windowing.engines.call_slicing import (
    checkpoints_itself,
    cut_call,
    map_hidden,
    pack,
    replace_arguments,
    take_hidden,
)
from reco_lightning.windowing.engines.context_kv import (
    AttentionContextKV,
    AttentionReachedError,
    ContextCache,
    ContextKV,
)
from reco_lightning.windowing.engines.mingpt import MinGPTAttention, is_mingpt_attention
from reco_lightning.windowing.rows import RowLayout

__all__ = ["FrozenEngine"]


@dataclass
class _State(ForwardState):
    """What the blocks keep for each other: states of the context, and how often a block attends."""

    contexts: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    attentions: int | None = None

    def take_context(self, index: int, number: int, *, keep: bool) -> torch.Tensor:
        key = (index, number)
        if key not in self.contexts:
            raise RuntimeError(
                f"block {index} was run a second time in one step, and activation checkpointing was not seen on the "
                "first batch; use torch.utils.checkpoint, from the first step on"
            )
        return self.contexts[key] if keep else self.contexts.pop(key)


class FrozenEngine(Engine):
    """Runs a stack of attention blocks on windows with a frozen or key-trained context.

    Args:
        blocks: The network's blocks in order; each is called once per forward with the states (B, T, D) first, and
            attends through ``torch.nn.functional.scaled_dot_product_attention``.
        heads: The heads that read windows alone.
        layout: Where the video's tokens lie in the network's sequence.
        is_open: Whether something else reads the states too, see ``Engine``.
        trains_keys: Whether the context's keys and values train the projections that make them; its states are
            constants. The paper trains nothing of the context.
        recompute: Whether blocks are run again in the backward pass (activation checkpointing): the context's states
            are then kept until the step ends.
        context_kv: How context keys and values reach the window's attention; through scaled dot-product attention by
            default.
        name: What the engine is called in reports.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        heads: Sequence[Head],
        layout: RowLayout,
        *,
        is_open: bool = False,
        trains_keys: bool = False,
        recompute: bool = False,
        context_kv: ContextKV | None = None,
        name: str = "frozen",
    ) -> None:
        super().__init__(name, blocks, heads, layout, is_open=is_open)
        self.trains_keys = trains_keys
        self.recompute = recompute or any(checkpoints_itself(block) for block in blocks)
        self._blocks = list(blocks)
        self._context_kv = context_kv or AttentionContextKV()
        self._adapted = [
            [MinGPTAttention(part) for part in block.modules() if is_mingpt_attention(part)] for block in blocks
        ]
        self._run: _State | None = None

    @override
    def install(self) -> None:
        """Replaces the forwards of the blocks, of attention that is run otherwise, and of the head."""
        super().install()
        for attention in chain(*self._adapted):
            attention.install()

    @override
    def remove(self) -> None:
        """Restores them."""
        for attention in chain(*self._adapted):
            attention.remove()
        super().remove()

    @override
    def _start(self, run: ForwardState, device: torch.device) -> _State:
        return _State(run.groups, run.rows, run.batch, run.whole)

    @override
    def _run_block(self, index: int, run: _State, call: BlockCall) -> Any:
        block = self._blocks[index]
        groups = range(len(run.groups))

        def windows(states: torch.Tensor) -> Any:
            own = call._replace(hidden=states)
            return pack([self._group(index, number, run, own) for number in groups])

        if not (checkpoints_itself(block) and block.training and torch.is_grad_enabled()):
            return windows(call.hidden)

        def windows_of_plain_block(states: torch.Tensor) -> Any:
            block.gradient_checkpointing = False  # type: ignore[assignment]
            try:
                return windows(states)
            finally:
                block.gradient_checkpointing = True  # type: ignore[assignment]

        # The layers of transformers checkpoint inside their forward, where a recomputation would not see the window.
        return checkpoint(windows_of_plain_block, call.hidden, use_reentrant=False)

    def _group(self, index: int, number: int, run: _State, block_call: BlockCall) -> Any:
        original, hidden, args, kwargs = block_call
        group = run.groups[number]
        first = group.first
        if index == 0:
            own = hidden if len(run.groups) == 1 else hidden[group.samples]
            window, context = own[:, first : group.stop], own[:, :first].detach()
        else:
            window = hidden if len(run.groups) == 1 else hidden[group.samples, : group.stop - first]
            context = run.take_context(index, number, keep=self.recompute) if first else hidden[:0]
        samples = group.samples if len(run.groups) > 1 else None

        def call(states: torch.Tensor, start: int, stop: int, **changed: Any) -> Any:
            cut = cut_call(
                args, kwargs, states, start=start, stop=stop, rows=run.rows, samples=samples, batch=run.batch
            )
            kept.mask = _mask_of(cut, stop - start, stop)
            cut = replace_arguments(original, *cut, changed | _positions(original, cut, start, stop, states))
            with self._adapted_from(index, start):
                return original(*cut[0], **cut[1])

        enough = run.attentions if index == self._last and not torch.compiler.is_compiling() else None
        kept = ContextCache(first, enough, run.rows)
        if first:
            passed = self._context_pass(partial(call, context, 0, first), kept, hidden.device.type)
            if run.attentions is None:
                run.attentions = len(kept.pairs)
            if passed is not None:
                run.contexts[index + 1, number] = passed.detach()
            output = self._context_kv.run_window(partial(call, window, first, group.stop), kept, group.stop - first)
        else:
            output = self._context_kv.run_without_context(partial(call, window, first, group.stop), kept)
        if index == self._last:
            before, after = group.loss_start, run.rows - group.stop
            return map_hidden(
                output, lambda states: F.pad(states[:, group.loss_start - first :], (0, 0, before, after))
            )
        return output

    @contextmanager
    def _adapted_from(self, index: int, start: int) -> Iterator[None]:
        for attention in self._adapted[index]:
            attention.start = start
        try:
            yield
        finally:
            for attention in self._adapted[index]:
                attention.start = None

    def _context_pass(self, call: Callable[..., Any], kept: ContextCache, device: str) -> torch.Tensor | None:
        try:
            with torch.set_grad_enabled(self.trains_keys and torch.is_grad_enabled()), _autocast_without_cache(device):
                output = self._context_kv.run_context(call, kept)
        except AttentionReachedError:
            return None
        return take_hidden((output,) if isinstance(output, torch.Tensor) else tuple(output), {})


def _mask_of(call: tuple[tuple[Any, ...], dict[str, Any]], rows: int, keys: int) -> torch.Tensor | None:
    """The one argument that is shaped as a mask over context and window, (B, heads or 1, rows, keys)."""
    values = [value for value in (*call[0], *call[1].values()) if isinstance(value, torch.Tensor) and value.ndim == 4]
    masks = [value for value in values if value.shape[-2] == rows and value.shape[-1] == keys]
    return masks[0] if len(masks) == 1 else None


def _positions(
    block: Callable[..., Any],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    start: int,
    stop: int,
    states: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The rows' positions, for a block that would count them from 0 (``AttentionLayers`` of x-transformers)."""
    parameters = inspect.signature(block).parameters
    if not start or "pos" not in parameters or "seq_pos_offset" not in parameters or call[1].get("pos") is not None:
        return {}
    return {"pos": torch.arange(start, stop, device=states.device)}


def _autocast_without_cache(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, except that it hands nobody the copies of weights that are made inside.

    Made without a graph, they would not train in the window.
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)
