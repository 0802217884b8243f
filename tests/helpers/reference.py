# SPDX-License-Identifier: Apache-2.0
"""The reference network written out in plain tensor algebra, with the context's gradients cut where a method says so.

Independent of the engines: no scaled_dot_product_attention, no patches, one full-length pass for all rows.
"""

from __future__ import annotations

import torch

from reco_lightning.models.transformer import VideoTransformer


def turn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = table[:, 0], table[:, 1]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., :half] * sin + x[..., half:] * cos], dim=-1)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, frozen: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention by matrix products; ``frozen`` (T, T) marks pairs whose key and value are constants."""
    rows = q.shape[-2]
    scores = q @ k.transpose(-1, -2)
    if frozen is not None:
        scores = torch.where(frozen, q @ k.detach().transpose(-1, -2), scores)
    scores = scores / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
    weights = scores.softmax(dim=-1)
    if frozen is None:
        return weights @ v
    return (weights * frozen) @ v.detach() + (weights * ~frozen) @ v


def forward(
    network: VideoTransformer,
    tokens: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    first: int = 0,
    context: str = "attached",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the states that the head reads, of all rows; rows before ``first`` are the context.

    ``frozen``: keys and values of context rows are constants to the window's rows, in every layer. ``keys``: the block
    inputs of context rows are constants in every layer. ``attached``: nothing is.
    """
    x = network.embedding(tokens)
    if network.condition is not None:
        if labels is None:
            labels = torch.full((len(tokens),), network.num_classes)
        x = torch.cat([network.condition(labels)[:, None], x], dim=1)
    batch, rows, dim = x.shape
    is_context = torch.arange(rows) < first
    frozen = (~is_context[:, None] & is_context[None, :]) if context == "frozen" else None
    for block in network.blocks:
        if context == "keys":
            x = torch.where(is_context[:, None], x.detach(), x)
        heads = block.attention.heads
        h = rms(x, block.attention_norm.weight) @ block.attention.qkv.weight.T
        q, k, v = (part.view(batch, rows, heads, dim // heads).transpose(1, 2) for part in h.split(dim, dim=-1))
        q, k = turn(q, network.query_table[:rows]), turn(k, network.key_table[:rows])
        h = attend(q, k, v, frozen).transpose(1, 2).reshape(batch, rows, dim)
        x = x + h @ block.attention.out.weight.T
        h = rms(x, block.feed_forward_norm.weight) @ block.gate_up.weight.T
        gate, up = h.split(h.shape[-1] // 2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    x = rms(x, network.norm.weight)
    return x @ network.head.weight.T, x
