# SPDX-License-Identifier: Apache-2.0
"""The engines for networks whose attention cannot be reached: the context's states are detached between blocks.

``prefix`` runs the blocks on the rows up to the window's end, ``masked`` (networks of one fixed length) on all of them.
In both the loss covers the window alone and the states of context rows are constants to every block; their keys and
values still train the projections that make them, as with ``context="keys"`` of the frozen engine. Nothing is saved in
front of the window; ``prefix`` saves what lies behind it, and both the head's work on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.engines.base import Context, Group, WindowOutput, split_batch
from reco_lightning.engines.frozen import place_rows
from reco_lightning.engines.interception import PatchedMethod
from reco_lightning.engines.slicing import cut_call, map_hidden, pack, take_hidden
from reco_lightning.windows import Window

__all__ = ["DetachedEngine"]


@dataclass
class _Run:
    groups: tuple[Group, ...]
    rows: int
    batch: int
    whole: bool
    constant: torch.Tensor | None
    later: torch.Tensor | None
    hidden: tuple[torch.Tensor, ...] | None = None

    @property
    def stop(self) -> int:
        return max(group.stop for group in self.groups)


def _select(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shapes a mask of rows (B, T) for states (B, T, D) or (B, T, H, W, C)."""
    batch, grid = like.shape[0], like.shape[1:-1]
    return mask[:, : grid.numel()].view(batch, *grid, 1)


class DetachedEngine:
    """Runs blocks on rows whose context part is detached at every block's entrance.

    Args:
        blocks: The network's blocks in order; states (B, T, D), or (B, T, H, W, C) where the length is fixed.
        head: The module that maps the states to logits.
        tokens: N, video tokens of a sample.
        tail: Rows after the one that predicts the last video token, 0 or 1.
        context: ``"attached"`` leaves the context's gradients on; ``"frozen"`` and ``"keys"`` detach its states.
        fixed_length: Whether all rows are run, or those up to the window's end.
        fill: What logits of other rows hold in training, see ``Engine``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        tokens: int,
        tail: int,
        context: Context = "frozen",
        fixed_length: bool,
        fill: float = float("nan"),
    ) -> None:
        self._fill = fill
        self.name = "masked" if fixed_length else "prefix"
        self.tokens = tokens
        self.tail = tail
        self.context = context
        self.fixed_length = fixed_length
        self._last = len(blocks) - 1
        self._patches = [
            PatchedMethod(block, "forward", partial(self._block, index)) for index, block in enumerate(blocks)
        ]
        self._patches.append(PatchedMethod(head, "forward", self._head))
        self._windows: tuple[Window, ...] | None = None
        self._inference = False
        self._run: _Run | None = None

    def install(self) -> None:
        """Replaces the forwards of the blocks and the head."""
        for patch in self._patches:
            patch.install()

    def remove(self) -> None:
        """Restores them."""
        self.disarm()
        for patch in reversed(self._patches):
            patch.remove()

    def arm(self, windows: Sequence[Window], *, inference: bool = False) -> None:
        """Makes the next forwards run these windows; ``inference`` also under ``no_grad``, on altered later rows."""
        self.disarm()
        self._windows = tuple(windows) if len(set(windows)) > 1 else tuple(windows[:1])
        self._inference = inference

    def disarm(self) -> None:
        """Back to the plain network."""
        self._windows, self._run = None, None

    @property
    def output(self) -> WindowOutput | None:
        """Groups and states of the last armed forward."""
        run = self._run
        if run is None or run.hidden is None:
            return None
        return WindowOutput(run.groups, run.hidden, run.rows, run.batch)

    def _is_live(self, states: torch.Tensor) -> bool:
        return self._inference or torch.is_grad_enabled() or states.requires_grad

    def _start(self, hidden: torch.Tensor) -> None:
        assert self._windows is not None
        batch, rows = hidden.shape[0], hidden.shape[1:-1].numel()
        groups = split_batch(self._windows, batch=batch, rows=rows, tokens=self.tokens, tail=self.tail)
        if self._run is not None and (self._run.groups, self._run.rows) == (groups, rows):
            return
        whole = len(groups) == 1 and len(groups[0].window) == self.tokens
        sizes = torch.tensor([group.samples.stop - group.samples.start for group in groups], device=hidden.device)
        row = torch.arange(rows, device=hidden.device)

        def per_sample(bounds: list[int]) -> torch.Tensor:
            return torch.tensor(bounds, device=hidden.device).repeat_interleave(sizes, output_size=batch)[:, None]

        constant = None
        if self.context != "attached" and any(group.first for group in groups):
            constant = row < per_sample([group.first for group in groups])
        # A network of fixed length is given all rows: only altered ones show whether it looks at those of the future.
        later = row >= per_sample([group.stop for group in groups]) if self._inference else None
        self._run = _Run(groups, rows, batch, whole, constant, later)

    def _block(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._windows is None:
            return original(*args, **kwargs)
        hidden = take_hidden(args, kwargs)
        live = self._is_live(hidden)
        if live and index == 0:
            self._start(hidden)
        run = self._run
        if not live or run is None or run.whole:
            return original(*args, **kwargs)
        states = hidden
        if index == 0:
            if not self.fixed_length:
                states = states[:, : run.stop]
            if run.later is not None:
                states = torch.where(_select(run.later, states), 1 - states, states)
        if run.constant is not None:
            states = torch.where(_select(run.constant, states), states.detach(), states)
        stop = run.rows if self.fixed_length else run.stop
        cut_args, cut_kwargs = cut_call(args, kwargs, states, start=0, stop=stop, rows=run.rows)
        output = original(*cut_args, **cut_kwargs)
        if index == self._last and not self.fixed_length:
            # What stands between blocks and head, and may count on T rows, gets T rows.
            return map_hidden(output, lambda states: F.pad(states, (0, 0, 0, run.rows - stop)))
        return output

    def _head(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._run
        states = take_hidden(args, kwargs)
        if run is None or not self._is_live(states):
            return original(*args, **kwargs)
        rows = states.flatten(1, -2)
        windows = [rows[group.samples, group.loss_start : group.stop] for group in run.groups]
        run.hidden = tuple(windows)
        if run.whole:
            return original(*args, **kwargs)
        logits = place_rows(
            original(pack(windows)), run.groups, run.rows, fill=float("nan") if self._inference else self._fill
        )
        return logits.view(*states.shape[:-1], -1)
