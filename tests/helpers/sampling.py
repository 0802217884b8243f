# SPDX-License-Identifier: Apache-2.0
"""Sampling through the trainer in one process or in several.

Run as ``python -m tests.helpers.sampling CASE CHECKPOINT TOKENIZER OUTPUT PROCESSES``; Lightning starts the other
processes by the same line.
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from reco_lightning import SampleVideos, VideoModel
from reco_lightning.pipelines.predict.requests import GenerationRequests
from reco_lightning.pipelines.predict.video_writer import VideoWriter
from reco_lightning.support.checkpoints import load_module


def predict(checkpoint: str, tokenizer: str | None, output: str, processes: int = 1, **options: object) -> pl.Trainer:
    """Samples five videos."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[VideoWriter(tokenizer, output=output)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    arguments = {"n": 5, "labels": [2, 0], "seed": 3, "length": 5, "context_blocks": 1, "batch_size": 2}
    requests = GenerationRequests(**{**arguments, **options})  # type: ignore[arg-type]
    trainer.predict(load_module(checkpoint, VideoModel), datamodule=requests, return_predictions=False)
    return trainer


def fit_sharded(checkpoint: str, tokenizer: str, output: str, processes: int) -> None:
    """Trains two steps of a network that is sharded over the processes, with clips after each."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ModelParallelStrategy(processes, 1),
        callbacks=[SampleVideos(tokenizer, every_n_steps=1, n=2)],
        max_steps=2,
        default_root_dir=output,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = load_module(checkpoint, VideoModel)
    tokens = model.network.num_tokens
    samples = [{"tokens": torch.arange(tokens) % 8, "label": torch.tensor(0)}] * 4
    trainer.fit(model, torch.utils.data.DataLoader(samples, batch_size=1))


if __name__ == "__main__":
    case, checkpoint, tokenizer, output, processes = sys.argv[1:]
    {"predict": predict, "fit": fit_sharded}[case](checkpoint, tokenizer, output, int(processes))
