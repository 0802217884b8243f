# SPDX-License-Identifier: Apache-2.0
"""Plots the loss by token position every few epochs, to any logger or as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from reco_lightning.metrics.own_samples import generated_batches
from reco_lightning.metrics.position_loss import PositionLoss, measure_position_loss
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.argument_checks import check_int
from reco_lightning.support.media import run_folder
from reco_lightning.support.plots import log_figure, position_cross_entropy

__all__ = ["PositionLossProfile"]


class PositionLossProfile(pl.Callback):
    """Draws the cross-entropy by token position on the validation data every few epochs, as ``position_loss``.

    The curve's mean is ``val/loss`` where all batches are full. With ``generated``, the same model's loss on clips of
    its own and on clips that it continues from a true first frame stand beside it (arXiv 2604.07402, Figures 8 to 10).
    It runs the network once more on the validation batches, and leaves the weights, modes and random numbers of the
    training as they were: a run with it trains as one without. The files lie in ``figures`` in the run's own folder
    (see ``reco_lightning.support.media.run_folder``).

    Args:
        every_n_epochs: Epochs from one figure to the next, 1 or more.
        batches: Validation batches that are measured, from the first on; ``None`` takes all.
        generated: Clips that each process generates for the two further curves; 0 leaves them out.
        seed: Of those clips' draws; the same in every figure, so that figures can be compared.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> PositionLossProfile(every_n_epochs=5).every_n_epochs
        5
    """

    def __init__(
        self, *, every_n_epochs: int = 10, batches: int | None = None, generated: int = 0, seed: int = 0
    ) -> None:
        check_int(at_least=1, every_n_epochs=every_n_epochs)
        check_int(at_least=0, generated=generated)
        check_int(seed=seed)
        check_int(at_least=1, or_none=True, batches=batches)
        self.every_n_epochs = every_n_epochs
        self.batches = batches
        self.generated = generated
        self.seed = seed
        self._metric: PositionLoss | None = None
        self._given: list[dict[str, Tensor]] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a module whose tokens it does not know."""
        if not isinstance(pl_module, VideoModel):
            found = type(pl_module).__name__
            raise MisconfigurationException(
                f"PositionLossProfile measures a VideoModel, got {found}; feed a metrics.PositionLoss in its own "
                "validation_step instead"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says so where nothing will be drawn."""
        if not trainer.num_val_batches or not sum(trainer.num_val_batches):
            rank_zero_info("PositionLossProfile: no figures, since there are no validation batches")

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins a curve, where one is due."""
        self._metric, self._given = None, []
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.sanity_checking and isinstance(pl_module, VideoModel):
            self._metric = PositionLoss.of(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch of the first validation set."""
        if self._metric is None or dataloader_idx or (self.batches is not None and batch_idx >= self.batches):
            return
        assert isinstance(pl_module, VideoModel)
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            measure_position_loss(pl_module, [batch], metric=self._metric)
        missing = self.generated - sum(len(given["tokens"]) for given in self._given)
        if missing > 0:
            self._given.append({name: batch[name][:missing] for name in ("tokens", "label") if name in batch})

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, writes and logs the profile; the processes' sums are joined."""
        if self._metric is None:
            return
        assert isinstance(pl_module, VideoModel)
        curves = {"data": self._metric}
        if self._given:
            names = ["generated", "generated after a true first frame"]
            if len(pl_module.network.grid) != 3:
                del names[1]  # no ids are those of the first frame
            first = trainer.global_rank * self.generated
            with isolate_rng(), trainer.precision_plugin.val_step_context():
                for blocks, name in enumerate(names):
                    made = generated_batches(
                        pl_module, self._given, given_blocks=blocks, seed=self.seed, first_index=first
                    )
                    curves[name] = measure_position_loss(pl_module, made)
        values = {name: metric.compute()["position"].cpu().numpy() for name, metric in curves.items()}
        per_block = self._metric.tokens_per_block
        self._metric, self._given = None, []
        if trainer.is_global_zero:
            fig, _ = position_cross_entropy(values, per_block, y_label="cross-entropy (nats)")
            path = Path(run_folder(trainer), "figures", f"position-loss-step-{trainer.global_step:08d}.png")
            log_figure(trainer, "position_loss", fig, path)
