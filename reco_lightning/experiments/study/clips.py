# SPDX-License-Identifier: Apache-2.0
"""Real clips as tokens of a small tokenizer, split by time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from reco_lightning.data.video.clip import fit_size, probe, read_clip
from reco_lightning.experiments.demo.clips import evenly, find_sample_videos, shrink, square_views
from reco_lightning.experiments.demo.progress import quiet
from reco_lightning.experiments.study.data_spec import DataSpec
from reco_lightning.experiments.study.digits import shuffled
from reco_lightning.experiments.study.locks import lock
from reco_lightning.experiments.study.settings import Settings
from reco_lightning.tokenizers.base import to_uint8, to_unit_range
from reco_lightning.tokenizers.vqvae import VQVAE

__all__ = ["ClipSource", "frames_of", "read_views"]

Pixels = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int64]

_SIZE = 32  # pixels a side
_VOCABULARY = 128
_HELD_OUT = 0.4  # of each video, its end
_STEP = 2  # frames between the starts of two training clips
_ENCODED_TOGETHER = 32
_TOKENIZER_BATCH = 8
_TOKENIZER_BLOCKS = 5


def frames_of(blocks: int) -> int:
    """Returns the frames that frame blocks stand for: the first one alone, then four in a block.

    Example:
        >>> frames_of(5)
        17
    """
    return 4 * blocks - 3


def read_views() -> list[Pixels]:
    """Returns the square views of the demo's videos, as the demo cuts them, at the size that the tokenizer reads.

    Returns:
        Views (T, 32, 32, 3).

    Raises:
        ModuleNotFoundError: The videos' package is not installed.
    """
    views = []
    for path in find_sample_videos():
        info = probe(path)
        whole = fit_size(info.height, info.width, size=2 * _SIZE, resize="short_side_crop")
        frames = read_clip(path, start=0, frames=info.frames, size=whole, info=info)
        views += [shrink(view, _SIZE) for _, view in square_views(frames)]
    return views


class ClipSource:
    """Real clips.

    Args:
        spec: Which.
        seed: Of their order in training.
        folder: Where the tokenizer and the tokens are kept.
        settings: Sizes.
    """

    vocabulary = _VOCABULARY

    def __init__(self, spec: DataSpec, *, seed: int, folder: Path, settings: Settings) -> None:
        side = _SIZE // 8
        self.grid = (spec.blocks, side, side)
        self.seed = seed
        self._folder = folder / f"clips-{settings.tokenizer_steps}-steps"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._views: list[Pixels] | None = None
        with lock(self._folder / "tokenizer.lock", wait=True):
            self._tokenizer = self._load_tokenizer(settings.tokenizer_steps)
        tokens = self._tokens(spec.blocks, held_out=False)
        count = len(tokens) if spec.clips is None else spec.clips
        if count > len(tokens):
            raise ValueError(f"clips must be at most {len(tokens)}, all that there are, or None for these, got {count}")
        self._train = tokens[evenly(range(len(tokens)), count)]

    def batch(self, start: int, stop: int) -> Tokens:
        """Returns the training clips, all of them in a new order in each pass."""
        return self._train[shuffled(np.arange(start, stop), len(self._train), self.seed)]

    def known(self, count: int, blocks: int) -> Tokens:
        """Returns the clips of the videos' beginnings, evenly spread; all of them where there are fewer."""
        tokens = self._tokens(blocks, held_out=False)
        return tokens[evenly(range(len(tokens)), count)]

    def held_out(self, count: int, blocks: int) -> Tokens:
        """Returns the clips of the videos' ends, evenly spread; all of them where there are fewer."""
        tokens = self._tokens(blocks, held_out=True)
        return tokens[evenly(range(len(tokens)), count)]

    def reference(self, count: int, blocks: int) -> Tokens:
        """Returns the clips of the videos' beginnings: their ends, other scenes, are farther away than still clips."""
        return self.known(count, blocks)

    def pixels(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Returns their frames, 0 to 1, grey and of 8 x 8 pixels: means of colours and of neighbours."""
        parts = []
        with torch.inference_mode():
            for rows in torch.from_numpy(tokens).split(_ENCODED_TOGETHER):
                video = self._tokenizer.decode(rows.view(len(rows), -1, *self.grid[1:]), clamp=True)
                grey = to_uint8(video).float().mean(-1) / 255  # (b, T, H, W)
                parts.append(F.avg_pool2d(grey, _SIZE // 8).flatten(2))
        return torch.cat(parts).numpy()

    def _tokens(self, blocks: int, *, held_out: bool) -> Tokens:
        """Tokens of all clips of a length, from the folder or made now, (n, blocks * h * w)."""
        path = self._folder / f"tokens-{blocks}-{'held-out' if held_out else 'train'}.npy"
        with lock(path.with_suffix(".lock"), wait=True):
            if not path.is_file():
                part = path.with_suffix(".part")
                with part.open("wb") as file:
                    np.save(file, self._encode(_clips(self._all_views(), frames_of(blocks), held_out=held_out)))
                part.replace(path)
        return np.load(path)

    @torch.inference_mode()
    def _encode(self, clips: Sequence[Pixels]) -> Tokens:
        parts = []
        for start in range(0, len(clips), _ENCODED_TOGETHER):
            video = torch.from_numpy(np.stack(clips[start : start + _ENCODED_TOGETHER]))
            parts.append(self._tokenizer.encode(to_unit_range(video)).flatten(1))
        return torch.cat(parts).numpy()

    def _all_views(self) -> list[Pixels]:
        if self._views is None:
            self._views = read_views()
        return self._views

    def _load_tokenizer(self, steps: int) -> VQVAE:
        path = self._folder / "tokenizer.pt"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tokenizer = VQVAE(codebook_size=_VOCABULARY, width=16, decay_steps=steps)
            if not path.is_file():
                clips = _clips(self._all_views(), frames_of(_TOKENIZER_BLOCKS), held_out=False)
                _train_tokenizer(tokenizer, clips, steps=steps, folder=self._folder)
                part = path.with_suffix(".part")
                torch.save(tokenizer.state_dict(), part)
                part.replace(path)
        tokenizer.load_state_dict(torch.load(path, weights_only=True))
        return tokenizer.eval()


class _Videos(Dataset[dict[str, torch.Tensor]]):
    """Clips in the tokenizer's batches, in a fixed order."""

    def __init__(self, clips: Sequence[Pixels], steps: int) -> None:
        self.clips = clips
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * _TOKENIZER_BATCH
        places = shuffled(np.arange(first, first + _TOKENIZER_BATCH), len(self.clips), 0)
        return {"video": torch.from_numpy(np.stack([self.clips[place] for place in places]))}


def _train_tokenizer(tokenizer: VQVAE, clips: Sequence[Pixels], *, steps: int, folder: Path) -> None:
    print(f"Training the tokenizer of the real clips once, {steps} steps", flush=True)
    with quiet():
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(tokenizer, DataLoader(_Videos(clips, steps), batch_size=None))


def _clips(views: Sequence[Pixels], frames: int, *, held_out: bool) -> list[Pixels]:
    """Clips of one half in time, (T, 32, 32, 3) each; they share their memory."""
    found = []
    for view in views:
        cut = round(len(view) * (1 - _HELD_OUT))
        part = view[cut:] if held_out else view[:cut]
        if len(part) < frames:
            raise ValueError(
                f"blocks must be at most {(len(part) + 3) // 4} for real clips, whose shortest part has {len(part)} "
                f"frames, got {(frames + 3) // 4}, which are {frames} frames"
            )
        found += [part[s : s + frames] for s in range(0, len(part) - frames + 1, 1 if held_out else _STEP)]
    return found
