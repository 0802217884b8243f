# SPDX-License-Identifier: Apache-2.0
"""Causal attention of the last rows of a sequence over all of it, as windows and cached sampling need it."""

from __future__ import annotations

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["causal_bias", "join_context"]


def causal_bias(rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """Bias with which the last ``rows`` of ``keys`` positions attend causally.

    ``is_causal=True`` aligns with the first key and is wrong here. On CUDA the bias reaches the flash kernels and no
    mask is written out; elsewhere it is a boolean mask (rows, keys).

    Example:
        >>> causal_bias(2, 3, torch.device("cpu")).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    if device.type == "cuda":
        return causal_lower_right(rows, keys)
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)


def join_context(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor] | None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of a window over its context and itself: scaled dot-product attention, causal from the lower right.

    Args:
        query: The window's queries, (..., W, E).
        key: The window's keys, (..., W, E), or the context's and the window's where a cache has joined them,
            (..., A + W, E).
        value: Values, shaped like ``key``.
        context: Keys and values of the A context rows, (..., A, E) each; ``None`` where ``key`` and ``value`` hold
            them.
        attn_mask: The caller's mask over A + W keys, or over the window's W alone: the context is then visible to all.
        dropout_p: As in ``torch.nn.functional.scaled_dot_product_attention``.
        is_causal: As there, except that it is aligned with the last key.
        scale: As there.
        enable_gqa: As there.

    Returns:
        The attended values, (..., W, E).
    """
    if context is not None:
        key, value = torch.cat([context[0], key], dim=-2), torch.cat([context[1], value], dim=-2)
    rows, keys = query.shape[-2], key.shape[-2]
    if is_causal:
        attn_mask = causal_bias(rows, keys, query.device)
    elif attn_mask is not None and attn_mask.shape[-1] == rows != keys:
        visible = attn_mask.new_full((*attn_mask.shape[:-1], keys - rows), attn_mask.dtype == torch.bool)
        attn_mask = torch.cat([visible, attn_mask], dim=-1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
    )
