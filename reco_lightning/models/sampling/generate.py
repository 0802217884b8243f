# SPDX-License-Identifier: Apache-2.0
"""Samples the tokens of videos from a trained network, with a key/value cache, also past the trained length.

Comes after training; a tokenizer's ``decode`` turns the tokens into video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions, per_sample_uniforms
from reco_lightning.models.transformer import KeyValueCache
from reco_lightning.support.argument_checks import check_flag, check_int, check_int_sequence, check_tensor
from reco_lightning.support.lightning_modules import is_lightning_module

__all__ = ["generate", "window_start"]

_CHUNK = 256  # rows of a context that are run at once: bounds the memory of their logits


@torch.no_grad()
def generate(
    model: pl.LightningModule | nn.Module,
    n: int,
    *,
    condition: int | torch.Tensor | None = None,
    first_tokens: torch.Tensor | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 16,
    cache: bool = True,
    compile: bool | str | Callable[..., Any] = False,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> torch.Tensor:
    """Samples videos' tokens.

    The network sees a window of frame blocks: when it is full, its last ``context_blocks`` become the first blocks of
    the next one, are run again at those places, and the rest of the window is sampled behind them. So a video may be
    longer than the K blocks that the network was trained on. Fewer-Frames' iterative inference is ``context_blocks=1``
    with ``window_blocks=2``, the blocks that were trained together. The network's memory is that of one window, however
    long the video.

    Args:
        model: The trained module, whose ``network`` is sampled from, or the network itself: a ``VideoTransformer`` or
            anything with its ``forward``, ``new_cache``, ``num_tokens``, ``num_classes`` and ``prefix``. Weights and
            cache keep their type; bfloat16 is ``model.bfloat16()``, or the caller's ``torch.autocast``.
        n: Number of videos, 1 or more.
        condition: A class for all videos or one each, (n,); ids that stand in front of the tokens, as text or encoded
            frames, (n, C) int64, for a network with ``condition_tokens`` = C; ``None`` is unconditional.
        first_tokens: Tokens to continue from, as those of first frames, (n, m) int64 with 0 < m < N; needed where the
            network has no start token.
        indices: Indices of the n videos in the whole set; ``None`` is 0 to n - 1.
        batch_size: Videos sampled side by side, 1 or more.
        cache: Whether to keep keys and values (fast) or run the whole window for each token.
        compile: Compiles the step of one token: ``True`` by inductor (with CUDA graphs on CUDA), else the backend for
            ``torch.compile``. All shapes stay the same, so that there is one graph; the last batch is filled up.
        progress: Called with tokens done and in all.
        sampling: The fields of `VideoSamplingOptions` by name: ``temperature``, ``top_k``, ``top_p``, ``cfg_scale``,
            ``seed``, ``length``, ``window_blocks``, ``context_blocks``.

    Returns:
        Token ids, (n, N) int64, or (n, length * h * w), on the network's device; without the ids of a condition.

    Raises:
        ValueError: If an argument is out of its range, or the network has no use for it.

    Example:
        >>> from reco_lightning.models.transformer import VideoTransformer
        >>> network = VideoTransformer(vocab_size=32, grid=(2, 2, 2), dim=32, depth=1, heads=2)
        >>> generate(network, 3, seed=1).shape, generate(network, 3, length=7, context_blocks=1).shape
        (torch.Size([3, 8]), torch.Size([3, 28]))
    """
    network: Any = model.network if is_lightning_module(model) else model
    options = VideoSamplingOptions(**sampling)
    check_int(at_least=1, n=n, batch_size=batch_size)
    if isinstance(indices, torch.Tensor):
        indices = indices.tolist()
    check_int_sequence(indices=indices, or_none=True)
    check_flag(cache=cache)
    if not isinstance(compile, (bool, str)) and not callable(compile):
        raise ValueError(f"compile must be True, False or a backend of torch.compile, got {compile!r}")
    if not hasattr(network, "num_tokens"):
        raise ValueError(f"model must be a network or a LightningModule with one, got a {type(network).__name__}")
    if compile and not cache:
        raise ValueError("compile needs cache=True: without a cache every token has a shape of its own")
    labels, given = _condition(network, condition, n, options.cfg_scale)
    total, window, kept = _lengths(network, network.num_tokens - given.shape[1], options)
    first_tokens = _first_tokens(network, first_tokens, n, given.shape[1], total)
    own = range(n) if indices is None else [int(index) for index in indices]
    if len(own) != n:
        raise ValueError(f"indices must be n={n} numbers, one for each video, or None, got {len(own)}")
    device = next(network.parameters()).device
    begun = first_tokens.shape[1]
    done, videos = 0, []
    guided = options.cfg_scale != 1
    memory: KeyValueCache | None = None
    step = _compiled_step(compile, device) if compile else None
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        for begin in range(0, n, batch_size):
            rows = list(range(begin, min(begin + batch_size, n)))
            count = len(rows)
            if compile:
                rows += rows[-1:] * (min(batch_size, n) - count)
            uniform = per_sample_uniforms(options.seed, [own[row] for row in rows], total - begun)  # (total - m, B)
            if device.type != "mps":  # which has no float64
                uniform = uniform.to(device)
            tokens = torch.empty(len(rows), total, dtype=torch.long, device=device)
            tokens[:, :begun] = first_tokens[rows]
            if cache and (memory is None or memory.keys[0].shape[0] != len(rows) * (1 + guided)):
                memory = _set_aside(network, len(rows) * (1 + guided), compile)
            own_labels = None if labels is None else labels[rows].to(device)
            run = _Run(network, given[rows].to(device), own_labels, options.cfg_scale, memory, step)
            for place in range(begun, total):
                start = window_start(place, window, kept)
                if place == begun or start != window_start(place - 1, window, kept):
                    logits = run.begin(tokens[:, start:place])
                else:
                    logits = run.go_on(tokens[:, start:place])
                tokens[:, place] = options.draw(logits, uniform[place - begun])
                done += count
                if progress is not None:
                    progress(done, n * (total - begun))
            videos.append(tokens[:count])
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(videos)


def window_start(place: int, window: int, kept: int) -> int:
    """Returns the first token of the window in which a token is sampled.

    Windows begin at 0 and then every ``window - kept`` tokens; a token belongs to the first that holds it.

    Args:
        place: The token's place in the video, 0 or more.
        window: Tokens of a window.
        kept: Tokens that a window shares with the one before, below ``window``.

    Example:
        >>> [window_start(place, window=6, kept=2) for place in (0, 5, 6, 9, 10)]
        [0, 0, 4, 4, 8]
    """
    if place < window:
        return 0
    return ((place - window) // (window - kept) + 1) * (window - kept)


class _Run:
    """A batch's way through a network: its condition, guidance and memory."""

    def __init__(
        self,
        network: Any,
        given: torch.Tensor,
        labels: torch.Tensor | None,
        scale: float,
        memory: KeyValueCache | None,
        compiled: Callable[..., torch.Tensor] | None,
    ) -> None:
        self.network, self.scale = network, scale
        self.guided = scale != 1
        self.given = self._doubled(given)  # (B, C), or (2 B, C) like all that follows
        self.labels = labels
        if self.guided and labels is not None:
            self.labels = torch.cat([labels, torch.full_like(labels, network.num_classes)])
        self.memory, self.compiled = memory, compiled
        self.row: int | torch.Tensor = 0

    def begin(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, V) behind the tokens of a window, (B, m), whatever was run before."""
        tokens = torch.cat([self.given, self._doubled(tokens)], dim=1)
        if self.memory is None:
            return self._guide(self.network(tokens, self.labels)[:, -1])
        end = max(_CHUNK, getattr(self.network, "condition_tokens", 0))  # a condition is run in one piece
        logits = self.network(tokens[:, :end], self.labels, cache=self.memory, start=0)[:, -1]
        while end < tokens.shape[1]:
            logits = _step(self.network, tokens[:, end : end + _CHUNK], self.memory, self.network.prefix + end)
            end += _CHUNK
        row = self.network.prefix + tokens.shape[1]
        self.row = torch.tensor(row, device=tokens.device) if self.compiled else row
        return self._guide(logits)

    def go_on(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, V) behind the tokens of a window, all but the last of which were run before."""
        if self.memory is None:
            return self.begin(tokens)
        step = self.compiled or _step
        logits = step(self.network, self._doubled(tokens[:, -1:]), self.memory, self.row)
        self.row = self.row + 1
        return self._guide(logits)

    def _doubled(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat(2, 1) if self.guided else rows

    def _guide(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.guided:
            return logits
        given, free = logits.float().chunk(2)
        return free + self.scale * (given - free)


def _step(network: Any, tokens: torch.Tensor, memory: KeyValueCache, row: int | torch.Tensor) -> torch.Tensor:
    return network(tokens, None, cache=memory, start=row)[:, -1]


def _set_aside(network: Any, rows: int, compile: bool | str | Callable[..., Any]) -> KeyValueCache:
    memory = network.new_cache(rows)
    if not compile:
        return memory
    # one tensor a block: written to as a part of a larger one, a compiled step would copy the whole
    keys, values = (tuple(part.clone() for part in parts) for parts in memory)
    for part in (*keys, *values):
        # CUDA graphs leave out what writes to other inputs; guarded, as torch 2.9 does, each call would compile anew
        torch._dynamo.mark_static_address(part, guard=False)
    return KeyValueCache(keys, values)


def _compiled_step(compile: bool | str | Callable[..., Any], device: torch.device) -> Callable[..., torch.Tensor]:
    if compile is not True:
        return torch.compile(_step, fullgraph=True, dynamic=False, backend=compile)  # type: ignore[arg-type]
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(_step, fullgraph=True, dynamic=False, mode=mode)


def _condition(
    network: Any, condition: int | torch.Tensor | None, n: int, cfg_scale: float
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Labels (n,) of a class, and ids (n, C) in front of the tokens."""
    nothing = torch.zeros(n, 0, dtype=torch.long)
    if isinstance(condition, torch.Tensor) and condition.ndim == 2:
        taken = getattr(network, "condition_tokens", 0)
        if not taken:
            raise ValueError(
                "condition was given as ids in front of the tokens, which the network does not take; pass a class, or "
                "tokens to continue from as first_tokens"
            )
        if tuple(condition.shape) != (n, taken):
            raise ValueError(f"condition must be ids of shape {(n, taken)}, got {tuple(condition.shape)}")
        labels, given = None, condition.long()
    else:
        labels, given = _labels(network, condition, n), nothing
    if cfg_scale != 1 and labels is None:
        raise ValueError(f"cfg_scale must be 1 where condition gives no class to be guided by, got {cfg_scale}")
    return labels, given


def _labels(network: Any, condition: int | torch.Tensor | None, n: int) -> torch.Tensor | None:
    if condition is None:
        return None
    if not network.num_classes:
        raise ValueError("condition was given for an unconditional network; pass None, or train one with num_classes=")
    if not isinstance(condition, torch.Tensor):
        check_int(condition=condition)
    labels = condition if isinstance(condition, torch.Tensor) else torch.full((n,), condition)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"condition must hold whole numbers, got {labels.dtype}")
    if labels.shape != (n,) or int(labels.min()) < 0 or int(labels.max()) >= network.num_classes:
        raise ValueError(
            f"condition must be a class from 0 to {network.num_classes - 1}, or {n} of them, got {condition}"
        )
    return labels.long()


def _lengths(network: Any, trained: int, options: VideoSamplingOptions) -> tuple[int, int, int]:
    """Tokens of a video, of a window, and of what a window shares with the one before."""
    length, window_blocks, context_blocks = options.length, options.window_blocks, options.context_blocks
    if length is None and window_blocks is None and context_blocks is None:
        return trained, trained, 0
    grid: Sequence[int] = getattr(network, "grid", ())
    if len(grid) != 3 or grid[0] * grid[1] * grid[2] != trained:
        raise ValueError(
            "length, window_blocks and context_blocks must be None for a network whose tokens lie on no grid of frame "
            f"blocks, got {length}, {window_blocks} and {context_blocks}"
        )
    blocks, block = grid[0], grid[1] * grid[2]
    length = blocks if length is None else length
    window = blocks if window_blocks is None else window_blocks
    if window > blocks:
        raise ValueError(f"window_blocks must be 1 to the network's {blocks}, or None for {blocks}, got {window}")
    if length > window == 1:
        raise ValueError(f"length must be 1 for a window of a single frame block, which has no context, got {length}")
    if context_blocks is not None and context_blocks >= window:
        raise ValueError(
            f"context_blocks must be 1 to {window - 1}, fewer than the {window} frame blocks of a window, or None for "
            f"{window - 1}, got {context_blocks}"
        )
    return length * block, window * block, (window - 1 if context_blocks is None else context_blocks) * block


def _first_tokens(network: Any, first_tokens: torch.Tensor | None, n: int, given: int, total: int) -> torch.Tensor:
    least = 0 if network.prefix or given else 1
    if first_tokens is None:
        if least:
            raise ValueError(
                "the network has no start token, so first_tokens must give at least one token a video; got None"
            )
        return torch.zeros(n, 0, dtype=torch.long)
    check_tensor(first_tokens=first_tokens)
    if first_tokens.is_floating_point() or first_tokens.is_complex() or first_tokens.dtype == torch.bool:
        raise ValueError(f"first_tokens must be whole numbers, got {first_tokens.dtype}")
    shape = tuple(first_tokens.shape)
    if len(shape) != 2 or shape[0] != n or not least <= shape[1] < total:
        raise ValueError(f"first_tokens must be (n, m) with n={n} and m from {least} to {total - 1}, got {shape}")
    low, high = (int(first_tokens.min()), int(first_tokens.max())) if first_tokens.numel() else (0, 0)
    if low < 0 or high >= network.vocab_size:
        raise ValueError(f"first_tokens must be 0 to {network.vocab_size - 1}, got {low} to {high} in shape {shape}")
    return first_tokens
