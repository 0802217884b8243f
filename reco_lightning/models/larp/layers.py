# SPDX-License-Identifier: Apache-2.0
"""Parts of LARP's autoregressive network (Wang et al., arXiv 2410.21264), with the names of its released weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reco_lightning.models.transformer import cached_keys_values

__all__ = ["Block", "ClassEmbedding", "RMSNorm"]


class ClassEmbedding(nn.Module):
    """Vectors of classes, with one more for "no class", which labels below 0 have too.

    Args:
        num_classes: Number of classes.
        dim: D.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Returns the vectors (B, D) of labels (B,)."""
        return self.embedding_table(torch.where(labels < 0, self.num_classes, labels))


class RMSNorm(nn.Module):
    """Division by the root mean square, in float32, then a scale.

    Args:
        dim: D.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """States (..., D), normalised."""
        # rounded to the type of x before the scale, as in the release, which nn.RMSNorm does not
        states = x.float()
        states = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.eps)
        return states.to(x.dtype) * self.weight


class _Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim = config["dim"]
        self.heads, self.kv_heads = config["heads"], config["kv_heads"]
        self.head_dim = dim // self.heads
        self.dropout = config["attention_dropout"]
        self.wqkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(config["residual_dropout"])

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None, start: int | Tensor) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 K, n, E)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0, "is_causal": True}
        if cache is not None:
            k, v, mask = cached_keys_values(cache, k, v, start)
            options = {"attn_mask": mask}
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != self.heads, **options)
        return self.resid_dropout(self.wo(x.transpose(1, 2).flatten(2)))


class _FeedForward(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim, hidden_dim = config["dim"], config["hidden_dim"]
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.ffn_dropout = nn.Dropout(config["feed_forward_dropout"])

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """A pre-norm decoder block: causal attention, then a gated feed-forward network.

    Args:
        config: Arguments of `LARPTransformer`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config["dim"], config["norm_eps"])
        self.attention = _Attention(config)
        self.ffn_norm = RMSNorm(config["dim"], config["norm_eps"])
        self.feed_forward = _FeedForward(config)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int | Tensor = 0) -> Tensor:
        """States (B, n, D) of rows from ``start`` on; a cache of keys and values holds the rows before."""
        x = x + self.attention(self.attention_norm(x), cache, start)
        return x + self.feed_forward(self.ffn_norm(x))
