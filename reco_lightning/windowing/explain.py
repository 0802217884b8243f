# SPDX-License-Identifier: Apache-2.0
"""``explain``: reports the choice of network, blocks, head and engine, and the cost of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from reco_lightning.windowing.cost import count_hidden_operations, count_operations, count_saved_bytes
from reco_lightning.windowing.injection.dry_run import DryRun, StepEndedError
from reco_lightning.windowing.injection.engine_selection import Selection
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.sampler import Window
from reco_lightning.windowing.settings import ReCoSettings, StepKind, check_lightning_module

if TYPE_CHECKING:
    from reco_lightning.callbacks.reco import ReCoCallback

__all__ = ["Explanation", "WindowCost", "explain"]


@dataclass(frozen=True)
class WindowCost:
    """The cost of a step on one window.

    Args:
        window: The window.
        probability: The share of the training's steps that are of this kind.
        operations: Floating-point operations, forward and backward.
        saved_bytes: Bytes kept for the backward pass.
        hidden_operations: Those of ``operations`` that attention has for pairs which its mask hides; kernels of causal
            attention leave them out.
        attached: Tokens in front of the window that are trained through.
    """

    window: Window
    probability: float
    operations: int
    saved_bytes: int
    hidden_operations: int = 0
    attached: int = 0


@dataclass(frozen=True)
class Explanation:
    """The engine and costs of ``ReCoCallback`` on a module and batch; ``print`` shows them as text.

    Args:
        engine: Name of the engine.
        network: Name of the network, ``""`` for the LightningModule itself.
        blocks: Name of the list of blocks.
        head: Name of the module that makes the logits, of each if there are several; ``"linear()"`` where a function
            does, ``""`` where several parts do together.
        prefix_tokens: Rows in front of the video tokens.
        error: Largest relative difference of plain and windowed states, ``None`` without a proof.
        report: One line on the choice.
        plain_operations: Floating-point operations of the plain step.
        plain_saved_bytes: Bytes that the plain step keeps for its backward pass.
        windows: The cost of each window.
        plain_hidden_operations: Those of ``plain_operations`` that attention has for pairs which its mask hides.
    """

    engine: str
    network: str
    blocks: str
    head: str
    prefix_tokens: int
    error: float | None
    report: str
    plain_operations: int
    plain_saved_bytes: int
    windows: tuple[WindowCost, ...]
    plain_hidden_operations: int = 0

    @property
    def operations(self) -> float:
        """Floating-point operations of a windowed step, averaged over the sampler."""
        return sum(cost.probability * cost.operations for cost in self.windows)

    @property
    def saved_bytes(self) -> float:
        """Bytes that a windowed step keeps for its backward pass, averaged over the sampler."""
        return sum(cost.probability * cost.saved_bytes for cost in self.windows)

    @property
    def hidden_operations(self) -> float:
        """Operations of a windowed step for pairs which a mask hides, averaged over the sampler."""
        return sum(cost.probability * cost.hidden_operations for cost in self.windows)

    def __str__(self) -> str:
        lines = [
            self.report,
            "",
            f"{'step':<22}{'share':>7}{'GFLOP':>12}{'of plain':>10}{'saved MiB':>12}{'of plain':>10}",
        ]

        def line(name: str, share: float, operations: float, saved: float) -> str:
            return (
                f"{name:<22}{share:>7.3f}{operations / 1e9:>12.3f}{operations / self.plain_operations:>10.3f}"
                f"{saved / 2**20:>12.2f}{saved / self.plain_saved_bytes:>10.3f}"
            )

        lines.append(line("plain", 1.0, self.plain_operations, self.plain_saved_bytes))
        for cost in self.windows:
            name = f"tokens {cost.window.start}-{cost.window.stop}" + (f" +{cost.attached}" if cost.attached else "")
            lines.append(line(name, cost.probability, cost.operations, cost.saved_bytes))
        lines.append(line("mean over the sampler", 1.0, self.operations, self.saved_bytes))
        return "\n".join(lines)


def explain(module: pl.LightningModule, batch: Any, callback: ReCoCallback, *, batch_idx: int = 0) -> Explanation:
    """Says which network, blocks, head and engine a callback would use, and what a step would cost.

    The module's ``training_step`` is run, up to its loss, on the batch as it is given; weights, buffers and random
    states are as before afterwards, and no trainer is needed.

    Args:
        module: The LightningModule.
        batch: A training batch, on the module's device.
        callback: The callback with its sampler and settings; it is not installed.
        batch_idx: The index that ``training_step`` is given.

    Returns:
        The choice, its reason and the costs.

    Raises:
        MisconfigurationException: If the module cannot be windowed exactly, with the reason.

    Example:
        >>> from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
        >>> model = VideoModel(VideoTransformer(vocab_size=32, grid=(5, 2, 2), dim=32, depth=2, heads=2))
        >>> batch = {"tokens": torch.randint(32, (2, 20)), "label": torch.zeros(2, dtype=torch.long)}
        >>> found = explain(model, batch, ReCoCallback(WindowSampler(5, 4)))
        >>> found.blocks, found.head, found.prefix_tokens, found.operations < found.plain_operations / 2
        ('network.blocks', 'network.head', 1, True)
    """
    settings = getattr(callback, "settings", None)
    if not isinstance(settings, ReCoSettings):
        raise ValueError(f"callback must be a ReCoCallback, got {callback!r}")

    def step() -> Any:
        return module.training_step(copy.copy(batch), batch_idx)

    check_lightning_module(module)
    selection = settings.select(module, step)
    dry_run = DryRun(module, step, evaluated=[])
    plain = _cost(module, dry_run, selection, None)
    costs = []
    selection.engine.install()
    try:
        for kind in settings.step_kinds:
            measured = _cost(module, dry_run, selection, (settings, kind))
            costs.append(
                WindowCost(kind.window, kind.probability, *measured, attached=min(kind.attached, kind.window.start))
            )
    finally:
        selection.engine.remove()
    trace = selection.trace
    return Explanation(
        engine=selection.engine.name,
        network=trace.network,
        blocks=trace.blocks,
        head=trace.head,
        prefix_tokens=trace.layout(settings.sampler.tokens).prefix(trace.rows),
        error=selection.error,
        report=selection.report,
        plain_operations=plain[0],
        plain_saved_bytes=plain[1],
        windows=tuple(costs),
        plain_hidden_operations=plain[2],
    )


def _cost(
    module: pl.LightningModule, dry_run: DryRun, selection: Selection, on: tuple[ReCoSettings, StepKind] | None
) -> tuple[int, int, int]:
    def loss() -> torch.Tensor:
        losses: list[torch.Tensor] = []
        calls = 0
        windowed: Callable[..., torch.Tensor] | None = None
        if on is not None:
            settings, kind = on
            windowed = Injection(selection.engine, selection.trace, settings.continuity).cross_entropy
            selection.engine.activate([kind.window], attached=kind.attached)
        numbers = {call.number for call in selection.trace.calls}

        def end(*args: Any, function: Any = F.cross_entropy, **kwargs: Any) -> Any:
            nonlocal calls
            value = windowed(*args, function=function, **kwargs) if windowed else function(*args, **kwargs)
            if calls in numbers:
                losses.append(value.mean())
            if len(losses) == len(numbers):
                raise StepEndedError
            calls += 1
            return value

        with torch.enable_grad():
            dry_run.run(end, None if on is None else selection.engine.handlers)
        return torch.stack(losses).sum()

    parameters = list(module.parameters())
    try:
        operations, saved_bytes = count_operations(loss, parameters), count_saved_bytes(loss, parameters)
        return operations, saved_bytes, count_hidden_operations(loss)
    finally:
        if on is not None:
            selection.engine.deactivate()
