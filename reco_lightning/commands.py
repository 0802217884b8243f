# SPDX-License-Identifier: Apache-2.0
"""Commands of `reco` that are no LightningCLI run: from files on disk to files on disk, each one function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from reco_lightning.checkpoints import load_module
from reco_lightning.generation import generate as sample
from reco_lightning.media import video_grid, write_video
from reco_lightning.models.video_model import VideoModel
from reco_lightning.tokenize import pick_device
from reco_lightning.tokenizers.base import to_uint8
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["generate"]


def generate(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    output: str = "outputs/samples",
    n: int = 8,
    label: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    fps: float = 8.0,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Samples clips from a trained model: `tokens.npy`, and with a tokenizer one mp4 per clip and a grid of them all.

    Args:
        checkpoint: Checkpoint of the video model.
        tokenizer: Checkpoint or folder of the tokenizer that made the training tokens; without it only the tokens are
            written.
        output: Folder to write to; made if missing. Files of the same names are replaced.
        n: Number of clips, 1 or more.
        label: Class of all clips; without it a class-conditional model draws clips of no particular class.
        temperature: 0 or more; 0 takes the likeliest id, below 1 sharpens the distribution.
        top_k: Draw from the k likeliest ids only.
        top_p: Draw from the likeliest ids that hold this share of the probability, in (0, 1].
        seed: The same seed gives the same clips.
        fps: Frames per second of the mp4 files.
        batch_size: Clips sampled and decoded side by side, 1 or more.
        device: `auto`, `cpu`, `cuda`, `cuda:1` and so on.

    Raises:
        ValueError: If an argument is out of its range, or the tokenizer does not fit the model.
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    place = pick_device(device)
    model = load_module(checkpoint, VideoModel).to(place)
    network = model.network
    decoder = load_tokenizer(tokenizer, vocab_size=network.vocab_size) if tokenizer else None
    if isinstance(decoder, nn.Module):
        decoder.to(place)
    if label is not None and not 0 <= label < network.num_classes:
        allowed = f"0 to {network.num_classes - 1}" if network.num_classes else "left out: the model knows no classes"
        raise ValueError(f"label must be {allowed}, got {label}")

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=n * network.num_tokens, unit="token", desc="sampling") as bar:
        ids = sample(
            model,
            n,
            condition=label,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, total: _show(bar, done),
        ).view(n, *network.grid)  # (n, t, h, w)
    np.save(folder / "tokens.npy", ids.cpu().numpy())
    if decoder is None:
        print(f"Wrote {folder / 'tokens.npy'}; --tokenizer PATH turns the tokens into videos.")
        return
    if not decoder.frame_aligned:
        ids = ids.flatten(1)  # (n, N)
    with torch.inference_mode():
        clips = [to_uint8(decoder.decode(part, clamp=True)).cpu().numpy() for part in ids.split(batch_size)]
    videos = np.concatenate(clips)  # (n, T, H, W, C)
    for number, clip in enumerate(videos):
        write_video(folder / f"{number:04d}.mp4", clip, fps=fps)
    write_video(folder / "grid.mp4", video_grid(videos, columns=int(np.ceil(np.sqrt(n)))), fps=fps)
    print(f"Wrote {n} clips, grid.mp4 and tokens.npy to {folder}")


def _show(bar: tqdm[Any], done: int) -> None:
    bar.n = done
    bar.refresh()
