# SPDX-License-Identifier: Apache-2.0
"""Samples tokens from logits with random numbers of each video's own."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch

from reco_lightning.support.argument_checks import check_finite, check_int

__all__ = ["check_sampling", "per_sample_uniforms", "sample_token"]


def per_sample_uniforms(seed: int, indices: Iterable[int], count: int) -> torch.Tensor:
    """Random numbers of videos that depend on the seed and the video's index alone.

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


def check_sampling(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
    seed: int = 0,
    **blocks: int | None,
) -> None:
    """Refuses options of sampling that no network can take; what depends on the network is left to `generate`.

    Args:
        temperature: 0 or more.
        top_k: 1 or more, or None.
        top_p: In (0, 1], or None.
        cfg_scale: 0 or more.
        seed: Any whole number.
        blocks: Lengths in frame blocks by name, each 1 or more, or None.

    Raises:
        ValueError: One is of another kind, or out of its range.

    Example:
        >>> check_sampling(top_p=0.9, length=None)
        >>> check_sampling(top_p=90)
        Traceback (most recent call last):
        ValueError: top_p must lie in (0, 1], or be None for all tokens, got 90
    """
    check_finite(temperature=temperature, cfg_scale=cfg_scale)
    check_finite(top_p=top_p, or_none=True)
    check_int(seed=seed)
    check_int(top_k=top_k, or_none=True, **blocks)
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, or None for all tokens, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], or be None for all tokens, got {top_p}")
    if cfg_scale < 0:
        raise ValueError(f"cfg_scale must be 0 or more, got {cfg_scale}")
    for name, value in blocks.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 frame block or more, or None, got {value}")


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
