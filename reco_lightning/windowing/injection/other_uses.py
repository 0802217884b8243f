# SPDX-License-Identifier: Apache-2.0
"""Finds what a step makes of its states and logits besides the network's cross-entropy: losses, and logged values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from reco_lightning.support.lightning_modules import loss_of
from reco_lightning.windowing.injection.autograd_graph import depends
from reco_lightning.windowing.injection.derived_values import DerivedValues
from reco_lightning.windowing.injection.dry_run import DryRun

if TYPE_CHECKING:
    from reco_lightning.windowing.injection.step_trace import Trace

__all__ = ["OtherUses"]


class OtherUses:
    """Watches one plain run of a step, beside the trace.

    Attributes:
        derived: What is computed of the states that leave the blocks.
        logged: Names of the functions that made a logged value of them, by key.
        returned: Whether the step returned a loss.
    """

    def __init__(self) -> None:
        self.derived = DerivedValues()
        self.logged: dict[str, str] = {}
        self.returned = False
        self._roots: dict[str, torch.Tensor] = {}
        self._rows: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []

    def root(self, blocks: str, states: torch.Tensor) -> torch.Tensor:
        """Returns the states that leave a stack of blocks as the beginning of a graph, and follows them."""
        root = states.detach().requires_grad_()
        self._roots[blocks] = root
        self.derived.follow(root)
        return root

    def cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes the network's cross-entropy without a way back to the states, so that all other ways show."""
        losses = F.cross_entropy(logits.detach(), target, *args, **kwargs).requires_grad_()
        if losses.ndim:
            self._rows = losses
        return losses

    def log(self, name: str, value: Any) -> None:
        """Stands in for the module's log."""
        if names := self.derived.names(value):
            self.logged[name] = names

    def take(self, result: Any, *, returned: bool = False) -> None:
        """Takes the loss that the step returns, or that it runs the backward pass of."""
        loss = loss_of(result)
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss)
            self.returned = self.returned or returned

    def problems(self, dry_run: DryRun, trace: Trace, modules: Mapping[str, torch.Tensor]) -> list[str]:
        """Says why a loss is more than a weighted sum of the rows' cross-entropies and what knows no state.

        Args:
            dry_run: Where the step can be run again.
            trace: What the trace found.
            modules: Outputs of the modules behind the blocks, by name.
        """
        root = self._roots[trace.blocks]
        for loss in self._losses:
            if loss.requires_grad and depends(loss, root):
                behind = [name for name, output in modules.items() if depends(loss, output)]
                return [
                    f"the loss depends on the states of the blocks '{trace.blocks}' besides the cross-entropy of the "
                    f"head '{trace.head}', by {self.derived.names(loss) or 'other functions'} (modules {behind}); "
                    "outside the window there are neither states nor logits: take that term out, or compute it from "
                    "a forward of its own"
                ]
        if self._rows is None or not self._losses or self._is_weighted_sum(dry_run, trace.call, self._rows):
            return []
        return [
            "the loss is no weighted sum of the losses that F.cross_entropy(reduction='none') gives (a focal loss, a "
            "choice of the hardest rows): of rows outside the window there are none; use weights that do not depend on "
            "the losses, or another reduction"
        ]

    def _is_weighted_sum(self, dry_run: DryRun, call: int, rows: torch.Tensor) -> bool:
        """Runs the step again with other losses of the rows: what is lost or won must be theirs, by their weights."""
        loss = self._losses[0]
        (weights,) = torch.autograd.grad(loss.sum(), rows, allow_unused=True)
        if weights is None:
            return True
        factors = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        other, calls = rows.detach() * factors.to(rows.device, rows.dtype), 0
        again: list[Any] = []

        def cross_entropy(*args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return other.clone() if calls == call + 1 else F.cross_entropy(*args, **kwargs)

        with torch.no_grad():
            again.append(loss_of(dry_run.run(cross_entropy, manual_backward=again.append)))
        found, expected = (again[0] - loss).sum(), (weights * (other - rows)).sum()
        return bool(torch.isclose(found.float(), expected.float(), rtol=1e-3, atol=1e-5))
