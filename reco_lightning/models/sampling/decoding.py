# SPDX-License-Identifier: Apache-2.0
"""Decodes sampled ids to clips and encodes first frames to ids, with any tokenizer.

A video longer than the model's clips is decoded as it was sampled, window by window, so that a tokenizer sees no more
frame blocks at once than it does in training, and its memory does not grow with the video.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reco_lightning.data.tokens.manifest import check_grid
from reco_lightning.data.video.clip import read_clip
from reco_lightning.support.argument_checks import check_int, check_tensor
from reco_lightning.tokenizers.base import VideoTokenizer, to_uint8, to_unit_range

__all__ = ["decode_videos", "encode_first_frames"]


@torch.inference_mode()
def decode_videos(
    tokenizer: VideoTokenizer, ids: Tensor, grid: Sequence[int], *, context_blocks: int | None = None
) -> Tensor:
    """Turns the ids of videos of any length into clips.

    The first window is the first t blocks. Every later one begins with blocks that were decoded before: the frames of
    those are decoded again, as what the new frames follow, and dropped. The last window reaches further back where
    fewer blocks are left, since a window always has t of them.

    Args:
        tokenizer: Decodes.
        ids: Sampled ids, (n, L * h * w) int64, of L frame blocks.
        grid: (t, h, w), the clip that the model was trained on.
        context_blocks: Blocks that a window shares with the one before, 1 to t - 1; ``None`` is t - 1.

    Returns:
        uint8 (n, T, H, W, 3), on the tokenizer's device.

    Raises:
        ValueError: If an argument is not as described, or the ids are of no whole frame blocks.

    Example:
        >>> from reco_lightning.tokenizers.vqvae import VQVAE
        >>> tokenizer = VQVAE(codebook_size=16, width=8).eval()
        >>> decode_videos(tokenizer, torch.zeros(1, 7 * 4, dtype=torch.long), (3, 2, 2), context_blocks=1).shape
        torch.Size([1, 25, 16, 16, 3])
    """
    _check_tokenizer(tokenizer, "decode", "frame_aligned")
    check_tensor(ids=ids)
    grid = check_grid(grid, frame_aligned=tokenizer.frame_aligned)
    check_int(context_blocks=context_blocks, or_none=True)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers, got {ids.dtype}")
    block = math.prod(grid[1:]) if tokenizer.frame_aligned else math.prod(grid)
    if ids.ndim < 2 or not ids[0].numel() or ids[0].numel() % block:
        raise ValueError(f"ids must be (n, L * {block}), whole blocks of the grid {grid}, got {tuple(ids.shape)}")
    if context_blocks is not None and tokenizer.frame_aligned and not 1 <= context_blocks < grid[0]:
        raise ValueError(f"context_blocks must be 1 to {grid[0] - 1}, or None, got {context_blocks}")
    ids = ids.to(_device(tokenizer))
    if not tokenizer.frame_aligned:
        return to_uint8(tokenizer.decode(ids.flatten(1), clamp=True))
    blocks, rows, columns = grid
    ids = ids.view(len(ids), -1, rows, columns)  # (n, L, h, w)
    length, done = ids.shape[1], min(blocks, ids.shape[1])
    fresh = blocks - (blocks - 1 if context_blocks is None else context_blocks)
    parts = [to_uint8(tokenizer.decode(ids[:, :done], clamp=True))]
    while done < length:
        stop = min(done + fresh, length)
        clips = to_uint8(tokenizer.decode(ids[:, stop - blocks : stop], clamp=True))
        parts.append(clips[:, -(stop - done) * tokenizer.temporal_stride :])
        done = stop
    return torch.cat(parts, dim=1)


@torch.no_grad()
def encode_first_frames(
    tokenizer: VideoTokenizer, path: str | os.PathLike[str], *, frames: int, grid: Sequence[int]
) -> Tensor:
    """Returns the ids of the first frames of a video file, encoded alone: what a model continues.

    Alone, since ids of a whole clip may tell of its later frames.

    Args:
        tokenizer: Encodes.
        path: The video file; frames are resized to the model's size and cropped.
        frames: How many; what the tokenizer can encode by itself, such as 1 or 5.
        grid: (t, h, w), the clip that the model was trained on.

    Returns:
        int64 (1, m), on the tokenizer's device.

    Raises:
        ValueError: The tokenizer's ids are of no frames, or it cannot encode that many.
    """
    _check_tokenizer(tokenizer, "frame_aligned", "spatial_stride")
    if not tokenizer.frame_aligned:
        raise ValueError(
            f"the ids of a {type(tokenizer).__name__} belong to no frames, so first frames cannot be continued; "
            "give a tokenizer that is frame_aligned"
        )
    grid = check_grid(grid)
    size = (grid[1] * tokenizer.spatial_stride, grid[2] * tokenizer.spatial_stride)
    clip = torch.from_numpy(read_clip(path, start=0, frames=frames, size=size))[None]
    video = to_unit_range(clip).to(_device(tokenizer))
    alone = getattr(tokenizer, "encode_first_frames", None)
    return (alone(video, frames) if alone else tokenizer.encode(video)).flatten(1)


def _check_tokenizer(tokenizer: VideoTokenizer, *members: str) -> None:
    if not all(hasattr(tokenizer, name) for name in members):
        raise ValueError(f"tokenizer must have the members of VideoTokenizer, got a {type(tokenizer).__name__}")


def _device(tokenizer: VideoTokenizer) -> torch.device:
    weights = tokenizer.parameters() if isinstance(tokenizer, nn.Module) else iter(())
    return next((weight.device for weight in weights), torch.device("cpu"))
