# SPDX-License-Identifier: Apache-2.0
"""Sampling through the trainer: requests for videos as the data of `predict`, and a writer of what comes back.

The trainer deals the requests out to its processes. A video depends on the seed and its own index alone, so any number
of processes and any batch size give the same set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from reco_lightning.models.sampling.decoding import decode_videos
from reco_lightning.models.sampling.token_sampling import check_sampling
from reco_lightning.support.argument_checks import check_path, check_whole, check_whole_sequence
from reco_lightning.support.media import check_fps, write_video
from reco_lightning.tokenizers.base import VideoTokenizer
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["GenerationRequests", "VideoWriter"]


class GenerationRequests(pl.LightningDataModule):
    """Requests for n videos, as batches for `VideoModel.predict_step`.

    Args:
        n: Number of videos, 1 or more.
        labels: Classes; video i has the one at i modulo their number. ``None`` is unconditional.
        prefix: Path of an ``.npy`` file of ids that stand in front of the tokens, (n, C), for a network with
            ``condition_tokens``; not together with ``labels``.
        first_tokens: Path of an ``.npy`` file of ids to continue, (n, m) or (n, blocks, h, w), such as those of first
            frames.
        temperature: As in ``generate``, like all that follows.
        top_k: As in ``generate``.
        top_p: As in ``generate``.
        cfg_scale: As in ``generate``.
        seed: As in ``generate``.
        length: As in ``generate``.
        window_blocks: As in ``generate``.
        context_blocks: As in ``generate``.
        batch_size: Videos sampled side by side in a process, 1 or more.

    Raises:
        ValueError: If an argument is out of its range, or the file holds no ids for n videos.

    Example:
        >>> batches = GenerationRequests(3, labels=[5, 7], batch_size=2).predict_dataloader()
        >>> [(batch["index"].tolist(), batch["condition"].tolist()) for batch in batches]
        [([0, 1], [5, 7]), ([2], [5])]
    """

    def __init__(
        self,
        n: int = 8,
        *,
        labels: Sequence[int] | None = None,
        prefix: str | None = None,
        first_tokens: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scale: float = 1.0,
        seed: int = 0,
        length: int | None = None,
        window_blocks: int | None = None,
        context_blocks: int | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        check_whole(n=n, batch_size=batch_size)
        check_whole_sequence(labels=labels, or_none=True)
        check_path(prefix=prefix, first_tokens=first_tokens, or_none=True)
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if labels is not None and not len(labels):
            raise ValueError(f"labels must hold a class or more, or be None, got {labels!r}")
        if labels is not None and min(labels) < 0:
            raise ValueError(f"labels must be 0 or more, got {labels!r}")
        if labels is not None and prefix is not None:
            raise ValueError(f"prefix must be None where labels are given, got {prefix!r}; a network takes one of them")
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "cfg_scale": cfg_scale,
            "seed": seed,
            "length": length,
            "window_blocks": window_blocks,
            "context_blocks": context_blocks,
        }
        check_sampling(**self.options)
        self.n, self.batch_size = n, batch_size
        self.labels = None if labels is None else torch.tensor(list(labels))
        self.prefix = None if prefix is None else _read_ids("prefix", prefix, n)
        self.first_tokens = None if first_tokens is None else _read_ids("first_tokens", first_tokens, n)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of requests, in the order of the videos' indices."""
        numbers: Any = range(self.n)
        return DataLoader(numbers, batch_size=self.batch_size, collate_fn=self._request)

    def _request(self, numbers: list[int]) -> dict[str, Any]:
        index = torch.tensor(numbers)
        request: dict[str, Any] = {"index": index, "options": self.options}
        if self.labels is not None:
            request["condition"] = self.labels[index % len(self.labels)]
        if self.prefix is not None:
            request["condition"] = self.prefix[index]
        if self.first_tokens is not None:
            request["first_tokens"] = self.first_tokens[index]
        return request


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


def _read_ids(name: str, path: str, n: int) -> torch.Tensor:
    if not Path(path).is_file():
        raise ValueError(f"{name} must be an .npy file of ids, got {path!r}, which is none")
    try:
        with open(path, "rb") as file:
            ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{name} must be an .npy file of ids, but {path!r} cannot be read as one: {error}") from error
    if not isinstance(ids, np.ndarray):
        raise ValueError(f"{name} must be an .npy file of ids, got {path!r}, which holds several arrays")
    if ids.ndim < 2 or len(ids) != n or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} must hold integers, (n, m) or (n, blocks, h, w) with n={n}, got {ids.dtype} of shape "
            f"{ids.shape} in {path!r}"
        )
    return torch.from_numpy(ids.reshape(n, -1).astype(np.int64))
