# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's tokenizer, then the same model plainly and with ReCo on the same batches."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm
from typing_extensions import override

from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.data.clips.folder import VideoItem
from reco_lightning.data.loading.resumable_loader import ResumableDataLoader
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.writer import ClipSource, TokenShardWriter
from reco_lightning.experiments.demo.clips import ViewClips, evenly
from reco_lightning.experiments.demo.progress import Recorder, quiet, stage_bar
from reco_lightning.experiments.demo.settings import Settings
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel
from reco_lightning.tokenizers.base import to_unit_range
from reco_lightning.tokenizers.vqvae import VQVAE
from reco_lightning.windowing.explain import Explanation, explain
from reco_lightning.windowing.sampler import WindowSampler

__all__ = [
    "DemoTokens",
    "Run",
    "build_model",
    "close_loggers",
    "costs",
    "make_loggers",
    "train_model",
    "train_tokenizer",
    "write_tokens",
]

_ENCODED_TOGETHER = 16  # clips


@dataclass
class Run:
    """A finished training.

    Args:
        name: `plain` or `reco`.
        model: The model with its last weights.
        recorder: Times, validation curve and kept weights.
        loggers: The run's loggers, still open; W&B runs one at a time in a process, so close them before the next.
    """

    name: str
    model: VideoModel
    recorder: Recorder
    loggers: list[Logger]


def make_loggers(folder: Path, name: str, config: dict[str, Any]) -> list[Logger]:
    """Makes the loggers: CSV, and W&B offline unless the environment variable WANDB_MODE says otherwise.

    Args:
        folder: Where the logs go.
        name: Of the run.
        config: What W&B shows as the run's config.
    """
    import wandb

    named = os.environ.get("WANDB_MODE") or "offline"
    mode: Any = {"dryrun": "offline", "run": "online"}.get(named, named)
    run = wandb.init(
        project="reco-demo",
        name=name,
        dir=folder,
        config=config,
        mode=mode,
        settings=wandb.Settings(console="off", silent=mode == "offline"),
    )
    return [CSVLogger(folder, name="csv", version=name), WandbLogger(save_dir=folder, experiment=run)]


class DemoTokens(TokenDataModule):
    """Batches of tokens, with one seed the same in the same order for every run; some of the held-out clips validate.

    Args:
        folder: Token shards.
        settings: Sizes.
        seed: Of the order.
    """

    def __init__(self, folder: Path, *, settings: Settings, seed: int) -> None:
        super().__init__(
            str(folder), batch_size=settings.batch_size, val_fraction=settings.val_fraction, split="time", seed=seed
        )
        self.val_clips = settings.val_clips

    @override
    def setup(self, stage: str) -> None:
        """Opens the shards and splits them by time."""
        super().setup(stage)
        self.val_set = Subset(self.shards, evenly(self.val_set.indices, self.val_clips))


def build_model(grid: tuple[int, int, int], *, settings: Settings, seed: int) -> VideoModel:
    """Builds the model of both runs: with one seed, the same first weights."""
    L.seed_everything(seed, verbose=False)
    network = VideoTransformer(
        vocab_size=settings.codebook_size,
        grid=grid,
        dim=settings.dim,
        depth=settings.depth,
        heads=settings.heads,
    )
    return VideoModel(network, learning_rate=settings.learning_rate, warmup_steps=settings.warmup_steps)


def costs(model: VideoModel, data: TokenDataModule, sampler: WindowSampler) -> Explanation:
    """Counts what a plain and a ReCo step on a batch of the data cost; nothing is trained."""
    with quiet():
        data.setup("fit")
        batch = default_collate([data.train_set[index] for index in range(data.batch_size)])
        return explain(model.cpu(), batch, ReCoCallback(sampler))


def train_tokenizer(
    clips: Dataset[VideoItem], held_out: Dataset[VideoItem], *, settings: Settings, seed: int, folder: Path
) -> tuple[VQVAE, float]:
    """Trains the tokenizer and measures it on held-out clips.

    Args:
        clips: Clips to train on.
        held_out: Clips to measure on.
        settings: Sizes.
        seed: Of weights and order.
        folder: Where logs and the checkpoint `tokenizer.ckpt` go.

    Returns:
        The tokenizer, and the mean PSNR of held-out clips in dB.
    """
    L.seed_everything(seed, verbose=False)
    tokenizer = VQVAE(
        codebook_size=settings.codebook_size,
        width=settings.tokenizer_width,
        decay_steps=settings.tokenizer_steps,
        seed=seed,
    )
    loader = ResumableDataLoader(clips, settings.tokenizer_batch, shuffle=True, seed=seed, drop_last=True)
    loggers = make_loggers(folder, "tokenizer", asdict(settings))
    with stage_bar(2, "Training the tokenizer", settings.tokenizer_steps) as bar, quiet():
        trainer = _trainer(settings.tokenizer_steps, folder, loggers, [Recorder(bar)])
        trainer.fit(tokenizer, loader)
        measured = trainer.validate(tokenizer, DataLoader(held_out, settings.tokenizer_batch), verbose=False)
        trainer.save_checkpoint(folder / "tokenizer.ckpt")
    close_loggers(loggers)
    return tokenizer, float(measured[0]["val/psnr"])


@torch.inference_mode()
def write_tokens(clips: ViewClips, tokenizer: VQVAE, folder: Path, *, bar: tqdm) -> None:
    """Writes the ids of all clips as token shards.

    Args:
        clips: The clips; a view counts as a file.
        tokenizer: Encodes them.
        folder: Where to.
        bar: Progress bar, counted up by clip.
    """
    side = next(iter(clips.views.values())).shape[1]
    grid = tokenizer.grid(clips.frames, side, side)
    sources = [ClipSource(name, start, start + clips.frames) for name, start in clips.places]
    with TokenShardWriter(folder, vocab_size=tokenizer.codebook_size, grid=grid, tokenizer="VQVAE") as writer:
        for start in range(0, len(clips), _ENCODED_TOGETHER):
            part = range(start, min(start + _ENCODED_TOGETHER, len(clips)))
            video = torch.stack([clips[index]["video"] for index in part]).to(tokenizer.device)
            ids = tokenizer.encode(to_unit_range(video)).cpu().numpy()
            writer.write(ids, np.zeros(len(part), np.int64), sources[part.start : part.stop])
            bar.update(len(part))


def train_model(
    name: str,
    data: TokenDataModule,
    *,
    grid: tuple[int, int, int],
    settings: Settings,
    seed: int,
    folder: Path,
    steps: int,
    sampler: WindowSampler | None = None,
) -> Run:
    """Trains the model: plainly, or with ReCo where a sampler is given; nothing else differs.

    Args:
        name: Of the run.
        data: Its batches.
        grid: (t, h, w) of the tokens.
        settings: Sizes.
        seed: Of weights and order.
        folder: Where logs and the checkpoint go.
        steps: Steps; the weights at ``settings.steps`` are kept too.
        sampler: Windows of ReCo.

    Returns:
        The run, its loggers still open.
    """
    model = build_model(grid, settings=settings, seed=seed)
    loggers = make_loggers(folder, name, {**asdict(settings), "steps": steps, "windows": repr(sampler)})
    title = "Training plainly" if sampler is None else "Training with ReCo"
    with stage_bar(4 if sampler is None else 6, title, steps) as bar, quiet():
        recorder = Recorder(bar, keep=(settings.steps, steps))
        callbacks: list[L.Callback] = [recorder] if sampler is None else [recorder, ReCoCallback(sampler)]
        every = max(1, settings.steps // settings.validations)
        trainer = _trainer(steps, folder, loggers, callbacks, val_every=every)
        trainer.fit(model, datamodule=data)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return Run(name, model, recorder, loggers)


def close_loggers(loggers: list[Logger]) -> None:
    """Ends the runs, W&B's too: the next one in this process is a run of its own."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _trainer(
    steps: int, folder: Path, loggers: list[Logger], callbacks: list[L.Callback], *, val_every: int | None = None
) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=loggers,
        callbacks=callbacks,
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
