# SPDX-License-Identifier: Apache-2.0
"""Finds what a step makes of its states and logits besides the network's cross-entropy: losses, and logged values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from reco_lightning.support.lightning_modules import loss_of
from reco_lightning.windowing.injection.autograd_graph import depends
from reco_lightning.windowing.injection.derived_values import DerivedValues
from reco_lightning.windowing.injection.dry_run import DryRun
from reco_lightning.windowing.losses.cross_entropy import read_options

if TYPE_CHECKING:
    from reco_lightning.windowing.injection.loss_calls import LossCall, MetLoss
    from reco_lightning.windowing.injection.step_trace import Trace

__all__ = ["OtherUses"]


class OtherUses:
    """Watches one plain run of a step, beside the trace.

    Attributes:
        derived: What is computed of the states that leave the blocks.
        logged: Names of the functions that made a logged value of them, by key.
        returned: Whether the step returned a loss.
        roots: The states that left each stack of blocks, by its name.
    """

    def __init__(self) -> None:
        self.derived = DerivedValues()
        self.logged: dict[str, str] = {}
        self.returned = False
        self.roots: dict[str, torch.Tensor] = {}
        self._entropies: dict[int, torch.Tensor] = {}  # of the network, by the number of their call
        self._divisors: dict[int, int] = {}  # what makes means of them
        self._losses: list[torch.Tensor] = []

    def root(self, blocks: str, states: torch.Tensor) -> torch.Tensor:
        """Returns the states that leave a stack of blocks as the beginning of a graph, and follows them."""
        root = states.detach().requires_grad_()
        self.roots[blocks] = root
        self.derived.follow(root)
        return root

    def cross_entropy(self, loss: MetLoss, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Computes a cross-entropy of the network without a way back to the states, so that all other ways show."""
        options = read_options(args, kwargs)
        entropy: torch.Tensor = loss.function(loss.logits.detach(), loss.target, **options).requires_grad_()
        counted = int((loss.target != options["ignore_index"]).sum()) if options["reduction"] == "sum" else 1
        self._entropies[loss.number], self._divisors[loss.number] = entropy, max(counted, 1)
        return entropy

    def weights(self, calls: Sequence[LossCall]) -> list[float]:
        """Returns how much each mean counts in what the step makes of several cross-entropies; 1 of a single one."""
        used = [loss for loss in self._losses if loss.requires_grad]
        if len(calls) == 1 or not used:
            return [1.0] * len(calls)
        entropies = [self._entropies[call.number] for call in calls]
        total = torch.stack([loss.sum() for loss in used]).sum()
        gradients = torch.autograd.grad(total, entropies, retain_graph=True, allow_unused=True)
        return [
            0.0 if gradient is None else float(gradient.sum()) * self._divisors[call.number]
            for gradient, call in zip(gradients, calls, strict=True)
        ]

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

    @property
    def has_loss(self) -> bool:
        """Whether the step returned a loss, or ran the backward pass of one."""
        return bool(self._losses)

    def problems(self, dry_run: DryRun, trace: Trace, modules: Mapping[str, torch.Tensor]) -> list[str]:
        """Says why a loss is more than a weighted sum of the rows' cross-entropies and what knows no state.

        Args:
            dry_run: Where the step can be run again.
            trace: What the trace found.
            modules: Outputs of the modules behind the blocks, by name.
        """
        root = self.roots[trace.blocks]
        cross_entropy = f"the cross-entropy of the head '{trace.head}'" if trace.head else "its cross-entropy"
        for loss in self._losses:
            if loss.requires_grad and depends(loss, root):
                behind = [name for name, output in modules.items() if output.requires_grad and depends(loss, output)]
                return [
                    f"the loss depends on the states of the blocks '{trace.blocks}' besides {cross_entropy}, by "
                    f"{self.derived.names(loss) or 'other functions'} (modules {behind}); outside the window there "
                    "are neither states nor logits: take that term out, or compute it from a forward of its own"
                ]
        if names := ", ".join(filter(None, map(self.derived.names, self._losses))):
            return [
                f"the loss is computed of the states inside the blocks '{trace.blocks}', or of numbers from states or "
                f"logits, by {names}; a windowed step has those of its window alone: take that term out, or compute it "
                "from a forward of its own"
            ]
        by_row = [call.number for call in trace.calls if self._entropies[call.number].ndim]
        if not self._losses or all(self._is_weighted_sum(dry_run, number) for number in by_row):
            return []
        return [
            "the loss is no weighted sum of the losses that F.cross_entropy(reduction='none') gives (a focal loss, a "
            "choice of the hardest rows): of rows outside the window there are none; use weights that do not depend on "
            "the losses, or another reduction"
        ]

    def _is_weighted_sum(self, dry_run: DryRun, number: int) -> bool:
        """Runs the step again with other losses of the rows: what is lost or won must be theirs, by their weights."""
        loss, rows = self._losses[0], self._entropies[number]
        (weights,) = torch.autograd.grad(loss.sum(), rows, retain_graph=True, allow_unused=True)
        if weights is None:
            return True
        factors = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        other, calls = rows.detach() * factors.to(rows.device, rows.dtype), 0
        again: list[Any] = []

        def cross_entropy(*args: Any, function: Any = F.cross_entropy, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return other.clone() if calls == number + 1 else function(*args, **kwargs)

        with torch.no_grad():
            again.append(loss_of(dry_run.run(cross_entropy, manual_backward=again.append)))
        found, expected = (again[0] - loss).sum(), (weights * (other - rows)).sum()
        return bool(torch.isclose(found.float(), expected.float(), rtol=1e-3, atol=1e-5))
