# SPDX-License-Identifier: Apache-2.0
"""Samples tokens from logits with random numbers of each video's own."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from reco_lightning.support.argument_checks import check_finite, check_int

__all__ = ["SamplingOptions", "VideoSamplingOptions", "per_sample_uniforms", "sample_token"]


def per_sample_uniforms(seed: int, indices: Iterable[int], count: int) -> torch.Tensor:
    """Draws random numbers of videos that depend on the seed and the video's index alone.

    A video is the same whichever others are sampled beside it, in whatever batch and on whatever process. Torch's own
    generators are neither read nor moved.

    Args:
        seed: Seed of all videos.
        indices: Indices of B videos.
        count: How many numbers a video gets.

    Returns:
        Numbers in [0, 1), (count, B) float64, on the CPU.

    Example:
        >>> bool((per_sample_uniforms(1, [4, 7], 3)[:, 1] == per_sample_uniforms(1, [7], 3)[:, 0]).all())
        True
    """
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(random.Random(f"{seed}:{index}").getrandbits(63))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows, dim=1)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of drawing tokens.

    Args:
        temperature: 0 or more; 0 takes the likeliest token, below 1 sharpens the distribution.
        top_k: Draws from the k likeliest tokens only, 1 or more; ``None`` is all.
        top_p: Draws from the likeliest tokens that together reach this probability only, in (0, 1]; ``None`` is all.
        cfg_scale: Classifier-free guidance, 0 or more: logits are u + cfg_scale * (c - u), of c with the condition
            and u without it, both from one pass over twice the rows. 1 is the plain network, in one pass over the rows.
        seed: Seed of the draws. Each video draws numbers of its own from the seed and its index: it is the same, up to
            rounding in the network, in any batch and on any process.

    Raises:
        ValueError: If a value is of another kind, or out of its range.

    Example:
        >>> SamplingOptions(top_p=90)
        Traceback (most recent call last):
        ValueError: top_p must lie in (0, 1], or be None for all tokens, got 90
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(at_least=0, temperature=self.temperature, cfg_scale=self.cfg_scale)
        check_int(at_least=1, or_none=True, top_k=self.top_k)
        check_finite(or_none=True, top_p=self.top_p)
        check_int(seed=self.seed)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], or be None for all tokens, got {self.top_p}")

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Draws one token a sample, as `sample_token` does, from logits (B, V) and numbers (B,) in [0, 1)."""
        return sample_token(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, uniform=uniform)


@dataclass(frozen=True, kw_only=True)
class VideoSamplingOptions(SamplingOptions):
    """Options of sampling a video: how tokens are drawn, and how many frame blocks the network sees.

    Args:
        length: Frame blocks of a video, 1 or more, also more than the network was trained on; ``None`` is the trained
            length K.
        window_blocks: Frame blocks that the network sees at once, 1 to K; ``None`` is K. 2 for a model of Fewer-Frames.
        context_blocks: Frame blocks that a full window hands on to the next one, 1 to ``window_blocks`` - 1; ``None``
            is ``window_blocks`` - 1, which forgets least: the context slides on by one block at a time.

    Raises:
        ValueError: If a value is of another kind, or out of its range.

    Example:
        >>> VideoSamplingOptions(temperature=0.9, length=8).window_blocks is None
        True
    """

    length: int | None = None
    window_blocks: int | None = None
    context_blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(
            at_least=1,
            or_none=True,
            length=self.length,
            window_blocks=self.window_blocks,
            context_blocks=self.context_blocks,
        )


def sample_token(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws one token a sample.

    The draw goes through the tokens in the order of their ids, so that rounding in the logits hardly ever changes it.

    Args:
        logits: (B, V).
        temperature: 0 takes the likeliest token; above 1 flattens the distribution.
        top_k: Draws from the k likeliest tokens only.
        top_p: Draws from the likeliest tokens that together reach this probability only.
        uniform: A random number in [0, 1) for each sample, (B,) float64; ``None`` takes them from torch's generator.

    Returns:
        Token ids, (B,) int64.

    Example:
        >>> sample_token(torch.tensor([[0.0, 5.0]]), temperature=0).item()
        1
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    place = torch.device("cpu") if logits.device.type == "mps" else logits.device  # mps has no float64
    scores = logits.to(place, torch.float64) / temperature
    if top_k is not None or top_p is not None:
        ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ordered[:, top_k:] = float("-inf")
        if top_p is not None:
            probabilities = ordered.softmax(dim=-1)
            ordered[probabilities.cumsum(dim=-1) - probabilities >= top_p] = float("-inf")
        scores = torch.empty_like(scores).scatter_(1, ids, ordered)
    if uniform is None:
        uniform = torch.rand(len(logits), dtype=torch.float64)
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    reached = cumulative <= uniform.to(place)[:, None] * cumulative[:, -1:]
    return reached.sum(dim=-1).clamp_max(logits.shape[-1] - 1).to(logits.device)
