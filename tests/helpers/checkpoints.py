# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of modules that were not trained."""

from __future__ import annotations

import os

import lightning.pytorch as pl


def save(module: pl.LightningModule, path: str | os.PathLike[str]) -> str:
    """Writes a checkpoint as a trainer does, and returns its path."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)
