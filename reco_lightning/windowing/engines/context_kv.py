# SPDX-License-Identifier: Apache-2.0
"""Hands keys and values of the context to the window's attention, through SDPA or a key/value cache.

``AttentionContextKV`` sees every call of ``torch.nn.functional.scaled_dot_product_attention``; ``CacheContextKV``
stands in for the key/value cache that transformers' layers take, whatever attention they run; ``ModuleContextKV`` for
modules that are called with queries, keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from reco_lightning.windowing.engines.attention import AttentionCall, attend_with_context
from reco_lightning.windowing.engines.interception import FunctionInterceptor, PatchedMethod

__all__ = [
    "AttentionContextKV",
    "AttentionReachedError",
    "CacheContextKV",
    "ContextCache",
    "ContextKV",
    "ModuleContextKV",
    "attends_by_itself",
]


class AttentionReachedError(Exception):
    """Ends the context pass of the last block where its keys and values are known."""


class ContextCache:
    """Keys and values that the attentions of a block made of its context rows, in the order of their calls.

    Args:
        rows: A, context rows.
        enough: Number of attentions after which the block's context pass ends; ``None`` lets it run through.
        total: T, rows of the whole sequence; ``None`` where no mask of them is to be cut.

    Attributes:
        mask: The mask that the block is called with on its window, (..., W, A + W); ``None`` where it takes none.
    """

    def __init__(self, rows: int, enough: int | None = None, total: int | None = None) -> None:
        self.rows = rows
        self.enough = enough
        self.total = total
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.mask: torch.Tensor | None = None

    def cut(self, call: AttentionCall, start: int) -> AttentionCall:
        """Cuts a mask that the block holds for the whole sequence, (..., T, T), to the rows from ``start`` on."""
        mask, rows = call.attn_mask, call.query.shape[-2]
        if mask is None or self.total is None or rows == self.total:
            return call
        if mask.shape[-2] != self.total or mask.shape[-1] != self.total:
            return call
        return call._replace(attn_mask=mask[..., start : start + rows, : start + rows])

    def restore(self, attn_mask: torch.Tensor) -> torch.Tensor:
        """Returns the block's whole mask in the place of one that the block has cut to the keys that it makes itself.

        transformers before 5 does ``mask[..., :keys]``: of a window it takes the context's columns.

        Raises:
            RuntimeError: If the block has made another mask of it.
        """
        if self.mask is None:
            return attn_mask
        if self.mask.shape[:-1] != attn_mask.shape[:-1] or self.mask.dtype != attn_mask.dtype:
            raise RuntimeError(
                "a block was called with a mask over context and window and attended with one over as many keys as the "
                "window has; attend with the mask as it is given, or set engine='cache' for layers that take a cache"
            )
        return self.mask

    def keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps (B, heads, A, E) each; what follows in the pass runs without gradient.

        Raises:
            AttentionReachedError: If these were the last that are needed.
        """
        self.pairs.append((key, value))
        torch.set_grad_enabled(False)  # with context "keys" the projections train, and nothing behind them
        if len(self.pairs) == self.enough:
            raise AttentionReachedError

    def take(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of one of the attentions, (B, heads, A, E) each.

        Raises:
            RuntimeError: If the context pass had fewer attentions; a ``StopIteration`` would end Lightning's epoch.
        """
        if number == len(self.pairs):
            raise RuntimeError(
                f"a block attended {number} times over its context and once more over its window; if it checkpoints "
                "its attention inside itself, checkpoint whole blocks"
            )
        return self.pairs[number]


class ContextKV(Protocol):
    """Runs a block on its context and on its window; ``call`` runs it, keyword arguments replacing its arguments."""

    def run_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """Runs the block on its context rows and keeps their keys and values."""

    def run_window(self, call: Callable[..., Any], kept: ContextCache, rows: int) -> Any:
        """Runs the block on its ``rows`` window rows with the kept keys and values in front of its own."""

    def run_without_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """Runs the block on a window that starts the sequence."""


class AttentionContextKV:
    """Injects context keys and values through ``scaled_dot_product_attention``, however the block calls it."""

    def run_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """See ``ContextKV``."""

        def record(*args: Any, **kwargs: Any) -> torch.Tensor:
            attention = AttentionCall(*args, **kwargs)
            if attention.query.shape[-2] == attention.key.shape[-2] == kept.rows:
                kept.keep(attention.key, attention.value)
            return kept.cut(attention, 0).run()

        with FunctionInterceptor({scaled_dot_product_attention: record}):
            return call()

    def run_window(self, call: Callable[..., Any], kept: ContextCache, rows: int) -> Any:
        """See ``ContextKV``."""
        output, joined = self._attend(call, kept, rows)
        _check(joined, kept)
        return output

    def run_without_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """See ``ContextKV``."""

        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            return kept.cut(AttentionCall(*args, **kwargs), 0).run()

        with FunctionInterceptor({scaled_dot_product_attention: attend}):
            return call()

    def _attend(self, call: Callable[..., Any], kept: ContextCache, rows: int) -> tuple[Any, int]:
        joined = taken = 0

        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal joined, taken
            attention = kept.cut(AttentionCall(*args, **kwargs), kept.rows)
            keys, mask = attention.key.shape[-2], attention.attn_mask
            # no "in": torch.compile finds no size that it does not know by it
            if attention.query.shape[-2] != rows or (keys != rows and keys != kept.rows + rows):
                return attention.run()
            joined += 1
            if keys != rows:
                return attend_with_context(attention)
            if mask is not None and mask.shape[-1] == rows:
                attention = attention._replace(attn_mask=kept.restore(mask))
            taken += 1
            return attend_with_context(attention, kept.take(taken - 1))

        with FunctionInterceptor({scaled_dot_product_attention: attend}):
            return call(), joined


def _check(joined: int, kept: ContextCache) -> None:
    """Refuses a window that has attended without its context."""
    if joined != len(kept.pairs):
        raise RuntimeError(
            f"a block attended {len(kept.pairs)} times over its context and {joined} times over its window with the "
            "context in front; its attention must be the same whatever the number of rows"
        )


class _RecordingCache:
    """What a layer of transformers takes for an empty cache."""

    def __init__(self, kept: ContextCache) -> None:
        self.kept = kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.kept.keep(key, value)
        return key, value


class _JoiningCache:
    """What a layer of transformers takes for a cache that holds the context."""

    def __init__(self, kept: ContextCache) -> None:
        self.kept = kept
        self.joined = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept.rows

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context = self.kept.take(self.joined)
        self.joined += 1
        return torch.cat([context[0], key], dim=-2), torch.cat([context[1], value], dim=-2)


class CacheContextKV(AttentionContextKV):
    """Injects context keys and values through the cache that transformers' layers take, whatever their attention.

    Args:
        argument: The name by which the blocks take the cache.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def run_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """See ``ContextKV``."""
        output = call(**{self.argument: _RecordingCache(kept)})
        if not kept.pairs:
            raise RuntimeError(f"a block kept no keys and values in the cache that it was given as {self.argument}")
        return output

    def run_window(self, call: Callable[..., Any], kept: ContextCache, rows: int) -> Any:
        """See ``ContextKV``."""
        cache = _JoiningCache(kept)
        # scaled_dot_product_attention, where it is reached all the same, has to be causal from the lower right
        output, _ = self._attend(partial(call, **{self.argument: cache}), kept, rows)
        _check(cache.joined, kept)
        return output


def attends_by_itself(module: nn.Module) -> bool:
    """Returns whether a module is called with queries, keys and values, as the attention of x-transformers is.

    Example:
        >>> class Attend(nn.Module):
        ...     def forward(self, q, k, v, mask=None): ...
        >>> attends_by_itself(Attend()), attends_by_itself(nn.Linear(2, 2))
        (True, False)
    """
    names = tuple(inspect.signature(type(module).forward).parameters)[1:4]
    return names in (("q", "k", "v"), ("query", "key", "value")) and not isinstance(module, nn.MultiheadAttention)


class ModuleContextKV(AttentionContextKV):
    """Injects context keys and values into modules that are called with queries, keys and values (B, heads, R, E).

    They have to be causal from the lower right where there are more keys than queries, as for a key/value cache.

    Args:
        modules: All such modules of the blocks.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)

    def run_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """See ``ContextKV``."""

        def record(original: Callable[..., Any], q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            kept.keep(k, v)
            return original(q, k, v, *args, **kwargs)

        return self._run(call, record)

    def run_window(self, call: Callable[..., Any], kept: ContextCache, rows: int) -> Any:
        """See ``ContextKV``."""
        joined = 0

        def attend(original: Callable[..., Any], q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal joined
            keys, values = kept.take(joined)
            joined += 1
            return original(q, torch.cat([keys, k], dim=-2), torch.cat([values, v], dim=-2), *args, **kwargs)

        output = self._run(call, attend)
        _check(joined, kept)
        return output

    def run_without_context(self, call: Callable[..., Any], kept: ContextCache) -> Any:
        """See ``ContextKV``."""
        return call()

    def _run(self, call: Callable[..., Any], handler: Callable[..., Any]) -> Any:
        patches = [PatchedMethod(module, "forward", handler) for module in self._modules]
        for patch in patches:
            patch.install()
        try:
            return call()
        finally:
            for patch in patches:
                patch.remove()
