# SPDX-License-Identifier: Apache-2.0
"""Causal attention of the last rows of a sequence over all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

from reco_lightning.support.causal_mask import causal_mask

__all__ = ["FLASH_ATTENTION", "attend_with_context", "multi_head_attention"]

FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
"""The kernel itself: its ``is_causal`` is aligned with the last key where there are more keys than queries."""


@torch.compiler.assume_constant_result
def _has_flash_attention(index: int | None) -> bool:
    """Whether a CUDA device runs torch's flash attention, and nobody has forbidden it."""
    if torch.version.hip is not None or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


def _causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention of the last rows of a sequence over all of it; on CUDA by a kernel that needs no mask, where it can.

    ``torch.nn.attention.bias.causal_lower_right`` reaches the same kernel, but ``torch.compile`` does not trace it.
    """
    device = query.device
    if device.type == "cuda" and _has_flash_attention(device.index):
        tensors: tuple[torch.Tensor, ...] = (query, key, value)
        if torch.is_autocast_enabled("cuda"):  # autocast knows scaled_dot_product_attention, and not the kernel
            tensors = tuple(tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors)
        half = all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
        # in wider heads some devices have no backward pass, and heads of other widths would have to be padded
        if half and query.shape[-1] == value.shape[-1] <= 192 and query.shape[-1] % 8 == 0 and query.ndim == 4:
            output: torch.Tensor = FLASH_ATTENTION(*tensors, dropout_p, True, scale=scale)[0]
            return output
    mask = causal_mask(query.shape[-2], key.shape[-2], device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
    )


def attend_with_context(
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
        return _causal_attention(query, key, value, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.shape[-1] == rows != keys:
        visible = attn_mask.new_full((*attn_mask.shape[:-1], keys - rows), attn_mask.dtype == torch.bool)
        attn_mask = torch.cat([visible, attn_mask], dim=-1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
    )


def multi_head_attention(  # noqa: D417 - the rest is torch's
    attention: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``torch.nn.functional.multi_head_attention_forward`` with its attention handed to a function.

    Args:
        attention: Called as ``scaled_dot_product_attention`` is; all other arguments are those of torch.

    Returns:
        The output (T, B, D), and ``None`` in place of attention weights.

    Raises:
        ValueError: If the call uses a padding mask, learned extra keys or other things that windows do not serve.
    """
    if key_padding_mask is not None or bias_k is not None or bias_v is not None or add_zero_attn or query.ndim != 3:
        raise ValueError(
            "nn.MultiheadAttention with key_padding_mask, add_bias_kv, add_zero_attn or unbatched input is not run on "
            "windows; put the padding into attn_mask (B * heads, T, T)"
        )
    if not use_separate_proj_weight and query is key is value:
        assert in_proj_weight is not None
        parts: Any = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if in_proj_weight is not None:
            weights = in_proj_weight.chunk(3)
        biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        parts = map(F.linear, (query, key, value), weights, biases)
    heads = [rearrange(part, "t b (h e) -> b h t e", h=num_heads) for part in parts]
    if is_causal:
        attn_mask = None
    elif attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = rearrange(attn_mask, "(b h) t s -> b h t s", h=num_heads)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask  # here True forbids
    output = attention(*heads, attn_mask=attn_mask, dropout_p=dropout_p if training else 0.0, is_causal=is_causal)
    output = rearrange(output, "b h t e -> t b (h e)")
    return F.linear(output, out_proj_weight, out_proj_bias), None
