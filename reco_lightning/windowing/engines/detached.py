# SPDX-License-Identifier: Apache-2.0
"""The engines ``prefix`` and ``masked``: detach the context's states between blocks.

``prefix`` runs the blocks on the rows up to the window's end, ``masked`` (networks of one fixed length) on all of them.
In both the loss covers the window alone and the states of context rows are constants to every block; their keys and
values still train the projections that make them, as with ``context="keys"`` of the frozen engine. Nothing is saved in
front of the window; ``prefix`` saves what lies behind it, and both the head's work on other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from reco_lightning.windowing.engines.base import BlockCall, Engine, ForwardState, Head
from reco_lightning.windowing.engines.call_slicing import cut_call, map_hidden
from reco_lightning.windowing.rows import RowLayout

__all__ = ["DetachedEngine"]


@dataclass
class _State(ForwardState):
    """Which rows are context, and in a proof which ones lie behind the window, (B, T) each."""

    constant: torch.Tensor | None = None
    later: torch.Tensor | None = None

    @property
    def stop(self) -> int:
        return max(group.stop for group in self.groups)


def _select(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shapes a mask of rows (B, T) for states (B, T, D) or (B, T, H, W, C)."""
    batch, grid = like.shape[0], like.shape[1:-1]
    return mask[:, : grid.numel()].view(batch, *grid, 1)


class DetachedEngine(Engine):
    """Runs blocks on rows whose context part is detached at every block's entrance.

    Args:
        blocks: The network's blocks in order; states (B, T, D), or (B, T, H, W, C) where the length is fixed.
        heads: The heads that read windows alone.
        layout: Where the video's tokens lie in the network's sequence.
        is_open: Whether something else reads the states too, see ``Engine``.
        fixed_length: Whether all rows are run, or those up to the window's end.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        heads: Sequence[Head],
        layout: RowLayout,
        *,
        fixed_length: bool,
        is_open: bool = False,
    ) -> None:
        super().__init__("masked" if fixed_length else "prefix", blocks, heads, layout, is_open=is_open)
        self.fixed_length = fixed_length
        self._run: _State | None = None

    @override
    def _start(self, run: ForwardState, device: torch.device) -> _State:
        groups = run.groups
        row = torch.arange(run.rows, device=device)

        def per_sample(bounds: list[int]) -> torch.Tensor:
            sizes = [group.samples.stop - group.samples.start for group in groups]
            # filled on the device: a copy from the host would wait for it
            parts = [row.new_full((size, 1), bound) for size, bound in zip(sizes, bounds, strict=True)]
            return torch.cat(parts)

        constant = None
        if any(group.first for group in groups):
            constant = row < per_sample([group.first for group in groups])
        # A network of fixed length is given all rows: only altered ones show whether it looks at those of the future.
        later = row >= per_sample([group.stop for group in groups]) if self._inference else None
        return _State(run.groups, run.rows, run.batch, run.whole, constant=constant, later=later)

    @override
    def _run_block(self, index: int, run: _State, call: BlockCall) -> Any:
        states = call.hidden
        if index == 0:
            if not self.fixed_length:
                states = states[:, : run.stop]
            if run.later is not None:
                states = torch.where(_select(run.later, states), 1 - states, states)
        if run.constant is not None:
            states = torch.where(_select(run.constant, states), states.detach(), states)
        stop = run.rows if self.fixed_length else run.stop
        cut_args, cut_kwargs = cut_call(call.args, call.kwargs, states, start=0, stop=stop, rows=run.rows)
        output = call.original(*cut_args, **cut_kwargs)
        if index == self._last and not self.fixed_length:
            return map_hidden(output, lambda states: F.pad(states, (0, 0, 0, run.rows - stop)))
        return output
