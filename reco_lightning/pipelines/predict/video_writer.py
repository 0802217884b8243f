# SPDX-License-Identifier: Apache-2.0
"""The callback that writes predicted tokens as video files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from typing_extensions import override

from reco_lightning.models.sampling.decoding import decode_videos
from reco_lightning.support.argument_checks import check_path
from reco_lightning.support.media import check_fps, write_video
from reco_lightning.tokenizers.base import VideoTokenizer
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["VideoWriter"]


class VideoWriter(BasePredictionWriter):
    """Writes what `VideoModel.predict_step` samples, as soon as it is there: `0000.npy` and `0000.mp4` for video 0.

    Ids are (L, h, w) int64. Each process writes its own videos.

    Args:
        tokenizer: Checkpoint or folder of the tokenizer that made the training tokens; ``None`` writes ids alone.
        output: Folder; made if missing. Files of the same names are replaced.
        fps: Frames per second of the mp4 files.

    Raises:
        ValueError: If ``tokenizer`` holds none, or one without all the model's ids.

    Example:
        >>> VideoWriter("vqvae.ckpt", output="outputs/samples").interval.on_batch
        True
    """

    def __init__(self, tokenizer: str | None = None, *, output: str = "outputs/samples", fps: float = 8.0) -> None:
        super().__init__(write_interval="batch")
        check_path(output=output)
        check_path(tokenizer=tokenizer, or_none=True)
        check_fps(fps)
        self.tokenizer, self.output, self.fps = tokenizer, output, fps
        self._decoder: VideoTokenizer | None = None

    @override
    def setup(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stage: Literal["fit", "validate", "test", "predict"] | str,
    ) -> None:
        """Loads the tokenizer, so that a wrong path is known before the first video."""
        if stage != "predict":
            return
        Path(self.output).mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            network: Any = pl_module.network
            self._decoder = load_tokenizer(self.tokenizer, vocab_size=network.vocab_size)

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes the videos of one batch."""
        network: Any = pl_module.network
        indices, ids = prediction["index"].tolist(), prediction["tokens"]
        shaped = ids.view(len(ids), -1, *network.grid[1:])  # (B, L, h, w)
        for index, tokens in zip(indices, shaped.cpu().numpy(), strict=True):
            np.save(Path(self.output, f"{index:04d}.npy"), tokens)
        if self._decoder is None:
            return
        if isinstance(self._decoder, nn.Module):
            self._decoder.to(pl_module.device)
        context = batch["options"]["context_blocks"]
        clips = decode_videos(self._decoder, ids, network.grid, context_blocks=context)
        for index, clip in zip(indices, clips.cpu().numpy(), strict=True):
            write_video(Path(self.output, f"{index:04d}.mp4"), clip, fps=self.fps)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drops the tokenizer."""
        self._decoder = None
