# SPDX-License-Identifier: Apache-2.0
"""Measures the trained models on held-out clips, the last stage of the demo."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import TokenItem
from reco_lightning.experiments.demo.clips import evenly
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.media import video_grid, write_video
from reco_lightning.tokenizers.base import VideoTokenizer, to_uint8

__all__ = [
    "Row",
    "Samples",
    "decode_grid",
    "held_out_tokens",
    "position_losses",
    "sample_and_continue",
    "write_grid",
    "write_side_by_side",
]

Pixels = npt.NDArray[np.uint8]
_ZOOM = 2  # 64 pixels are small on a screen
_FPS = 8.0


@dataclass(frozen=True)
class Row:
    """One trained model, as tables show it.

    Args:
        key: `plain`, `reco` or `reco_equal_cost`.
        name: What tables and legends show.
        steps: Training steps.
        step_seconds: Typical time of a step.
        train_seconds: Time of all its steps together.
        operations: Floating-point operations of a step, forward and backward; the mean over the windows.
        saved_bytes: Bytes that a step keeps for its backward pass; the mean over the windows.
        positions: Cross-entropy of each token position on held-out clips, in nats.
        blocks: Frame blocks, K.
    """

    key: str
    name: str
    steps: int
    step_seconds: float
    train_seconds: float
    operations: float
    saved_bytes: float
    positions: tuple[float, ...]
    blocks: int

    @property
    def cross_entropy(self) -> float:
        """Mean over all tokens, in nats."""
        return statistics.fmean(self.positions)

    @property
    def by_block(self) -> tuple[float, ...]:
        """Mean over the tokens of each frame block, in nats."""
        size = len(self.positions) // self.blocks
        starts = range(0, size * self.blocks, size)
        return tuple(statistics.fmean(self.positions[start : start + size]) for start in starts)


class Samples(NamedTuple):
    """Tokens that a model generated.

    Attributes:
        free: Clips from nothing, (samples, N).
        continued: Held-out clips, continued from their first frame block, (n, N).
    """

    free: Tensor
    continued: Tensor


@torch.inference_mode()
def position_losses(model: VideoModel, clips: Dataset[TokenItem], *, batch_size: int) -> tuple[float, ...]:
    """Returns the mean cross-entropy of each token position on whole sequences.

    Args:
        model: The model; its first row predicts the first token.
        clips: Tokens (N,) of each clip.
        batch_size: Clips at a time.

    Returns:
        N numbers in nats.
    """
    model.eval()
    total: Tensor | None = None
    count = 0
    for batch in DataLoader(clips, batch_size):
        tokens = batch["tokens"].to(model.device)  # (B, N)
        losses = F.cross_entropy(model(tokens).transpose(1, 2).float(), tokens, reduction="none")  # (B, N)
        summed = losses.double().sum(0).cpu()
        total = summed if total is None else total + summed
        count += len(tokens)
    assert total is not None  # the split leaves held-out clips
    return tuple((total / count).tolist())


def held_out_tokens(clips: Dataset[TokenItem], count: int) -> Tensor:
    """Returns the tokens of some held-out clips, spread over all of them, (count, N)."""
    places = evenly(range(len(clips)), count)  # type: ignore[arg-type]
    return torch.stack([clips[place]["tokens"] for place in places])


def sample_and_continue(
    model: VideoModel, given: Tensor, *, samples: int, seed: int, progress: Callable[[], object]
) -> Samples:
    """Lets a model generate clips from nothing, and continue the first frame block of given clips.

    Args:
        model: The model.
        given: Tokens of the clips to continue, (n, N).
        samples: Clips from nothing.
        seed: Of the draws; the same for every model.
        progress: Called after each of the two.

    Returns:
        Both.
    """
    per_block = given.shape[1] // model.network.grid[0]
    free = generate(model, samples, top_p=0.95, seed=seed)
    progress()
    continued = generate(model, len(given), first_tokens=given[:, :per_block], top_p=0.95, seed=seed)
    progress()
    return Samples(free.cpu(), continued.cpu())


@torch.inference_mode()
def decode_grid(tokenizer: VideoTokenizer, tokens: Tensor, grid: tuple[int, ...], *, columns: int = 2) -> Pixels:
    """Decodes tokens to one video that shows all clips, enlarged.

    Args:
        tokenizer: Decodes.
        tokens: (n, N).
        grid: (t, h, w).
        columns: Clips per row.

    Returns:
        uint8 (T, H, W, 3).
    """
    clips = to_uint8(tokenizer.decode(tokens.view(-1, *grid), clamp=True)).cpu().numpy()  # (n, T, H, W, 3)
    return video_grid(clips.repeat(_ZOOM, axis=2).repeat(_ZOOM, axis=3), columns)


def write_grid(path: Path, frames: Pixels) -> Path:
    """Writes a video at the demo's frame rate."""
    return write_video(path, frames, fps=_FPS)


def write_side_by_side(
    folder: Path, tokenizer: VideoTokenizer, clips: TokenDataModule, made: Sequence[Samples], *, samples: int
) -> None:
    """Writes the held-out clips, and what the models made side by side, as videos.

    Args:
        folder: Where to.
        tokenizer: Decodes.
        clips: The held-out clips.
        made: What each model generated.
        samples: Held-out clips that were continued.
    """
    grid = clips.shards.grid
    real = decode_grid(tokenizer, held_out_tokens(clips.val_set, samples), grid)
    write_grid(folder / "held-out.mp4", real)
    free = [decode_grid(tokenizer, one.free, grid) for one in made]
    continued = [decode_grid(tokenizer, one.continued, grid) for one in made]
    write_grid(folder / "free-side-by-side.mp4", _side_by_side(free))
    write_grid(folder / "continued-side-by-side.mp4", _side_by_side([real, *continued]))


def _side_by_side(videos: Sequence[Pixels]) -> Pixels:
    gap = np.full((*videos[0].shape[:2], 8, 3), 255, np.uint8)
    parts = [part for video in videos for part in (video, gap)]
    return np.concatenate(parts[:-1], axis=2)
