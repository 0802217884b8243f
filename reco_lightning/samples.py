# SPDX-License-Identifier: Apache-2.0
"""Shows during training what a model generates: clips as mp4 files, and in every logger that can show videos."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from reco_lightning.generation import generate
from reco_lightning.media import log_videos, run_folder, video_grid, write_video
from reco_lightning.models.video_model import VideoModel
from reco_lightning.tokenizers.base import VideoTokenizer, to_uint8
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["SampleVideos"]


class SampleVideos(pl.Callback):
    """Generates clips every few epochs, writes them as one mp4, and logs it as ``samples``.

    Draws come from a generator of their own: a run with this callback trains as one without. The files lie in
    ``samples`` in the run's own folder (see ``reco_lightning.media.run_folder``).

    Args:
        tokenizer: Checkpoint or folder of the tokenizer that made the training tokens, any that ``load_tokenizer``
            takes; ``None`` generates nothing and says so.
        every_n_epochs: Epochs from one set of clips to the next, 1 or more.
        n: Number of clips, 1 or more.
        temperature: As in ``generate``.
        top_k: As in ``generate``.
        seed: Of the draws; the same in every set, so that sets can be compared.
        fps: Frames per second of the mp4.

    Raises:
        ValueError: If an argument is out of its range, or ``tokenizer`` holds none, or one without all the model's ids.

    Example:
        >>> SampleVideos("vqvae.ckpt", every_n_epochs=5).every_n_epochs
        5
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        *,
        every_n_epochs: int = 10,
        n: int = 4,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        fps: float = 8.0,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("n", n)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.tokenizer = tokenizer
        self.every_n_epochs = every_n_epochs
        self.n = n
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self.fps = fps
        self._decoder: VideoTokenizer | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the tokenizer, so that a wrong path is known before the first step."""
        if self.tokenizer is None:
            rank_zero_info("SampleVideos: no videos, since tokenizer is None; set it to the tokenizer's path")
            return
        if not isinstance(pl_module, VideoModel):
            raise MisconfigurationException(f"SampleVideos generates from a VideoModel, got {type(pl_module).__name__}")
        self._decoder = None
        if trainer.is_global_zero:
            self._decoder = load_tokenizer(self.tokenizer, vocab_size=pl_module.network.vocab_size)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generates, writes and logs, on the first process alone."""
        if self._decoder is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        assert isinstance(pl_module, VideoModel)
        ids = generate(pl_module, self.n, temperature=self.temperature, top_k=self.top_k, seed=self.seed)
        if self._decoder.frame_aligned:
            ids = ids.view(self.n, *pl_module.network.grid)
        with torch.no_grad():
            clips = self._decoder.decode(ids.cpu(), clamp=True)
        path = Path(run_folder(trainer), "samples", f"step-{trainer.global_step:08d}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, video_grid(to_uint8(clips).numpy(), columns=min(self.n, 4)), fps=self.fps)
        log_videos(trainer, "samples", [path], trainer.global_step)
