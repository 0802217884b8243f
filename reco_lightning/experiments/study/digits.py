# SPDX-License-Identifier: Apache-2.0
"""Moving digits as tokens of a fixed codebook, made without a download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from reco_lightning.support.argument_checks import check_choice, check_flag, check_int

__all__ = [
    "CANVAS",
    "PATCH",
    "VOCABULARY",
    "MovingDigits",
    "codebook",
    "decode",
    "digit_sets",
    "encode",
    "place",
    "shuffled",
]

Motion = Literal["slow", "fast"]
Frames = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

CANVAS = 12  # pixels a side
PATCH = 3  # pixels a side
VOCABULARY = 64
#: Frames that a digit rests before it moves on by a patch.
RESTS = {"slow": 4, "fast": 2}
_DIRECTIONS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])  # rows and columns
_CHUNK = 256  # clips that are drawn together
_HELD_OUT = 360


@lru_cache(maxsize=1)
def digit_sets() -> tuple[Frames, Frames]:
    """Returns the digits to train on and those to measure on, which share none.

    Returns:
        Pictures (1437, 8, 8) and (360, 8, 8), 0 to 1.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> [pictures.shape for pictures in digit_sets()]
        [(1437, 8, 8), (360, 8, 8)]
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'moving digits are made of those of scikit-learn: pip install "reco_lightning[study]"', name=error.name
        ) from None
    pictures = (load_digits().images / 16).astype(np.float32)  # (1797, 8, 8)
    order = np.random.default_rng(0).permutation(len(pictures))  # the last ones are of other writers
    return pictures[order[_HELD_OUT:]], pictures[order[:_HELD_OUT]]


def place(pictures: Frames, corners: npt.NDArray[np.int64]) -> Frames:
    """Shows pictures on a canvas whose opposite sides are joined.

    Args:
        pictures: (B, 8, 8).
        corners: Row and column of the upper left corner in each frame, (B, T, 2).

    Returns:
        Clips, (B, T, 12, 12).

    Example:
        >>> clip = place(np.ones((1, 8, 8), np.float32), np.array([[[0, 0], [0, 3]]]))
        >>> clip[0, :, 0, 0].tolist(), clip[0, :, 0, 8].tolist()
        ([1.0, 0.0], [0.0, 1.0])
    """
    canvas = np.zeros((len(pictures), CANVAS, CANVAS), np.float32)
    canvas[:, : pictures.shape[1], : pictures.shape[2]] = pictures
    shifts = corners
    places = (np.arange(CANVAS) - shifts[..., None]) % CANVAS  # (B, T, 2, 12): which pixel of the canvas is seen
    rows, columns = places[:, :, 0, :, None], places[:, :, 1, None, :]
    return canvas[np.arange(len(pictures))[:, None, None, None], rows, columns]


@lru_cache(maxsize=1)
def codebook() -> npt.NDArray[np.float32]:
    """Returns the 64 patches that stand for all: k-means of patches of training clips, from a fixed seed.

    Returns:
        Patches, (64, 9), 0 to 1, from dark to bright.
    """
    from sklearn.cluster import KMeans

    pictures, _ = digit_sets()
    source = np.random.default_rng(0)
    chosen = pictures[source.integers(len(pictures), size=1500)]
    frames = place(chosen, source.integers(CANVAS, size=(len(chosen), 1, 2)))
    found = KMeans(VOCABULARY, n_init=1, random_state=0).fit(_patches(frames).reshape(-1, PATCH * PATCH))
    centres = found.cluster_centers_
    return centres[np.argsort(centres.sum(1))].astype(np.float32)


def encode(clips: Frames) -> Tokens:
    """Finds the nearest patch of the codebook for each patch.

    Args:
        clips: (B, T, 12, 12), 0 to 1.

    Returns:
        Token ids, (B, T * 16): by frame, then rows, then columns.
    """
    book = codebook()
    patches = _patches(clips)  # (B, T * 16, 9)
    distances = (book**2).sum(1) - 2 * patches @ book.T  # (B, T * 16, 64), but for what all share
    return distances.argmin(-1)


def decode(tokens: Tokens) -> Frames:
    """Turns tokens back to clips.

    Args:
        tokens: (B, T * 16).

    Returns:
        Clips, (B, T, 12, 12), 0 to 1.
    """
    side = CANVAS // PATCH
    patches = codebook()[tokens].reshape(len(tokens), -1, side, side, PATCH, PATCH)
    return patches.transpose(0, 1, 2, 4, 3, 5).reshape(len(tokens), -1, CANVAS, CANVAS)


class MovingDigits:
    """An endless row of token clips; clip i is a function of the seed and of i.

    A clip is one digit that moves in one of four directions by a patch at a time; a frame is a frame block.

    Args:
        blocks: K, frames of a clip, 1 or more.
        motion: ``"slow"``, a patch in every fourth frame, or ``"fast"``, in every second one.
        clips: How many there are before they come again, 1 or more; ``None`` is without end.
        held_out: Whether they show the digits that are kept from training.
        seed: Of the clips, 0 or more.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> MovingDigits(5)[0:2].shape
        (2, 80)
    """

    def __init__(
        self,
        blocks: int,
        *,
        motion: Motion = "slow",
        clips: int | None = None,
        held_out: bool = False,
        seed: int = 0,
    ) -> None:
        check_choice(get_args(Motion), motion=motion)
        check_int(at_least=1, blocks=blocks)
        check_int(at_least=0, seed=seed)
        check_int(at_least=1, or_none=True, clips=clips)
        check_flag(held_out=held_out)
        self.blocks = blocks
        self.motion = motion
        self.clips = clips
        self.held_out = held_out
        self.seed = seed
        self._chunk = lru_cache(maxsize=8)(self._draw)

    def __getitem__(self, places: slice) -> Tokens:
        """Tokens of the clips from ``places.start`` to ``places.stop``, (n, K * 16)."""
        numbers = np.arange(places.start, places.stop)
        if self.clips is not None:
            numbers = shuffled(numbers, self.clips, self.seed)
        parts: Sequence[Tokens] = [self._chunk(int(number) // _CHUNK)[int(number) % _CHUNK] for number in numbers]
        return np.stack(parts)

    def _draw(self, chunk: int) -> Tokens:
        source = np.random.default_rng([self.seed, chunk, self.held_out])
        pictures = digit_sets()[self.held_out]
        chosen = pictures[source.integers(len(pictures), size=_CHUNK)]
        starts = source.integers(CANVAS, size=(_CHUNK, 1, 2))
        directions = _DIRECTIONS[source.integers(len(_DIRECTIONS), size=(_CHUNK, 1))]  # (B, 1, 2)
        rest = RESTS[self.motion]
        moves = (np.arange(self.blocks) + source.integers(rest, size=(_CHUNK, 1))) // rest  # (B, K)
        return encode(place(chosen, starts + PATCH * moves[..., None] * directions))


def shuffled(numbers: npt.NDArray[np.int64], clips: int, seed: int) -> npt.NDArray[np.int64]:
    """Returns the clips that the places of an endless row stand for: all of them in a new order in each pass.

    Args:
        numbers: Places in the row, 0 or more.
        clips: How many clips there are.
        seed: Of the orders.

    Example:
        >>> sorted(shuffled(np.arange(4, 8), 4, 0).tolist())
        [0, 1, 2, 3]
    """
    passes = numbers // clips
    orders = {one: np.random.default_rng([seed, 1, int(one)]).permutation(clips) for one in np.unique(passes)}
    return np.array([orders[one][number] for one, number in zip(passes, numbers % clips, strict=True)])


def _patches(clips: Frames) -> Frames:
    side = CANVAS // PATCH
    cut = clips.reshape(len(clips), -1, side, PATCH, side, PATCH).transpose(0, 1, 2, 4, 3, 5)
    return cut.reshape(len(clips), -1, PATCH * PATCH)
