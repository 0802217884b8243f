# SPDX-License-Identifier: Apache-2.0
"""Layers of OmniTokenizer (Wang et al., arXiv 2406.09399), named as in its checkpoints, and the stack made of them.

All take tokens (S, N, D): S sequences of N tokens of width D. In a spatial stack a sequence is the h * w ids of one
latent frame; in a temporal stack, the t ids of one place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig
from reco_lightning.tokenizers.omnitokenizer.positions import alibi, relative_index, rope_angles, rotate

__all__ = [
    "Attention",
    "FrozenBetaNorm",
    "PositionConv",
    "RelativeBias",
    "Stack",
    "WindowAttention",
    "feed_forward",
]

_SCALE = 8.0  # of the scores of unit-length queries and keys, whatever the width of a head


class FrozenBetaNorm(nn.Module):
    """Layer normalisation whose shift is a stored constant.

    Args:
        width: D.
    """

    beta: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to the same shape."""
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta)


class PositionConv(nn.Module):
    """Depthwise convolution over a (t, h, w) grid, by which tokens learn their place.

    It reads the memory of the tokens as (B, t, h, w, D). In temporal stacks, whose memory is (B, h, w, t, D), it
    mixes far places and later frames into each token. The checkpoints were trained so; hence the ids are not causal.

    Args:
        width: D.
        causal: Pad in front along t; otherwise on both sides.
    """

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, 2, 0) if causal else (0, 0, 0, 0, 1, 1)
        self.dsconv = nn.Conv3d(width, width, 3, padding=(0, 1, 1), groups=width)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Maps tokens (S, N, D) of B grids (t, h, w), S * N = B * t * h * w, to the same shape."""
        volume = x.reshape(-1, *grid, x.shape[-1]).movedim(-1, 1)  # (B, D, t, h, w), channels last in memory
        return self.dsconv(F.pad(volume, self.padding)).movedim(1, -1).reshape(x.shape)


class RelativeBias(nn.Module):
    """Score of each pair of tokens of a grid from their offset, by a small network.

    Args:
        width: D, hidden channels.
        heads: H.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.1)),
            nn.Linear(width, heads),
        )

    def forward(self, height: int, width: int) -> Tensor:
        """Bias (H, h * w, h * w) of a grid of h x w tokens."""
        weight = next(self.net.parameters())
        down = torch.arange(1 - height, height, device=weight.device)
        right = torch.arange(1 - width, width, device=weight.device)
        offsets = torch.cartesian_prod(down, right).float()  # ((2 h - 1) * (2 w - 1), 2), each once
        table = self.net((offsets.sign() * offsets.abs().log1p()).to(weight.dtype))  # (offsets, H)
        return table.T[:, relative_index(height, width, weight.device)]


class Attention(nn.Module):
    """Attention with unit-length queries and keys; keys and values come from the input before its normalisation.

    Args:
        config: Sizes and options.
        spatial: Whether the layer stands in a spatial stack.
    """

    def __init__(self, config: OmniTokenizerConfig, *, spatial: bool) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm = FrozenBetaNorm(config.embedding_dim)
        self.to_q = nn.Linear(config.embedding_dim, inner, bias=False)
        self.to_kv = nn.Linear(config.embedding_dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(config.dim_head))
        self.k_scale = nn.Parameter(torch.ones(config.dim_head))
        self.to_out = nn.Linear(inner, config.embedding_dim, bias=False)
        if spatial and config.spatial_pos == "rel":
            self.spatial_rel_pos_bias = RelativeBias(config.embedding_dim, config.heads)

    def forward(self, x: Tensor, angles: Tensor | None, bias: Tensor | None) -> Tensor:
        """Attends within each sequence.

        Args:
            x: (S, N, D).
            angles: Rotary positions (N, dim_head / 2), or None.
            bias: Added to the scores, (N, N) or (H, N, N), or None.

        Returns:
            (S, N, D).
        """
        q, k, v = (
            rearrange(part, "s n (h c) -> s h n c", h=self.heads)
            for part in (self.to_q(self.norm(x)), *self.to_kv(x).chunk(2, dim=-1))
        )
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q = (F.normalize(q, dim=-1) * self.q_scale).to(v.dtype)
        k = (F.normalize(k, dim=-1) * self.k_scale).to(v.dtype)
        bias = None if bias is None else bias.to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=_SCALE)
        return self.to_out(rearrange(out, "s h n c -> s n (h c)"))


class WindowAttention(nn.Module):
    """Attention within square windows that do not overlap, with a learned bias per offset.

    Args:
        config: Sizes and options.
    """

    relative_position_index: Tensor

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        width, side = config.embedding_dim, config.twod_window_size
        self.heads, self.side = config.heads, side
        self.norm = FrozenBetaNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * side - 1) ** 2, config.heads) * 0.02)
        self.register_buffer("relative_position_index", relative_index(side, side))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Maps tokens (S, h * w, D), h and w multiples of the window's side, to the same shape."""
        sizes = {"r": height // self.side, "i": self.side, "c": width // self.side, "j": self.side}
        x = rearrange(self.norm(x), "s (r i c j) d -> (s r c) (i j) d", **sizes)
        q, k, v = rearrange(self.qkv(x), "s n (p h c) -> p s h n c", p=3, h=self.heads)
        bias = self.relative_position_bias_table[self.relative_position_index].movedim(-1, 0)  # (H, N, N)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(v.dtype))
        out = self.proj(rearrange(out, "s h n c -> s n (h c)"))
        return rearrange(out, "(s r c) (i j) d -> s (r i c j) d", **sizes)


class _GatedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Builds a gated feed-forward layer (S, N, D) to (S, N, D), its parts numbered as in the checkpoints.

    Args:
        width: D.
        hidden: Channels inside.

    Example:
        >>> [name for name, _ in feed_forward(4, 8).named_parameters()]
        ['0.weight', '0.bias', '1.weight', '4.weight']
    """
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 2 * hidden, bias=False),
        _GatedGELU(),
        nn.Identity(),  # dropout, at training
        nn.Linear(hidden, width, bias=False),
    )


class _Layer(nn.ModuleDict):
    """Positions, attention and feed-forward layer under their numbers in the checkpoints; windows need no positions."""

    def __init__(self, config: OmniTokenizerConfig, letter: str, *, spatial: bool) -> None:
        super().__init__()
        self.explicit = config.explicit_attention and spatial and config.spatial_pos == "rel"
        self.windows = letter == "w"
        if not self.windows:
            self["0"] = PositionConv(config.embedding_dim, causal=config.causal_in_peg)
        self["1"] = WindowAttention(config) if self.windows else Attention(config, spatial=spatial)
        self["3"] = feed_forward(config.embedding_dim, config.ff_width)

    def forward(self, x: Tensor, grid: tuple[int, int, int], angles: Tensor | None, bias: Tensor | None) -> Tensor:
        attention: Any = self["1"]
        if self.windows:
            x = x + attention(x, *grid[1:])
        else:
            if self.explicit:
                bias = attention.spatial_rel_pos_bias(*grid[1:])
            x = x + self["0"](x, grid)
            x = x + attention(x, angles, bias)
        return x + self["3"](x)


class Stack(nn.Module):
    """Transformer over the places of a frame, or over the frames of a place.

    Args:
        config: Sizes and options.
        blocks: One letter per layer, "t" full or "w" window attention.
        spatial: Whether sequences are the places of a frame.
    """

    def __init__(self, config: OmniTokenizerConfig, blocks: str, *, spatial: bool) -> None:
        super().__init__()
        self.config, self.spatial = config, spatial
        self.layers = nn.ModuleList(_Layer(config, letter, spatial=spatial) for letter in blocks)
        self.norm_out = FrozenBetaNorm(config.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps features (B, t, h, w, D) to the same shape."""
        batch, t, h, w, _ = x.shape
        rotary = self.spatial and self.config.spatial_pos == "rope"
        angles = rope_angles(h, w, self.config.dim_head, x.device) if rotary else None
        bias = None if self.spatial else self._temporal_bias(t, x.device)
        x = rearrange(x, "b t h w d -> (b t) (h w) d" if self.spatial else "b t h w d -> (b h w) t d")
        for layer in self.layers:
            x = layer(x, (t, h, w), angles, bias)
        sizes = {"b": batch, "h": h, "w": w}
        pattern = "(b t) (h w) d -> b t h w d" if self.spatial else "(b h w) t d -> b t h w d"
        return rearrange(self.norm_out(x), pattern, **sizes)

    def _temporal_bias(self, tokens: int, device: torch.device) -> Tensor:
        bias = torch.zeros(tokens, tokens, device=device)
        if self.config.explicit_attention:
            bias = alibi(self.config.heads, tokens, device)
        if self.config.causal_in_temporal_transformer:
            future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
            bias = bias.masked_fill(future, -math.inf)
        return bias
