# SPDX-License-Identifier: Apache-2.0
"""The reference network: a Llama-style decoder over the tokens of a video (RMSNorm, SwiGLU, rotary positions in 3-D).

The sizes ``110m``, ``343m`` and ``770m`` are those of arXiv 2604.07402, §6.1. The network knows nothing of windows.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from reco_lightning.support.argument_checks import (
    check_finite,
    check_flag,
    check_int,
    check_video_grid,
)
from reco_lightning.support.causal_mask import causal_mask

__all__ = [
    "SIZES",
    "KeyValueCache",
    "SizeName",
    "VideoTransformer",
    "cached_keys_values",
    "rotary_table",
    "rotate",
    "token_places",
]

SizeName = Literal["110m", "343m", "770m"]

SIZES: dict[str, dict[str, int]] = {
    "110m": {"depth": 12, "dim": 768, "heads": 12},
    "343m": {"depth": 24, "dim": 1024, "heads": 16},
    "770m": {"depth": 36, "dim": 1280, "heads": 20},
}


def token_places(grid: tuple[int, int, int]) -> torch.Tensor:
    """Returns the positions (frame block, row, column) of a grid's tokens, in order of time, then rows, then columns.

    The first entry is the prefix's, one step before the origin on every axis.

    Args:
        grid: Frame blocks, rows and columns of the token grid.

    Returns:
        Places, (1 + N, 3) with N the number of tokens.

    Example:
        >>> token_places((1, 1, 2)).tolist()
        [[-1, -1, -1], [0, 0, 0], [0, 0, 1]]
    """
    return torch.cat([torch.full((1, 3), -1), torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, 3)])


def rotary_table(places: torch.Tensor, head_dim: int, base: float = 10_000.0) -> torch.Tensor:
    """Returns the cosines and sines that turn the pairs of a head by a place.

    A quarter of the pairs turns by time, the rest by row and column.

    Args:
        places: Places, (N, 3).
        head_dim: Width of a head; even.
        base: Ratio of the slowest to the fastest turn.

    Returns:
        Table, (N, 2, head_dim / 2), float32.

    Raises:
        ValueError: If ``head_dim`` is odd or below 6.
    """
    pairs = head_dim // 2
    if head_dim % 2 or pairs < 3:
        raise ValueError(
            f"head_dim = dim / heads must be even and 6 or more, got {head_dim}; choose dim and heads anew"
        )
    rows = (pairs - max(pairs // 4, 1)) // 2
    shares = (pairs - 2 * rows, rows, rows)
    angles = torch.cat(
        [
            places[:, axis, None].double() * base ** (-torch.arange(share, dtype=torch.float64) / share)
            for axis, share in enumerate(shares)
        ],
        dim=1,
    )  # (N, pairs)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def rotate(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of queries or keys.

    Args:
        states: Queries or keys, (B, H, n, head_dim); pairs are the entries i and i + head_dim / 2.
        table: A ``rotary_table`` of the n rows, (n, 2, head_dim / 2).

    Returns:
        The turned states, (B, H, n, head_dim), in the type of ``states``.
    """
    cos, sin = table[:, 0], table[:, 1]  # (n, head_dim / 2)
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(states.dtype)


class KeyValueCache(NamedTuple):
    """Keys and values of the rows that were run, per block, in memory set aside once.

    Args:
        keys: (L, B, H, T, head_dim), or one (B, H, T, head_dim) a block.
        values: As ``keys``.
    """

    keys: torch.Tensor | tuple[torch.Tensor, ...]
    values: torch.Tensor | tuple[torch.Tensor, ...]


def cached_keys_values(
    cache: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, start: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Puts the keys and values of new rows into a block's memory and gives what the rows attend to.

    Args:
        cache: Keys and values of all T rows, (B, H, T, head_dim) each; written to.
        keys: Those of the n new rows, (B, H, n, head_dim).
        values: As ``keys``.
        start: The first new row. A number gives the keys up to the last new row; a tensor without dimensions gives
            all T of them and a mask, so that the shapes are those of every other row.

    Returns:
        Keys, values and the mask of attention, which may be ``None``.
    """
    rows = keys.shape[2]
    if isinstance(start, torch.Tensor):
        places = start + torch.arange(rows, device=keys.device)
        for memory, fresh in zip(cache, (keys, values), strict=True):
            memory.index_copy_(2, places, fresh.to(memory.dtype))
        return *cache, torch.arange(cache[0].shape[2], device=keys.device) <= places[:, None]
    stop = start + rows
    cache[0][:, :, start:stop] = keys
    cache[1][:, :, start:stop] = values
    mask = None if rows == 1 else causal_mask(rows, stop, keys.device)
    return cache[0][:, :, :stop], cache[1][:, :, :stop], mask


class Attention(nn.Module):
    """Causal self-attention; a query is turned by the place that its row predicts, a key by the place that it holds."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        query_table: torch.Tensor,
        key_table: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        start: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        q, k = rotate(q, query_table), rotate(k, key_table)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            x = F.scaled_dot_product_attention(q, *cached_keys_values(cache, k, v, start))
        return self.out(rearrange(x, "b h n e -> b n (h e)"))


class Block(nn.Module):
    """A pre-norm decoder block: attention, then a gated feed-forward network."""

    def __init__(self, dim: int, heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=1e-5)
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        query_table: torch.Tensor,
        key_table: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        start: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), query_table, key_table, cache, start))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class VideoTransformer(nn.Module):
    """A causal decoder over the tokens of a (t, h, w) grid, unconditional or class-conditional.

    The sequence is the class (or, without one, a learned start token) followed by the tokens; row r predicts token r.
    With ``start_token=False`` the sequence is the tokens alone; row r predicts token r + 1, and the first token is not
    predicted.

    Args:
        vocab_size: V, the number of token ids.
        grid: Frame blocks, rows and columns of the token grid; their product is N.
        dim: D, the width; a multiple of ``heads``.
        depth: L, the number of blocks.
        heads: Attention heads.
        hidden_dim: Width of the feed-forward network; ``None`` is 8/3 ``dim``, rounded up to a multiple of 256 (64
            below a width of 512).
        num_classes: Number of classes; 0 is unconditional. One more embedding stands for "no class".
        start_token: Whether a prefix of one row stands in front of the tokens.
        dropout: Dropout probability in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> network = VideoTransformer(vocab_size=32, grid=(2, 2, 2), dim=32, depth=1, heads=2)
        >>> network(torch.zeros(1, 7, dtype=torch.long)).shape
        torch.Size([1, 8, 32])
    """

    key_table: torch.Tensor
    query_table: torch.Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        grid: tuple[int, int, int],
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden_dim: int | None = None,
        num_classes: int = 0,
        start_token: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_int(at_least=1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        check_int(at_least=0, num_classes=num_classes)
        check_int(at_least=1, or_none=True, hidden_dim=hidden_dim)
        check_finite(dropout=dropout)
        check_video_grid(grid=grid)
        check_flag(start_token=start_token)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
        if num_classes and not start_token:
            raise ValueError(
                f"num_classes must be 0 without a start token, got num_classes={num_classes} and start_token=False; "
                "the class stands in the start token's place"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if hidden_dim is None:
            multiple = 256 if dim >= 512 else 64
            hidden_dim = -(-8 * dim // 3 // multiple) * multiple
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "grid": tuple(grid),
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "hidden_dim": hidden_dim,
            "num_classes": num_classes,
            "start_token": start_token,
            "dropout": dropout,
        }
        self.vocab_size = vocab_size
        self.heads = heads
        self.grid = (grid[0], grid[1], grid[2])
        self.num_tokens = grid[0] * grid[1] * grid[2]
        self.num_classes = num_classes
        self.prefix = int(start_token)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.condition = nn.Embedding(num_classes + 1, dim) if start_token else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(dim, heads, hidden_dim, dropout) for _ in range(depth)])
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        tables = self._tables()
        self.register_buffer("key_table", tables[0], persistent=False)
        self.register_buffer("query_table", tables[1], persistent=False)
        self.reset_parameters()

    @classmethod
    def from_name(
        cls,
        name: SizeName,
        *,
        vocab_size: int,
        grid: tuple[int, int, int],
        num_classes: int = 0,
        start_token: bool = True,
        dropout: float = 0.0,
    ) -> VideoTransformer:
        """Builds one of the paper's sizes.

        Args:
            name: ``"110m"`` (12 x 768 x 12 heads), ``"343m"`` (24 x 1024 x 16) or ``"770m"`` (36 x 1280 x 20).
            vocab_size: As in the constructor.
            grid: As in the constructor.
            num_classes: As in the constructor.
            start_token: As in the constructor.
            dropout: As in the constructor.

        Returns:
            The network, with fresh weights.

        Raises:
            ValueError: If the name is unknown.
        """
        if name not in SIZES:
            raise ValueError(
                f"name must be one of {', '.join(SIZES)}, got {name!r}; give dim, depth and heads for others"
            )
        return cls(
            vocab_size=vocab_size,
            grid=grid,
            num_classes=num_classes,
            start_token=start_token,
            dropout=dropout,
            **SIZES[name],
        )

    def reset_parameters(self) -> None:
        """Draws fresh weights and fills the rotary tables, which a network made on the meta device needs as well.

        Normal of deviation 0.02, less by depth for the projections that end a residual branch.
        """
        for buffer, table in zip((self.key_table, self.query_table), self._tables(), strict=True):
            buffer.copy_(table)
        depth = len(self.blocks)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                ends_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if ends_branch else 0.02)

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        table = rotary_table(token_places(self.grid), self.config["dim"] // self.heads)  # (1 + N, 2, E / 2)
        # A row predicts the place behind the one that it holds; for the last token's row any place will do.
        return table[1 - self.prefix :], torch.cat([table[2 - self.prefix :], table[-1:]])

    def new_cache(self, batch: int) -> KeyValueCache:
        """Sets memory aside for the keys and values of ``batch`` full sequences, in the weights' type and place."""
        weight = self.head.weight
        shape = (len(self.blocks), batch, self.heads, self.prefix + self.num_tokens, weight.shape[1] // self.heads)
        # not weight.new_zeros: a sharded weight would give a sharded memory
        memory = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KeyValueCache(*memory)

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        start: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """Returns the logits of the next token at every row.

        Args:
            tokens: Token ids, (B, n) int64 with n up to N; with a cache those from row ``start`` on.
            labels: Classes, (B,) int64 from 0 to ``num_classes`` (the last is "no class"); ``None`` is "no class" for
                all.
            cache: Memory from ``new_cache`` that holds the rows before ``start`` and takes the new ones.
            start: Row at which ``tokens`` begin; 0 also runs the prefix. A tensor without dimensions, int64 and on the
                tokens' device, of a value above 0, keeps all shapes the same for every row: for ``torch.compile``.

        Returns:
            Logits, (B, n + prefix, V), or (B, n, V) from a ``start`` above 0.

        Raises:
            ValueError: If ``tokens`` are more than the grid holds, labels are given to a network without classes, or
                ``start`` is above 0 without a cache.
        """
        inside = isinstance(start, torch.Tensor) or start > 0  # a tensor's value is not looked at
        if inside and cache is None:
            raise ValueError(f"start must be 0 without a cache, got {start}; pass the cache that holds the rows before")
        if labels is not None and not self.num_classes:
            raise ValueError("labels were given to an unconditional network; build it with num_classes=, or pass None")
        x = self.embedding(tokens)  # (B, n, D)
        if not inside and self.condition is not None:
            if labels is None:
                labels = tokens.new_full((tokens.shape[0],), self.num_classes)
            x = torch.cat([self.condition(labels)[:, None], x], dim=1)
        places: slice | torch.Tensor
        if isinstance(start, torch.Tensor):
            places = start + torch.arange(x.shape[1], device=x.device)
        else:
            places = slice(start, start + x.shape[1])
            if places.stop > self.prefix + self.num_tokens:
                raise ValueError(
                    f"tokens reach row {places.stop}, but the grid {self.grid} has {self.prefix + self.num_tokens} rows"
                )
        x = self.dropout(x)
        queries, keys = self.query_table[places], self.key_table[places]
        for index, block in enumerate(self.blocks):
            if cache is None:
                x = block(x, queries, keys)
            else:
                x = block(x, queries, keys, (cache.keys[index], cache.values[index]), start)
        return self.head(self.norm(x))
