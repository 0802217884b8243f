# SPDX-License-Identifier: Apache-2.0
"""Samples the tokens of videos from a trained network, row by row with a key/value cache.

Comes after training; a tokenizer's ``decode`` turns the tokens into video.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel

__all__ = ["generate", "sample_token"]


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


@torch.no_grad()
def generate(
    model: VideoModel | VideoTransformer,
    n: int,
    *,
    condition: int | torch.Tensor | None = None,
    first_tokens: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Samples videos' tokens.

    Args:
        model: The trained model or its network.
        n: Number of videos, 1 or more.
        condition: A class for all videos or one each, (n,); ``None`` is unconditional.
        first_tokens: Tokens to continue from, (n, m) int64 with 0 < m < N; needed where the network has no start token.
        temperature: As in ``sample_token``.
        top_k: As in ``sample_token``.
        top_p: As in ``sample_token``.
        seed: Seed of the draws. Each video draws numbers of its own, so the same seed gives the same videos, up to
            rounding in the network: with a cache or without, for every ``batch_size``, and the first of a larger ``n``.
        batch_size: Videos sampled side by side, 1 or more.
        cache: Whether to keep keys and values (fast) or run the whole sequence for each token.
        progress: Called with tokens done and in all.

    Returns:
        Token ids, (n, N) int64, on the network's device.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> network = VideoTransformer(vocab_size=32, grid=(2, 2, 2), dim=32, depth=1, heads=2)
        >>> generate(network, 3, seed=1).shape
        torch.Size([3, 8])
    """
    network = model.network if isinstance(model, VideoModel) else model
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, or None for all tokens, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], or be None for all tokens, got {top_p}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    device = network.head.weight.device
    if first_tokens is None:
        if not network.prefix:
            raise ValueError(
                "the network has no start token, so first_tokens must give at least one token a video; got None"
            )
        first_tokens = torch.zeros(n, 0, dtype=torch.long)
    least = 1 - network.prefix
    shape = tuple(first_tokens.shape)
    if len(shape) != 2 or shape[0] != n or not least <= shape[1] < network.num_tokens:
        raise ValueError(
            f"first_tokens must be (n, m) with n={n} and m from {least} to {network.num_tokens - 1}, got {shape}"
        )
    labels = _labels(network, condition, n)
    generator = torch.Generator().manual_seed(seed)
    was_training = network.training
    network.eval()
    missing = network.num_tokens - first_tokens.shape[1]
    total, done, videos = n * missing, 0, []
    try:
        for begin in range(0, n, batch_size):
            tokens = first_tokens[begin : begin + batch_size].to(device)
            own_labels = None if labels is None else labels[begin : begin + batch_size].to(device)
            memory = network.new_cache(len(tokens)) if cache else None
            draws = [torch.rand(missing, generator=generator, dtype=torch.float64) for _ in range(len(tokens))]
            uniform = torch.stack(draws, dim=1)  # (N - m, B)
            ran = 0  # rows whose keys and values the cache holds
            for step in range(missing):
                if memory is None:
                    logits = network(tokens, own_labels)
                else:
                    fresh = tokens if ran == 0 else tokens[:, ran - network.prefix :]
                    logits = network(fresh, own_labels if ran == 0 else None, cache=memory, start=ran)
                    ran = network.prefix + tokens.shape[1]
                drawn = sample_token(
                    logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform[step]
                )
                tokens = torch.cat([tokens, drawn[:, None]], dim=1)
                done += len(tokens)
                if progress is not None:
                    progress(done, total)
            videos.append(tokens)
    finally:
        network.train(was_training)
    return torch.cat(videos)


def _labels(network: VideoTransformer, condition: int | torch.Tensor | None, n: int) -> torch.Tensor | None:
    if condition is None:
        return None
    if not network.num_classes:
        raise ValueError("condition was given for an unconditional network; pass None, or train one with num_classes=")
    labels = torch.full((n,), condition) if isinstance(condition, int) else condition
    if labels.shape != (n,) or int(labels.min()) < 0 or int(labels.max()) >= network.num_classes:
        raise ValueError(
            f"condition must be a class from 0 to {network.num_classes - 1}, or {n} of them, got {condition}"
        )
    return labels.long()
