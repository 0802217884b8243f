# SPDX-License-Identifier: Apache-2.0
"""From a folder of videos to a folder of token shards, once: what `reco tokenize` does."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from reco_lightning.data.token_writer import ClipSource, TokenShardWriter, refuse_shards
from reco_lightning.data.video import Resize
from reco_lightning.data.video_folder import Clip, VideoFolder
from reco_lightning.tokenizers.base import VideoTokenizer, fingerprint, to_unit_range

__all__ = ["pick_device", "tokenize_folder"]


def pick_device(device: str) -> torch.device:
    """Device to compute on.

    Args:
        device: A torch device, or `auto`: CUDA, then Apple's MPS, then the CPU.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def tokenize_folder(
    *,
    tokenizer: str | VideoTokenizer,
    videos: str,
    output: str,
    frames: int = 17,
    stride: int = 1,
    size: int | tuple[int, int] = 128,
    resize: Resize = "short_side_crop",
    clip_step: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    device: str = "auto",
    shard_size: int = 8192,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Tokenise all videos below a folder.

    Files that cannot be used are left out and named. The shards remember classes, files and frames of the clips, and
    which tokenizer made them. An interrupted run leaves nothing behind.

    Args:
        tokenizer: Checkpoint of a `VQVAE`, or a `VideoTokenizer`.
        videos: Folder of videos; see `VideoFolder`.
        output: Folder to write the token shards to.
        frames: Frames per clip, T; what the tokenizer takes, as 1 + a multiple of 4.
        stride: Distance between two frames of a clip, in frames of the file.
        size: Side, or (height, width), of the clips in pixels; what the tokenizer was trained on.
        resize: `short_side_crop` or `squash`.
        clip_step: Distance between the starts of two clips of a file; by default they lie end to end.
        batch_size: Clips that are encoded at a time.
        num_workers: Worker processes that read videos; 0 reads in this one.
        device: A torch device, or `auto`.
        shard_size: Clips per shard.
        overwrite: Replace token shards that lie in `output`.
        progress: Show a progress bar and a summary.

    Returns:
        The folder of token shards.

    Raises:
        ValueError: An argument is out of range, the tokenizer cannot encode such clips, or `output` holds shards.
        VideoError: No file can be used.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not overwrite:
        refuse_shards(output)  # before the videos are scanned, which can take long
    model, name = _open_tokenizer(tokenizer)
    height, width = (size, size) if isinstance(size, int) else size
    grid = model.grid(frames, height, width)
    folder = VideoFolder(videos, frames=frames, stride=stride, size=size, resize=resize, clip_step=clip_step)
    writer = TokenShardWriter(
        output,
        vocab_size=model.codebook_size,
        grid=grid,
        tokenizer=name,
        tokenizer_sha256=fingerprint(model),
        classes=folder.classes,
        video={"frames": frames, "stride": stride, "size": [height, width], "resize": resize},
        shard_size=shard_size,
        overwrite=overwrite,
    )
    loader = DataLoader(folder, batch_size, num_workers=num_workers, pin_memory=torch.cuda.is_available())
    seen: set[int] = set()
    with writer, _placed(model, pick_device(device)) as target:
        bar = tqdm(total=len(folder), desc="Tokenising", unit="clip", disable=not progress, dynamic_ncols=True)
        with bar:
            for batch in loader:
                ids = model.encode(to_unit_range(batch["video"].to(target, non_blocking=True)))
                places = batch["index"].tolist()
                # a file that went bad since the scan is stood in for by clips that are here already
                fresh = [row for row, place in enumerate(places) if place not in seen.union(places[:row])]
                seen.update(places)
                sources = [_source(folder.clips[places[row]], folder) for row in fresh]
                writer.write(ids[fresh], batch["label"][fresh], sources)
                bar.update(len(places))
    if progress:
        sys.stdout.write(_summary(writer, folder, len(folder) - len(seen)))
    return Path(output)


def _open_tokenizer(tokenizer: str | VideoTokenizer) -> tuple[VideoTokenizer, str]:
    if isinstance(tokenizer, str):
        from reco_lightning.checkpoints import load_module
        from reco_lightning.tokenizers.vqvae import VQVAE

        return load_module(tokenizer, VQVAE), f"{VQVAE.__name__} {Path(tokenizer).name}"
    if not isinstance(tokenizer, VideoTokenizer):
        raise ValueError(
            f"tokenizer must be a checkpoint or have the members of VideoTokenizer, got a {type(tokenizer).__name__}"
        )
    return tokenizer, type(tokenizer).__name__


@contextmanager
def _placed(model: VideoTokenizer, device: torch.device) -> Iterator[torch.device]:
    """The device, with the tokenizer on it and in evaluation mode; both are restored."""
    if not isinstance(model, nn.Module):
        yield device
        return
    first: Tensor | None = next(itertools.chain(model.parameters(), model.buffers()), None)
    before, training = device if first is None else first.device, model.training
    try:
        model.to(device).eval()
        yield device
    finally:
        model.to(before).train(training)


def _source(clip: Clip, folder: VideoFolder) -> ClipSource:
    stop = clip.start + (folder.frames - 1) * folder.stride + 1
    return ClipSource(os.path.relpath(clip.path, folder.root), clip.start, stop, folder.stride)


def _summary(writer: TokenShardWriter, folder: VideoFolder, lost: int) -> str:
    manifest = writer.manifest
    tokens = " x ".join(map(str, manifest.grid))
    lines = [
        f"Wrote {manifest.clips} clips of {tokens} tokens (ids below {manifest.vocab_size}) from "
        f"{len(manifest.sources)} videos in {len(manifest.classes)} class(es) to {writer.folder}."
    ]
    if folder.skipped:
        lines += [f"Left out {len(folder.skipped)} video(s):"]
        lines += [f"  {os.path.relpath(path, folder.root)}: {reason}" for path, reason in folder.skipped]
    if lost:
        lines += [f"Left out {lost} clip(s) of videos that could be scanned but not read again (see the warnings)."]
    return "\n".join(lines) + "\n"
