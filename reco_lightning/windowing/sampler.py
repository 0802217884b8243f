# SPDX-License-Identifier: Apache-2.0
"""``WindowSampler``: draws the tokens that a training step optimises (arXiv 2604.07402, §4.3-4.4).

First stage of the pipeline ``sampler -> losses -> engines -> injection -> callback``; nothing here needs torch.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from reco_lightning.support.argument_checks import check_int

__all__ = ["Window", "WindowSampler"]


@dataclass(frozen=True, order=True)
class Window:
    """A half-open range ``[start, stop)`` of video tokens, counted from the first one (a prefix is not counted).

    Args:
        start: First token of the window, 0 or more.
        stop: One past its last token, larger than ``start``.

    Raises:
        ValueError: If the range is empty or negative.

    Example:
        >>> window = Window(64, 192)
        >>> len(window)
        128
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(
                f"Window needs 0 <= start < stop, got start={self.start}, stop={self.stop}; "
                "pass a non-empty token range"
            )

    def __len__(self) -> int:
        return self.stop - self.start


class WindowSampler:
    """Draws the window of a step as a pure function of seed and step.

    A video of K frame blocks with N = K * tokens_per_block tokens has windows that start at every multiple of the
    stride (Algorithm 1). The windows that touch the first frame block share ``first_window_prob``, the others share the
    rest evenly (§4.4). ``window_blocks == frame_blocks`` is the plain baseline.

    Args:
        frame_blocks: K, the number of frame blocks; 1 or more.
        tokens_per_block: Tokens of one frame block; 1 or more.
        window_blocks: Blocks that a step optimises, 1 to ``frame_blocks``; the paper uses 2.
        stride_blocks: Distance of neighbouring starts in blocks; a whole number of tokens (0.5 and 0.25 are fine).
        first_window_prob: Probability in (0, 1] that the windows touching the first block share; ``None`` is uniform.
        seed: Seed of the draws.
        schedule: Windows that change their length in the course of the training (not in the paper): the share of the
            training done, in (0, 1), from which on windows have so many blocks. ``{0.5: 3, 0.9: 5}`` trains on three
            blocks from the middle on, and on the whole of a video of five at the end.

    Attributes:
        starts: The possible window starts, in tokens, ascending; those of the training's beginning.
        probabilities: The probability of each start; they add up to 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> sampler = WindowSampler(5, 1024)
        >>> sampler.starts, [round(p, 3) for p in sampler.probabilities]
        ((0, 1024, 2048, 3072), [0.5, 0.167, 0.167, 0.167])
        >>> sampler.sample(7) == sampler.sample(7)
        True
    """

    def __init__(
        self,
        frame_blocks: int,
        tokens_per_block: int,
        *,
        window_blocks: int = 2,
        stride_blocks: float = 1,
        first_window_prob: float | None = 0.5,
        seed: int = 0,
        schedule: Mapping[float, int] | None = None,
    ) -> None:
        check_int(at_least=1, frame_blocks=frame_blocks, tokens_per_block=tokens_per_block)
        check_int(seed=seed, window_blocks=window_blocks)
        if not 1 <= window_blocks <= frame_blocks:
            raise ValueError(
                f"window_blocks must be a whole number from 1 to frame_blocks={frame_blocks}, got {window_blocks!r}; "
                "frame_blocks itself is the plain baseline"
            )
        if first_window_prob is not None and not (_is_number(first_window_prob) and 0 < first_window_prob <= 1):
            raise ValueError(
                f"first_window_prob must lie in (0, 1], got {first_window_prob!r}; pass None for uniform windows"
            )
        self.frame_blocks = frame_blocks
        self.tokens_per_block = tokens_per_block
        self.window_blocks = window_blocks
        self.stride_blocks = stride_blocks
        self.first_window_prob = first_window_prob
        self.seed = seed
        if schedule is not None and not (isinstance(schedule, Mapping) and all(map(_is_number, schedule))):
            raise ValueError(
                f"schedule must map shares of the training to numbers of blocks, as {{0.5: 3}}, got {schedule!r}"
            )
        self.schedule = dict(schedule or {})
        stride = _stride_in_tokens(stride_blocks, tokens_per_block)
        self.starts: tuple[int, ...] = tuple(range(0, self.tokens - self.window_tokens + 1, stride))
        self.probabilities: tuple[float, ...] = _probabilities(self.starts, tokens_per_block, first_window_prob)
        self._later = tuple((share, self._stage(share, blocks)) for share, blocks in sorted(self.schedule.items()))

    def _stage(self, share: float, blocks: int) -> WindowSampler:
        if not 0 < share < 1:
            raise ValueError(f"schedule must name shares of the training in (0, 1), got {share!r}")
        try:
            return WindowSampler(
                self.frame_blocks,
                self.tokens_per_block,
                window_blocks=blocks,
                stride_blocks=self.stride_blocks,
                first_window_prob=self.first_window_prob,
                seed=self.seed,
            )
        except ValueError as error:
            raise ValueError(f"schedule, from {share} on: {error}") from None

    @property
    def stages(self) -> tuple[tuple[float, WindowSampler], ...]:
        """The share of the training from which on each sampler holds, ascending; the first is 0."""
        return ((0.0, self), *self._later)

    @property
    def tokens(self) -> int:
        """N, the number of video tokens of a sample."""
        return self.frame_blocks * self.tokens_per_block

    @property
    def window_tokens(self) -> int:
        """W, the number of tokens of a window."""
        return self.window_blocks * self.tokens_per_block

    @property
    def windows(self) -> tuple[Window, ...]:
        """Every window, in the order of ``starts``."""
        return tuple(Window(start, start + self.window_tokens) for start in self.starts)

    @property
    def all_windows(self) -> tuple[Window, ...]:
        """The windows of all stages, each once."""
        return tuple(dict.fromkeys(window for _, sampler in self.stages for window in sampler.windows))

    def at(self, progress: float) -> WindowSampler:
        """Returns the sampler that holds when a share of the training is done.

        Args:
            progress: Steps done over all steps, 0 to 1.

        Returns:
            One without a schedule, or this one.
        """
        return [sampler for share, sampler in self.stages if share <= progress][-1]

    @property
    def never_trained(self) -> int:
        """How many tokens at the end no window reaches: 0 where the stride divides the way to the last window."""
        return self.tokens - (self.starts[-1] + self.window_tokens)

    def sample(self, step: int) -> Window:
        """Returns the window of a step: the same on every rank and after every resume.

        Args:
            step: Index of the training batch, 0 or more.

        Returns:
            The step's window.
        """
        return self.sample_groups(step, 1)[0]

    def sample_groups(
        self, step: int, groups: int, *, progress: float = 0.0, probabilities: Sequence[float] | None = None
    ) -> list[Window]:
        """Draws one window for each group of a batch by systematic sampling.

        One uniform number u gives the points (u + i) / groups for i = 0 ... groups - 1 of the cumulative distribution:
        every window's expected share of the batch is its probability, and the spread is the least possible. The order
        starts at a random group, so that a batch too small for all of them leaves none out on average.

        Args:
            step: Index of the training batch, 0 or more.
            groups: Number of windows, 1 or more; 1 is the paper.
            progress: Share of the training that is done, 0 to 1; decides where there is a schedule.
            probabilities: Of the starts, in the place of the sampler's own.

        Returns:
            The windows in ascending order, rotated by a random offset.

        Raises:
            ValueError: If ``step`` is negative or ``groups`` below 1.
        """
        check_int(at_least=0, step=step)
        check_int(at_least=1, groups=groups)
        # A string seed is hashed by SHA-512 inside random: the same draw on every platform and version.
        source = random.Random(f"{self.seed}:{step}")
        uniform, turn = source.random(), source.randrange(groups)
        stage = self.at(progress)
        shares = stage.probabilities if probabilities is None else probabilities
        cumulative = list(accumulate(shares))
        points = [(uniform + (index + turn) % groups) / groups for index in range(groups)]
        starts = [stage.starts[_place(cumulative, shares, point * cumulative[-1])] for point in points]
        return [Window(start, start + stage.window_tokens) for start in starts]

    def __repr__(self) -> str:
        return (
            f"WindowSampler(frame_blocks={self.frame_blocks}, tokens_per_block={self.tokens_per_block}, "
            f"window_blocks={self.window_blocks}, stride_blocks={self.stride_blocks}, "
            f"first_window_prob={self.first_window_prob}, seed={self.seed}"
            + (f", schedule={self.schedule})" if self.schedule else ")")
        )


def _place(cumulative: list[float], shares: Sequence[float], quantile: float) -> int:
    index = min(bisect_right(cumulative, quantile), len(shares) - 1)
    while shares[index] == 0:  # rounding at the upper end must not reach a window of probability 0
        index -= 1
    return index


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stride_in_tokens(stride_blocks: float, tokens_per_block: int) -> int:
    if not _is_number(stride_blocks) or not 0 < stride_blocks < float("inf"):
        raise ValueError(f"stride_blocks must be a number above 0, got {stride_blocks!r}")
    tokens = stride_blocks * tokens_per_block
    stride = round(tokens)
    if stride < 1 or abs(stride - tokens) > 1e-6 * tokens_per_block:
        raise ValueError(
            f"stride_blocks must be a whole number of tokens, got {stride_blocks!r} x tokens_per_block="
            f"{tokens_per_block}; choose a multiple of 1/{tokens_per_block}"
        )
    return stride


def _probabilities(
    starts: tuple[int, ...], tokens_per_block: int, first_window_prob: float | None
) -> tuple[float, ...]:
    first = sum(start < tokens_per_block for start in starts)
    rest = len(starts) - first
    if first_window_prob is None or rest == 0:
        return tuple(1 / len(starts) for _ in starts)
    return tuple([first_window_prob / first] * first + [(1 - first_window_prob) / rest] * rest)
