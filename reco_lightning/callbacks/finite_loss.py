# SPDX-License-Identifier: Apache-2.0
"""Stops training when the loss becomes NaN or infinite, and reports step, window and the first bad parameter."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.support.argument_checks import check_int
from reco_lightning.support.lightning_modules import loss_of
from reco_lightning.windowing.sampler import Window

__all__ = ["FiniteLoss", "first_not_finite"]


def first_not_finite(module: torch.nn.Module) -> tuple[str | None, str | None]:
    """Finds where values that are not finite show first.

    Args:
        module: Any; of sharded parameters this process's part is looked at.

    Returns:
        Names of the first parameter and of the first parameter whose gradient is not finite; None where all are.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.bias.grad = torch.tensor([1.0, float("inf")])
        >>> first_not_finite(layer)
        (None, 'bias')
    """
    weight = gradient = None
    for name, parameter in module.named_parameters():
        if weight is None and not _finite(parameter):
            weight = name
        if gradient is None and parameter.grad is not None and not _finite(parameter.grad):
            gradient = name
    return weight, gradient


class FiniteLoss(pl.Callback):
    """Ends the fit when a training loss is NaN or infinite, and keeps such weights out of all checkpoints.

    Losses are kept on their device and looked at every few batches, so that the processor never waits for one; before
    every checkpoint they are looked at too: the last checkpoint is from before the first such loss.

    Args:
        every_n_batches: Batches from one look to the next, 1 or more. With 1, the message also names the gradients of
            the very step.

    Raises:
        ValueError: If `every_n_batches` is out of its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FiniteLoss()], accelerator="cpu", logger=False)
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        check_int(at_least=1, every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._seen: list[tuple[str, tuple[Window, ...], Tensor]] = []  # place, windows, loss; not looked at yet

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the losses of an earlier fit."""
        self._seen = []

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss, and looks where it is time to."""
        loss = loss_of(outputs)
        if isinstance(loss, Tensor):
            place = f"batch {batch_idx} of epoch {trainer.current_epoch} (step {trainer.global_step})"
            self._seen.append((place, _windows(trainer), loss.detach()))
        if len(self._seen) >= self.every_n_batches:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at what is left of the epoch."""
        self._look(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks before a checkpoint is written."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seen, self._seen = self._seen, []
        if not seen:
            return
        finite = torch.stack([loss.float().mean() for _, _, loss in seen]).isfinite().tolist()
        if all(finite):
            return
        where, windows, loss = seen[finite.index(False)]
        if windows:
            where += f", tokens {', '.join(f'{each.start} to {each.stop - 1}' for each in windows)}"
        weight, gradient = first_not_finite(module)
        raise FloatingPointError(
            f"the training loss must be finite, got {float(loss.float().mean())} at {where}; first parameter that is "
            f"not: {weight or 'none'}; first gradient that is not: {gradient or 'none'}. No checkpoint was written "
            "since: resume from the last one with a lower learning rate or trainer.gradient_clip_val, or find the "
            "operation with trainer.detect_anomaly=True"
        )


def _windows(trainer: pl.Trainer) -> tuple[Window, ...]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each.windows for each in callbacks if isinstance(each, ReCoCallback)), ())


def _finite(values: Tensor) -> bool:
    local = values.to_local() if hasattr(values, "to_local") else values  # FSDP2's
    return bool(local.detach().isfinite().all())
