# SPDX-License-Identifier: Apache-2.0
"""Which clips a run of a study is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from reco_lightning.experiments.study import digits
from reco_lightning.support.argument_checks import check_choice, check_int

__all__ = ["LONGEST_REAL", "DataName", "DataSpec"]

DataName = Literal["digits", "clips"]


#: Frame blocks that the held-out end of the shortest real video has.
LONGEST_REAL = 12


@dataclass(frozen=True)
class DataSpec:
    """The clips that a run is trained on.

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
        check_choice(get_args(DataName), data=self.name)
        check_choice(get_args(digits.Motion), motion=self.motion)
        if self.name == "clips" and self.motion != "slow":
            raise ValueError(f"motion is a choice for digits; real clips move as they do, got {self.motion!r}")
        check_int(at_least=2, blocks=self.blocks)
        check_int(at_least=1, or_none=True, clips=self.clips)

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
        """Returns the same with other values.

        Raises:
            ValueError: If an option is unknown or out of its range.
        """
        known = asdict(self)
        unknown = set(options) - (set(known) - {"name"})
        if unknown:
            raise ValueError(f"data takes motion, clips and blocks, got {', '.join(sorted(map(str, unknown)))}")
        return DataSpec(**{**known, **options})
