# SPDX-License-Identifier: Apache-2.0
"""Generates videos during training, as mp4 files and in every logger that can show them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from reco_lightning.models.sampling.decoding import decode_videos
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.argument_checks import check_int, check_path
from reco_lightning.support.media import check_fps, log_videos, run_folder, video_grid, write_video
from reco_lightning.tokenizers.base import VideoTokenizer
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["SampleVideos"]


class SampleVideos(pl.Callback):
    """Generates clips every few steps or epochs, writes them as one mp4, and logs it as ``samples``.

    The random state of the run is left as it was: a run with this callback trains as one without, bitwise on a CPU. The
    files lie in ``samples`` in the run's own folder (see ``reco_lightning.support.media.run_folder``); W&B gets them as
    videos, TensorBoard as strips of frames.

    A file that the disk refuses is left out with a warning: the training goes on.

    The first process samples while the others wait, unless the network is sharded (FSDP2): then all sample the same.

    Args:
        tokenizer: Checkpoint or folder of the tokenizer that made the training tokens, any that ``load_tokenizer``
            takes; ``None`` generates nothing and says so.
        every_n_epochs: Epochs from one set of clips to the next, 1 or more; without effect where ``every_n_steps`` is
            given.
        every_n_steps: Optimizer steps from one set of clips to the next, 1 or more.
        n: Number of clips, 1 or more.
        label: Class of all clips; ``None`` is no particular class.
        fps: Frames per second of the mp4.
        sampling: The fields of `VideoSamplingOptions` by name. Every set draws with the same ``seed``, so that sets can
            be compared.

    Raises:
        ValueError: If an argument is out of its range, or ``tokenizer`` holds none, or one without all the model's ids.

    Example:
        >>> SampleVideos("vqvae.ckpt", every_n_steps=500).every_n_steps
        500
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        *,
        every_n_epochs: int = 10,
        every_n_steps: int | None = None,
        n: int = 4,
        label: int | None = None,
        fps: float = 8.0,
        **sampling: Any,
    ) -> None:
        check_path(tokenizer=tokenizer, or_none=True)
        check_int(at_least=1, every_n_epochs=every_n_epochs, n=n)
        check_int(at_least=1, or_none=True, every_n_steps=every_n_steps)
        check_int(at_least=0, or_none=True, label=label)
        check_fps(fps)
        self.tokenizer = tokenizer
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.n = n
        self.fps = fps
        options = VideoSamplingOptions(**sampling)  # in a line of its own: jsonargparse reads the options' names off it
        self.options: dict[str, Any] = {"condition": label, **asdict(options)}
        self._decoder: VideoTokenizer | None = None
        self._last_step = 0

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
            with isolate_rng():  # a tokenizer draws fresh weights before it loads its own
                self._decoder = load_tokenizer(self.tokenizer, vocab_size=pl_module.network.vocab_size)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the step that a resumed run begins at."""
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Makes a set of clips where a multiple of ``every_n_steps`` has been reached."""
        if self.every_n_steps is None:
            return
        last, self._last_step = self._last_step, trainer.global_step  # more than 1 apart with several optimizers
        if self._last_step // self.every_n_steps > last // self.every_n_steps:
            self._sample(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes a set of clips every ``every_n_epochs``."""
        if self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generates; the first process also writes and logs."""
        if self.tokenizer is None:
            return
        assert isinstance(pl_module, VideoModel)
        sharded = isinstance(pl_module.network, FSDPModule)  # whose forward needs all processes
        if self._decoder is None and not sharded:
            return
        with isolate_rng():
            ids = generate(pl_module, self.n, **self.options)
            if self._decoder is None:
                return
            clips = decode_videos(self._decoder, ids, pl_module.network.grid)
            path = Path(run_folder(trainer), "samples", f"step-{trainer.global_step:08d}.mp4")
            try:
                write_video(path, video_grid(clips.cpu().numpy(), columns=min(self.n, 4)), fps=self.fps)
            except OSError as error:  # a training is worth more than its pictures
                rank_zero_warn(f"{path} cannot be written ({error}); the training goes on without it: free space")
                return
            log_videos(trainer, "samples", [path], trainer.global_step)
