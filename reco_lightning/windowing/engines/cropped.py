# SPDX-License-Identifier: Apache-2.0
"""The fewer-frames engine: the window is a sequence of its own, without context (arXiv 2604.07402, App. A)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from reco_lightning.windowing.engines.base import BlockCall, Engine, ForwardState, Head, place_rows
from reco_lightning.windowing.engines.call_slicing import map_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.rows import RowLayout

__all__ = ["DroppedEngine"]

_SEQUENCE_ARGUMENTS = ("attention_mask", "position_ids", "token_type_ids", "inputs_embeds")


class DroppedEngine(Engine):
    """Feeds the network the prefix and the window's tokens alone, so that positions count from the window's start.

    Every window is then trained as if it were the beginning of a video; without a prefix its first token is not
    predicted. The network's sequence argument is its first tensor of two dimensions or more; ``attention_mask``,
    ``position_ids`` and their like are cut with it.

    Args:
        network: The network; its forward takes the sequence.
        last_block: The last of its blocks.
        heads: The heads that read windows alone.
        layout: Where the video's tokens lie in the network's sequence.
        is_open: Whether something else reads the states too, see ``Engine``.
        rows: T, rows that the blocks saw on the batch that the first windowed forward gets.
    """

    def __init__(
        self,
        network: nn.Module,
        last_block: nn.Module,
        heads: Sequence[Head],
        layout: RowLayout,
        *,
        rows: int,
        is_open: bool = False,
    ) -> None:
        patch = PatchedMethod(network, "forward", self._network)
        super().__init__("dropped", [last_block], heads, layout, is_open=is_open, patches=[patch])
        self._first_rows = rows
        self._inner_prefix: int | None = None

    def _network(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._run = None
        if self._windows is None:
            return original(*args, **kwargs)
        sequence = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim >= 2)
        if not self._is_live(sequence):
            return original(*args, **kwargs)
        if self._inner_prefix is None:
            self._inner_prefix = self._first_rows - sequence.shape[1]
        rows = sequence.shape[1] + self._inner_prefix
        groups, _ = self._split(len(sequence), rows)
        prefix = self.layout.prefix(rows)
        if prefix == 0:
            groups = tuple(replace(group, loss_start=group.window.start) for group in groups)
        self._run = ForwardState(groups, rows, len(sequence), whole=False)
        columns = prefix - self._inner_prefix  # of the sequence argument, in front of the video's tokens

        def cut(value: torch.Tensor) -> torch.Tensor:
            parts = []
            for group in groups:
                own = value[group.samples]
                window = own[:, columns + group.window.start : columns + group.window.stop - 1]
                parts.append(torch.cat([own[:, :columns], window], dim=1))
            return torch.cat(parts)

        pending = [sequence]  # labels may be the very same tensor, and the loss wants all of them

        def cut_argument(name: str | None, value: Any) -> Any:
            if pending and value is sequence:
                pending.clear()
                return cut(value)
            follows = name in _SEQUENCE_ARGUMENTS and isinstance(value, torch.Tensor)
            return cut(value) if follows and value.shape[:2] == sequence.shape[:2] else value

        cut_args = [cut_argument(None, value) for value in args]
        return original(*cut_args, **{name: cut_argument(name, value) for name, value in kwargs.items()})

    @override
    def _enter(self, hidden: torch.Tensor) -> None:
        """Nothing: a forward begins with the network."""

    @override
    def _run_block(self, index: int, run: ForwardState, call: BlockCall) -> Any:

        def place(states: torch.Tensor) -> torch.Tensor:
            rows = states[:, -max(group.stop - group.loss_start for group in run.groups) :]
            return place_rows(rows, run.groups, run.rows, outside_value=0.0)

        return map_hidden(call.original(*call.args, **call.kwargs), place)
