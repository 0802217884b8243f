# SPDX-License-Identifier: Apache-2.0
"""Where a study's token clips come from: one protocol for moving digits and real clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from reco_lightning.experiments.study import digits
from reco_lightning.experiments.study.settings import Settings
from reco_lightning.support.argument_checks import check_whole

__all__ = ["LONGEST_REAL", "DataName", "DataSpec", "TokenSource", "open_source"]

DataName = Literal["digits", "clips"]
Tokens = npt.NDArray[np.int64]

#: Frame blocks that the held-out end of the shortest real video has.
LONGEST_REAL = 12
_HELD_OUT_SEED = 1_000_003  # no run's seed: what is measured is the same for all of them


@dataclass(frozen=True)
class DataSpec:
    """Which clips a run is trained on.

    Args:
        name: ``"digits"``, moving digits, or ``"clips"``, the real clips of the demo.
        motion: ``"slow"`` or ``"fast"`` digits; real clips have their own.
        clips: How many clips there are to train on; ``None`` makes digits afresh for every step and takes all real
            clips.
        blocks: K, frame blocks of a clip, 2 or more.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> DataSpec("digits", motion="fast").label
        'digits, fast'
    """

    name: DataName = "digits"
    motion: digits.Motion = "slow"
    clips: int | None = None
    blocks: int = 5

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("data", self.name, get_args(DataName)),
            ("motion", self.motion, get_args(digits.Motion)),
        )
        for argument, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")
        if self.name == "clips" and self.motion != "slow":
            raise ValueError(f"motion is a choice for digits; real clips move as they do, got {self.motion!r}")
        check_whole(blocks=self.blocks)
        check_whole(clips=self.clips, or_none=True)
        for argument, number, least in (("clips", self.clips, 1), ("blocks", self.blocks, 2)):
            if number is not None and number < least:
                raise ValueError(f"{argument} must be a whole number of {least} or more, got {number!r}")

    @property
    def longest(self) -> int | None:
        """Frame blocks of the longest clips that there are; None where they can be of any length."""
        return LONGEST_REAL if self.name == "clips" else None

    @property
    def label(self) -> str:
        """A few words for tables; what is as usual is left out."""
        words: list[str] = [self.name]
        if self.motion != "slow":
            words.append(self.motion)
        if self.clips is not None:
            words.append(f"{self.clips} clips")
        if self.blocks != 5:
            words.append(f"{self.blocks} blocks")
        return ", ".join(words)

    def changed(self, options: Mapping[str, Any]) -> DataSpec:
        """The same with other values.

        Raises:
            ValueError: If an option is unknown or out of its range.
        """
        known = asdict(self)
        unknown = set(options) - (set(known) - {"name"})
        if unknown:
            raise ValueError(f"data takes motion, clips and blocks, got {', '.join(sorted(map(str, unknown)))}")
        return DataSpec(**{**known, **options})


class TokenSource(Protocol):
    """Clips as tokens.

    Attributes:
        vocabulary: V.
        grid: Frame blocks, rows and columns of a clip to train on.
    """

    vocabulary: int
    grid: tuple[int, int, int]

    def batch(self, start: int, stop: int) -> Tokens:
        """Training clips number ``start`` to ``stop`` of an endless row, (n, N)."""

    def known(self, count: int, blocks: int) -> Tokens:
        """Clips of the kind that is trained on, (count, blocks * h * w), of any length."""

    def held_out(self, count: int, blocks: int) -> Tokens:
        """Clips that no run was trained on, (count, blocks * h * w), of any length."""

    def reference(self, count: int, blocks: int) -> Tokens:
        """Real clips that generated ones are compared with, (count, blocks * h * w)."""

    def pixels(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Clips that tokens stand for, (n, T, pixels of a frame)."""


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
        """Training clips."""
        return self._train[start:stop]

    def known(self, count: int, blocks: int) -> Tokens:
        """Fresh clips of the training digits."""
        return digits.MovingDigits(blocks, motion=self.motion, seed=_HELD_OUT_SEED)[0:count]

    def held_out(self, count: int, blocks: int) -> Tokens:
        """Clips of the other digits."""
        return digits.MovingDigits(blocks, motion=self.motion, held_out=True, seed=_HELD_OUT_SEED)[0:count]

    def reference(self, count: int, blocks: int) -> Tokens:
        """Clips of the other digits."""
        return self.held_out(count, blocks)

    def pixels(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Their frames."""
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
