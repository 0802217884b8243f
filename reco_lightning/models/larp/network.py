# SPDX-License-Identifier: Apache-2.0
"""LARP's autoregressive network (Wang et al., arXiv 2410.21264) over the holistic ids of its tokenizer.

A Llama-style decoder with learned absolute positions, class-conditional or for frame prediction. `VideoModel`
trains it, `ReCoCallback` windows it, and `generate` samples from it; `from_pretrained` loads the released weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from reco_lightning.models.larp.config import arguments_from_json, check_arguments, hidden_width
from reco_lightning.models.larp.layers import Block, ClassEmbedding, RMSNorm
from reco_lightning.models.transformer import KeyValueCache
from reco_lightning.tokenizers.larp.folder import load_weights, read_config, read_weights
from reco_lightning.tokenizers.larp.tables import sine_table

__all__ = ["Guided", "LARPTransformer"]


class LARPTransformer(nn.Module):
    """A causal decoder over the ids of `LARPTokenizer`, of one of two layouts.

    Class-conditional (``condition_tokens=0``): the sequence is the class followed by the ids; row r predicts id r.

    Frame prediction (``condition_tokens=C``): the sequence is the C ids of the first frames, a separator, and the N ids
    of the whole clip, and those N are predicted. ``tokens`` are then (B, C + N), ids of the condition first, and logits
    are those of the N alone; `generate` takes the condition as ``first_tokens``.

    **Ids are holistic**: in the order of the tokenizer's queries, not of frames. `WindowSampler(frame_blocks=4,
    tokens_per_block=256)` makes windows of equal ranges of the 1024 ids; a "frame block" is then a quarter of the
    clip's description, the context in front of a window is another part of that description and not the past, and
    continuity is that of neighbouring ids. The sampler counts the N predicted ids, not the condition's.

    Args:
        vocab_size: V, the number of ids.
        video_tokens: N, ids of a clip.
        condition_tokens: C, ids of the first frames in front; 0 is class-conditional.
        num_classes: Number of classes; one more embedding stands for "no class". 0 with a condition.
        dim: D, the width.
        depth: Blocks.
        heads: Attention heads.
        kv_heads: Heads of keys and values; None is as many as ``heads``.
        hidden_dim: Width of the feed-forward network; None is 8/3 ``dim``, rounded up to a multiple of 256.
        norm_eps: Added to the mean square in norms.
        learned_positions: Whether positions are trained, or fixed sines.
        token_dropout: Dropout of embeddings, [0, 1), like the others.
        attention_dropout: Dropout of attention weights.
        residual_dropout: Dropout of what attention adds.
        feed_forward_dropout: Dropout of what the feed-forward network adds.

    Attributes:
        num_tokens: Ids of a sample, C + N.
        grid: (num_tokens,); ids lie on no grid.
        prefix: Rows in front of the first id that is given: 1 for the class, 0 with a condition.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> network = LARPTransformer(vocab_size=32, video_tokens=8, num_classes=3, dim=32, depth=1, heads=2)
        >>> network(torch.zeros(1, 7, dtype=torch.long), torch.tensor([2])).shape
        torch.Size([1, 8, 32])
    """

    abs_pe: Tensor

    def __init__(
        self,
        *,
        vocab_size: int = 8192,
        video_tokens: int = 1024,
        condition_tokens: int = 0,
        num_classes: int = 101,
        dim: int = 1280,
        depth: int = 30,
        heads: int = 20,
        kv_heads: int | None = None,
        hidden_dim: int | None = None,
        norm_eps: float = 1e-5,
        learned_positions: bool = True,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        feed_forward_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        hidden_dim = hidden_width(dim) if hidden_dim is None else hidden_dim
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "video_tokens": video_tokens,
            "condition_tokens": condition_tokens,
            "num_classes": num_classes,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "kv_heads": kv_heads,
            "hidden_dim": hidden_dim,
            "norm_eps": norm_eps,
            "learned_positions": learned_positions,
            "token_dropout": token_dropout,
            "attention_dropout": attention_dropout,
            "residual_dropout": residual_dropout,
            "feed_forward_dropout": feed_forward_dropout,
        }
        check_arguments(self.config)
        self.vocab_size = vocab_size
        self.video_tokens, self.condition_tokens = video_tokens, condition_tokens
        self.num_tokens = condition_tokens + video_tokens
        self.grid = (self.num_tokens,)
        self.num_classes = num_classes
        self.prefix = 0 if condition_tokens else 1
        positions = torch.empty(1, self.num_tokens, dim)
        if learned_positions:
            self.abs_pe = nn.Parameter(positions)
        else:
            self.register_buffer("abs_pe", positions)
        self.cls_embedding = None if condition_tokens else ClassEmbedding(num_classes, dim)
        # the separator is the id behind the last one
        self.tok_embeddings = nn.Embedding(vocab_size + bool(condition_tokens), dim)
        self.tok_dropout = nn.Dropout(token_dropout)
        self.layers = nn.ModuleList([Block(self.config) for _ in range(depth)])
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Loads a folder of the hub, such as a download of `hywang66/LARP-L-long-AR` or `hywang66/LARP-L-long-AR-FP`.

        No code in it is run.

        Args:
            folder: Holds `config.json` and `model.safetensors`.

        Returns:
            The network, float32, on the CPU, ready to be trained on; `.eval()` turns its dropout off.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The options are not those of LARP's video model, or weights are missing, unknown or of another
                shape; all are listed.
            ModuleNotFoundError: safetensors is not installed.
        """
        stored = read_config(folder)
        if "bottleneck" in stored:
            raise ValueError(
                f"folder must hold LARP's video model, got a LARP tokenizer in {os.fspath(folder)!r}; load that with "
                "reco_lightning.tokenizers.LARPTokenizer.from_pretrained"
            )
        arguments = arguments_from_json(stored, str(Path(folder) / "config.json"))
        with torch.device("meta"):
            network = cls(**arguments)
        network.to_empty(device="cpu")
        load_weights(network, read_weights(folder), Path(folder) / "model.safetensors")
        return network

    @property
    def head(self) -> nn.Linear:
        """What makes the logits of states."""
        return self.output

    def reset_parameters(self) -> None:
        """Draws fresh weights: normal of deviation 0.02, norms 1, and no preference among ids."""
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)
        if not self.config["learned_positions"]:
            self.abs_pe.copy_(sine_table(self.config["dim"], self.num_tokens)[None])

    def new_cache(self, batch: int) -> KeyValueCache:
        """Sets memory aside for the keys and values of ``batch`` full sequences, in the weights' type and place."""
        heads, dim = self.config["kv_heads"], self.config["dim"]
        shape = (len(self.layers), batch, heads, self.num_tokens, dim // self.config["heads"])
        weight = self.output.weight
        # not weight.new_zeros: a sharded weight would give a sharded memory
        memory = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KeyValueCache(*memory)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        """Returns the logits of the next id at every row that predicts one.

        Args:
            tokens: Ids, (B, n) int64: n up to N - 1, or from C to C + N - 1 with a condition; with a cache and a
                ``start`` above 0 those that follow what was run.
            labels: Classes, (B,) int64 from 0 to ``num_classes``; the last, and each below 0, is "no class". ``None``
                is "no class" for all.
            cache: Memory from ``new_cache`` that holds the rows before ``start`` and takes the new ones.
            start: ``prefix`` + the number of ids that were run; 0 also runs the class. A tensor without dimensions, of
                a value above 0, keeps all shapes the same for every row: for ``torch.compile``.

        Returns:
            Logits, (B, n + 1 - C, V), or (B, n, V) from a ``start`` above 0.

        Raises:
            ValueError: If there are too many or too few ids, labels are given to a network without classes, or
                ``start`` does not fit.
        """
        condition = self.condition_tokens
        inside = isinstance(start, Tensor) or start > 0  # a tensor's value is not looked at
        if inside and cache is None:
            raise ValueError(f"start must be 0 without a cache, got {start}; pass the cache that holds the rows before")
        early = not isinstance(start, Tensor) and 0 < start < condition
        if early or (not inside and tokens.shape[1] < condition):
            raise ValueError(
                f"tokens must begin with the {condition} ids of the condition in one call, got {tokens.shape[1]} from "
                f"start={start}"
            )
        if labels is not None and self.cls_embedding is None:
            raise ValueError("labels were given to a network for frame prediction; pass None")
        if condition and not inside:
            separator = tokens.new_full((len(tokens), 1), self.vocab_size)
            tokens = torch.cat([tokens[:, :condition], separator, tokens[:, condition:]], dim=1)
        x = self.tok_embeddings(tokens)  # (B, rows, D)
        if self.cls_embedding is not None and not inside:
            if labels is None:
                labels = tokens.new_full((len(tokens),), self.num_classes)
            x = torch.cat([self.cls_embedding(labels)[:, None], x], dim=1)
        row = start + 1 if condition and inside else start  # the separator's row was run with the condition
        places: slice | Tensor
        if isinstance(row, Tensor):
            places = row + torch.arange(x.shape[1], device=x.device)
        else:
            places = slice(row, row + x.shape[1])
            if places.stop > self.num_tokens:
                raise ValueError(
                    f"tokens reach row {places.stop}, but the network has {self.num_tokens}; the last id is not fed"
                )
        x = self.tok_dropout(x) + self.abs_pe[:, places]
        for index, layer in enumerate(self.layers):
            x = layer(x) if cache is None else layer(x, (cache.keys[index], cache.values[index]), row)
        logits = self.output(self.norm(x))
        return logits if inside else logits[:, condition:]


class Guided(nn.Module):
    """A class-conditional network whose logits are guided away from "no class"; only to sample from with `generate`.

    Logits are u + scale * (c - u), of c with the class and u without.

    Args:
        network: A `LARPTransformer` or another with classes; shared, not copied.
        scale: Strength; 1 is the network itself. LARP's published samples have 1.25.

    Raises:
        ValueError: The network has no classes.

    Example:
        >>> network = LARPTransformer(vocab_size=32, video_tokens=8, num_classes=3, dim=32, depth=1, heads=2)
        >>> Guided(network, 1.25)(torch.zeros(1, 7, dtype=torch.long), torch.tensor([2])).shape
        torch.Size([1, 8, 32])
    """

    def __init__(self, network: Any, scale: float) -> None:
        super().__init__()
        if not network.num_classes:
            raise ValueError("network must have classes to be guided by, got one without; sample from it as it is")
        self.network, self.scale = network, scale
        self.vocab_size, self.grid = network.vocab_size, network.grid
        self.num_tokens, self.num_classes, self.prefix = network.num_tokens, network.num_classes, network.prefix

    @property
    def head(self) -> nn.Linear:
        """What makes the logits of states."""
        return self.network.head

    def new_cache(self, batch: int) -> KeyValueCache:
        """Sets memory aside for ``batch`` sequences with their class, then without."""
        return self.network.new_cache(2 * batch)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        """Returns the guided logits; arguments and result as in `LARPTransformer`."""
        if not isinstance(start, Tensor) and not start:
            none = tokens.new_full((len(tokens),), self.num_classes)
            labels = torch.cat([none if labels is None else labels, none])
        given, free = self.network(tokens.repeat(2, 1), labels, cache=cache, start=start).chunk(2)
        return free + self.scale * (given - free)
