# SPDX-License-Identifier: Apache-2.0
"""Stops a run on SIGTERM: finishes the batch, writes a checkpoint, and exits."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from reco_lightning.support.argument_checks import check_int
from reco_lightning.support.lightning_modules import sigterm_exception
from reco_lightning.support.media import run_folder

__all__ = ["STOPPED", "StopOnSignal", "last_checkpoint"]

STOPPED = 128 + signal.SIGTERM  # exit status, as shells have it for a process ended by SIGTERM


def last_checkpoint(trainer: pl.Trainer) -> str:
    """Returns the file that a checkpoint of this moment belongs in: the one that `--ckpt_path last` finds.

    Args:
        trainer: The trainer, set up.

    Returns:
        The file of a `ModelCheckpoint` that writes every checkpoint to `last.ckpt`, as those of the recipes do; or else
        the file that the first one last wrote under that name, or a new name in its folder;
        without such a callback `checkpoints/last.ckpt` in the run's own folder.
    """
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in callbacks:
        if callback.filename == callback.CHECKPOINT_NAME_LAST and callback.monitor is None:
            return callback.best_model_path or callback.format_checkpoint_name({})
    if callbacks:
        callback = callbacks[0]
        if not callback.last_model_path:
            name, version = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST), 1
            while callback.file_exists(name, trainer):  # of another run in the same folder
                name = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST, ver=version)
                version += 1
            callback.last_model_path = name  # is saved too, so that a resumed run goes on replacing this file
        return callback.last_model_path
    return os.path.join(run_folder(trainer), "checkpoints", "last.ckpt")


class StopOnSignal(pl.Callback):
    """On SIGTERM finishes the batch at hand, saves a checkpoint and ends the process with status 143.

    What a scheduler sends some time before it kills is then enough for no step to be lost. Of several processes any
    one may get the signal; they agree on the batch, end together, and all but the first with status 0. While a fit
    runs, this takes the place of Lightning's own handling, which saves nothing and ends with status 0. Under `test` and
    `predict` the process ends after the batch at hand: what `reco evaluate` and `reco tokenize` have written stays.

    Args:
        every_n_batches: With several processes, training batches from one agreement to the next, 1 or more; one costs
            a reduction of a single number. One process alone stops after any batch.

    Raises:
        ValueError: If `every_n_batches` is out of its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[StopOnSignal()], accelerator="cpu", logger=False)
    """

    def __init__(self, every_n_batches: int = 10) -> None:
        check_int(at_least=1, every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._told = False
        self._before: Any = None
        self._installed = False

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signal's handler."""
        self._install(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signal's handler."""
        self._install(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signal's handler."""
        self._install(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signal's handler."""
        self._install(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops where some process was told to."""
        if self._agreed(trainer, batch_idx):
            self._save(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops where some process was told to; what is left of a fit's validation is not done."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            if self._agreed(trainer, batch_idx):
                self._save(trainer)
        elif self._told:
            self._end(trainer, "before the training began")

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops; nothing is to be saved."""
        if self._told:
            self._end(trainer, "in the middle of the test; give the same command again")

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops; nothing is to be saved."""
        if self._told:
            self._end(trainer, "in the middle of the prediction; give the same command again")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the former handler back."""
        self._remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Puts the former handler back."""
        self._remove()

    def _agreed(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        if trainer.world_size == 1:
            return self._told
        if (batch_idx + 1) % self.every_n_batches:
            return False
        return trainer.strategy.reduce_boolean_decision(self._told, all=False)

    def _save(self, trainer: pl.Trainer) -> None:
        path = last_checkpoint(trainer)
        trainer.save_checkpoint(path)
        self._end(trainer, f"after step {trainer.global_step}; go on with --ckpt_path {path}")

    def _end(self, trainer: pl.Trainer, where: str) -> None:
        rank_zero_info(f"Stopped by SIGTERM {where}")
        # Lightning kills all processes that it started when one of them ends with another status than 0
        raise sigterm_exception(trainer)(STOPPED if trainer.is_global_zero else 0)

    def _install(self, trainer: pl.Trainer) -> None:
        if self._installed or threading.current_thread() is not threading.main_thread():
            return
        self._told = trainer.received_sigterm  # while the run was being set up
        self._before, self._installed = signal.signal(signal.SIGTERM, self._note), True

    def _remove(self) -> None:
        # at the end of a run without an exception Lightning has put back what was there before it
        if self._installed and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, self._before)
        self._before, self._installed = None, False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": None, "_installed": False}
