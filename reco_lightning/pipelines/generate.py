# SPDX-License-Identifier: Apache-2.0
"""The `reco generate` command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from reco_lightning.models.sampling.decoding import decode_videos, encode_first_frames
from reco_lightning.models.sampling.generate import generate as sample
from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.argument_checks import check_flag, check_int, check_path
from reco_lightning.support.checkpoints import load_module
from reco_lightning.support.devices import pick_device
from reco_lightning.support.media import check_fps, video_grid, write_video
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["generate"]


def generate(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    output: str = "outputs/samples",
    n: int = 8,
    label: int | None = None,
    first_frames: str | None = None,
    given_frames: int = 1,
    fps: float = 8.0,
    batch_size: int = 16,
    device: str = "auto",
    bf16: bool = False,
    compile: bool = False,
    **sampling: Any,
) -> None:
    """Samples clips from a trained model: `tokens.npy`, and with a tokenizer one mp4 per clip and a grid of them all.

    Args:
        checkpoint: Checkpoint of the video model.
        tokenizer: Checkpoint or folder of the tokenizer that made the training tokens; without it only the tokens are
            written.
        output: Folder to write to; made if missing. Files of the same names are replaced.
        n: Number of clips, 1 or more.
        label: Class of all clips; without it a class-conditional model draws clips of no particular class.
        first_frames: Video file whose first frames all clips continue; needs the tokenizer.
        given_frames: How many frames of it, 1 or more; what the tokenizer can encode by itself.
        fps: Frames per second of the mp4 files.
        batch_size: Clips sampled and decoded side by side, 1 or more.
        device: `auto`, `cpu`, `cuda`, `cuda:1` and so on.
        bf16: Sample with weights and cache in bfloat16.
        compile: Compile the step of one token; pays off for many or long clips.
        sampling: The fields of `VideoSamplingOptions` by name.

    Raises:
        ValueError: If an argument is out of its range, or the tokenizer does not fit the model.
    """
    check_fps(fps)
    check_path(checkpoint=checkpoint, output=output)
    check_path(tokenizer=tokenizer, first_frames=first_frames, or_none=True)
    check_int(at_least=1, n=n, given_frames=given_frames, batch_size=batch_size)
    check_int(or_none=True, label=label)
    check_flag(bf16=bf16)
    options = VideoSamplingOptions(**sampling)
    if first_frames is not None and tokenizer is None:
        raise ValueError(f"first_frames needs tokenizer, which turns them into ids, got {first_frames!r} alone")
    if first_frames is not None and not Path(first_frames).is_file():
        raise ValueError(f"first_frames must be an existing video file, got {first_frames!r} (no such file)")
    place = pick_device(device)
    model = load_module(checkpoint, VideoModel).to(place, torch.bfloat16 if bf16 else None)
    network = model.network
    decoder = load_tokenizer(tokenizer, vocab_size=network.vocab_size) if tokenizer else None
    if isinstance(decoder, nn.Module):
        decoder.to(place)
    if label is not None and not 0 <= label < network.num_classes:
        allowed = f"0 to {network.num_classes - 1}" if network.num_classes else "left out: the model knows no classes"
        raise ValueError(f"label must be {allowed}, got {label}")
    first_tokens = None
    if first_frames is not None and decoder is not None:
        first_tokens = encode_first_frames(decoder, first_frames, frames=given_frames, grid=network.grid).expand(n, -1)

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(unit="token", desc="sampling") as bar:
        ids = sample(
            model,
            n,
            condition=label,
            first_tokens=first_tokens,
            batch_size=batch_size,
            compile=compile,
            progress=lambda done, total: _show(bar, done, total),
            **asdict(options),
        )
    np.save(folder / "tokens.npy", ids.view(n, -1, *network.grid[1:]).cpu().numpy())  # (n, L, h, w)
    if decoder is None:
        print(f"Wrote {folder / 'tokens.npy'}; --tokenizer PATH turns the tokens into videos.")
        return
    clips = []
    for part in tqdm(ids.split(batch_size), unit="batch", desc="decoding"):
        clips.append(decode_videos(decoder, part, network.grid, context_blocks=options.context_blocks).cpu().numpy())
    videos = np.concatenate(clips)  # (n, T, H, W, C)
    for number, clip in enumerate(videos):
        write_video(folder / f"{number:04d}.mp4", clip, fps=fps)
    write_video(folder / "grid.mp4", video_grid(videos, columns=int(np.ceil(np.sqrt(n)))), fps=fps)
    print(f"Wrote {n} clips of {videos.shape[1]} frames, grid.mp4 and tokens.npy to {folder}")


def _show(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
