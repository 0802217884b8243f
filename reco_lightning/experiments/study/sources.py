# SPDX-License-Identifier: Apache-2.0
"""The sources of a study's token clips: moving digits and real clips behind one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from reco_lightning.experiments.study import digits
from reco_lightning.experiments.study.data_spec import DataSpec
from reco_lightning.experiments.study.settings import Settings

__all__ = ["TokenSource", "open_source"]

Tokens = npt.NDArray[np.int64]

_HELD_OUT_SEED = 1_000_003  # no run's seed: what is measured is the same for all of them


class TokenSource(Protocol):
    """Clips as tokens.

    Attributes:
        vocabulary: V.
        grid: Frame blocks, rows and columns of a clip to train on.
    """

    vocabulary: int
    grid: tuple[int, int, int]

    def batch(self, start: int, stop: int) -> Tokens:
        """Returns the training clips number ``start`` to ``stop`` of an endless row, (n, N)."""

    def known(self, count: int, blocks: int) -> Tokens:
        """Returns the clips of the kind that is trained on, (count, blocks * h * w), of any length."""

    def held_out(self, count: int, blocks: int) -> Tokens:
        """Returns the clips that no run was trained on, (count, blocks * h * w), of any length."""

    def reference(self, count: int, blocks: int) -> Tokens:
        """Returns the real clips that generated ones are compared with, (count, blocks * h * w)."""

    def pixels(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Returns the clips that tokens stand for, (n, T, pixels of a frame)."""


class DigitSource:
    """Moving digits.

    Args:
        spec: Which.
        seed: Of the training clips.
    """

    vocabulary = digits.VOCABULARY

    def __init__(self, spec: DataSpec, seed: int) -> None:
        side = digits.CANVAS // digits.PATCH
        self.grid = (spec.blocks, side, side)
        self.motion = spec.motion
        self._train = digits.MovingDigits(spec.blocks, motion=spec.motion, clips=spec.clips, seed=seed)

    def batch(self, start: int, stop: int) -> Tokens:
        """Returns the training clips."""
        return self._train[start:stop]

    def known(self, count: int, blocks: int) -> Tokens:
        """Returns fresh clips of the training digits."""
        return digits.MovingDigits(blocks, motion=self.motion, seed=_HELD_OUT_SEED)[0:count]

    def held_out(self, count: int, blocks: int) -> Tokens:
        """Returns the clips of the other digits."""
        return digits.MovingDigits(blocks, motion=self.motion, held_out=True, seed=_HELD_OUT_SEED)[0:count]

    def reference(self, count: int, blocks: int) -> Tokens:
        """Returns the clips of the other digits."""
        return self.held_out(count, blocks)

    def pixels(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Returns their frames."""
        clips = digits.decode(tokens)
        return clips.reshape(*clips.shape[:2], -1)


def open_source(spec: DataSpec, *, seed: int, folder: Path, settings: Settings) -> TokenSource:
    """Makes a run's clips ready.

    Args:
        spec: Which clips.
        seed: Of the training clips and their order.
        folder: Where the tokenizer of real clips and their tokens are kept.
        settings: Sizes.

    Returns:
        The clips.
    """
    if spec.name == "digits":
        return DigitSource(spec, seed)
    from reco_lightning.experiments.study.clips import ClipSource

    return ClipSource(spec, seed=seed, folder=folder, settings=settings)
