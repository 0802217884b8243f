# SPDX-License-Identifier: Apache-2.0
"""Samples video tokens behind captions, with transformers' key/value cache and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from reco_lightning.data.tokens.caption_ids import caption_ids, check_captions, load_text_tokenizer
from reco_lightning.models.sampling.token_sampling import SamplingOptions, per_sample_uniforms
from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.support.argument_checks import check_int, check_int_sequence
from reco_lightning.support.lightning_modules import is_lightning_module

__all__ = ["generate_from_text"]


@torch.no_grad()
def generate_from_text(
    model: pl.LightningModule | nn.Module,
    captions: Sequence[str] | torch.Tensor,
    *,
    tokenizer: Any = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> torch.Tensor:
    """Samples one video for each caption.

    Only video ids are drawn, whatever the network thinks of the others.

    Args:
        model: The trained `TextVideoModel`, or its network.
        captions: n texts, or their ids, (n, C) int64 with -1 for padding, as `caption_ids` makes them. An empty text
            is a caption; ids that are all padding are none.
        tokenizer: For texts: the text tokenizer, or its folder.
        indices: Indices of the n videos in the whole set; ``None`` is 0 to n - 1.
        batch_size: Videos sampled side by side, 1 or more.
        progress: Called with tokens done and in all.
        sampling: The fields of `SamplingOptions` by name: ``temperature``, ``top_k``, ``top_p``, ``cfg_scale``,
            ``seed``.

    Returns:
        Ids counted from 0, (n, N) int64, on the network's device.

    Raises:
        ValueError: If an argument is out of its range, or there are texts without a tokenizer.

    Example:
        >>> from reco_lightning.models.text_video.network import TextVideoNetwork
        >>> llama = {"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32}
        >>> llama |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = TextVideoNetwork(vocab_size=6, grid=(2, 1, 2), architecture=llama)
        >>> network.build()
        >>> generate_from_text(network, torch.tensor([[-1, 3], [4, 5]]), cfg_scale=2.0).shape
        torch.Size([2, 4])
    """
    network: Any = model.network if is_lightning_module(model) else model
    options = SamplingOptions(**sampling)
    check_int(at_least=1, batch_size=batch_size)
    check_int_sequence(indices=indices, or_none=True)
    if not isinstance(network, TextVideoNetwork) or network.language_model is None:
        unbuilt = ", which is not built: call build()" if isinstance(network, TextVideoNetwork) else ""
        raise ValueError(
            f"model must be a TextVideoNetwork, or a TextVideoModel with one, got a {type(network).__name__}{unbuilt}"
        )
    given = _ids(captions, tokenizer, network.text_ids)
    own = list(range(len(given)) if indices is None else indices)
    if len(own) != len(given):
        raise ValueError(f"indices must be {len(given)} numbers, one for each caption, or None, got {len(own)}")
    device = next(network.parameters()).device
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    videos: list[torch.Tensor] = []
    try:
        for begin in range(0, len(given), batch_size):
            rows = slice(begin, begin + batch_size)
            uniform = per_sample_uniforms(options.seed, own[rows], network.num_tokens)  # (N, B)
            if device.type != "mps":  # which has no float64
                uniform = uniform.to(device)
            run = _Run(network, given[rows].to(device), options.cfg_scale)
            tokens = torch.empty(len(given[rows]), 0, dtype=torch.long, device=device)
            for draws in uniform:
                token = options.draw(run.logits(tokens), draws)
                tokens = torch.cat([tokens, token[:, None]], dim=1)  # (B, m + 1)
                if progress is not None:
                    progress(begin * network.num_tokens + tokens.numel(), len(given) * network.num_tokens)
            videos.append(tokens)
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(videos)


class _Run:
    """A batch's way through a network: its captions, guidance and memory."""

    def __init__(self, network: Any, captions: torch.Tensor, scale: float) -> None:
        from transformers import DynamicCache

        self.network, self.scale, self.guided = network, scale, scale != 1
        self.captions = torch.cat([captions, torch.full_like(captions, -1)]) if self.guided else captions
        self.cache = DynamicCache()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits of video ids, (B, V), behind the tokens of a video, (B, m); all but the last were run."""
        if self.guided:
            tokens = tokens.repeat(2, 1)
        first = self.network.text_ids
        logits = self.network(self.captions, tokens, self.cache)[:, -1, first : first + self.network.vocab_size]
        if not self.guided:
            return logits
        given, free = logits.float().chunk(2)
        return free + self.scale * (given - free)


def _ids(captions: Sequence[str] | torch.Tensor, tokenizer: Any, text_ids: int) -> torch.Tensor:
    if not isinstance(captions, torch.Tensor):
        check_captions(captions)
    if not len(captions):
        raise ValueError("captions must be one or more, got 0")
    if not isinstance(captions, torch.Tensor):
        if not isinstance(tokenizer, str) and not callable(tokenizer):
            raise ValueError(
                "captions were given as texts, so tokenizer must be the text tokenizer or its folder, got "
                f"{tokenizer!r}"
            )
        captions = caption_ids(load_text_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, captions)
    if captions.is_floating_point() or captions.is_complex() or captions.dtype == torch.bool:
        raise ValueError(f"captions must be texts, or ids that are whole numbers, got {captions.dtype}")
    if captions.ndim != 2 or (captions.numel() and int(captions.max()) >= text_ids):
        raise ValueError(
            f"captions must be ids of shape (n, C) below the network's {text_ids} text ids, or -1 for padding, got "
            f"shape {tuple(captions.shape)} and ids up to {int(captions.max()) if captions.numel() else None}; is the "
            "text tokenizer the one of the training?"
        )
    return captions.long()
