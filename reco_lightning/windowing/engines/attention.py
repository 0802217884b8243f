# SPDX-License-Identifier: Apache-2.0
"""Causal attention of the last rows of a sequence over all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

from reco_lightning.support.causal_mask import causal_mask

__all__ = ["FLASH_ATTENTION", "AttentionCall", "attend_with_context", "multi_head_attention"]

FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
"""The kernel itself: its ``is_causal`` is aligned with the last key where there are more keys than queries."""


@torch.compiler.assume_constant_result
def _has_flash_attention(index: int | None) -> bool:
    """Whether a CUDA device runs torch's flash attention, and nobody has forbidden it."""
    if torch.version.hip is not None or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


class AttentionCall(NamedTuple):
    """The arguments of one call of ``torch.nn.functional.scaled_dot_product_attention``, in its order.

    Example:
        >>> states = torch.zeros(1, 1, 2, 4)
        >>> AttentionCall(states, states, states, is_causal=True)._replace(dropout_p=0.5).run().shape
        torch.Size([1, 1, 2, 4])
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> torch.Tensor:
        """Runs it."""
        query, key, value, mask, dropout, causal, scale, gqa = self
        # transformers' ``rows > 1`` is a symbol where torch.compile has symbols for sizes; torch 2.9 takes bools alone
        if causal:
            return scaled_dot_product_attention(query, key, value, mask, dropout, True, scale=scale, enable_gqa=gqa)
        return scaled_dot_product_attention(query, key, value, mask, dropout, False, scale=scale, enable_gqa=gqa)


def _attend_causally(call: AttentionCall) -> torch.Tensor:
    """Attention of the last rows of a sequence over all of it; on CUDA by a kernel that needs no mask, where it can.

    ``torch.nn.attention.bias.causal_lower_right`` reaches the same kernel, but ``torch.compile`` does not trace it.
    """
    query, key, value = call.query, call.key, call.value
    if query.device.type == "cuda" and _has_flash_attention(query.device.index):
        tensors: tuple[torch.Tensor, ...] = (query, key, value)
        if torch.is_autocast_enabled("cuda"):  # autocast knows scaled_dot_product_attention, and not the kernel
            tensors = tuple(tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors)
        half = all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
        # in wider heads some devices have no backward pass, and heads of other widths would have to be padded
        if half and query.shape[-1] == value.shape[-1] <= 192 and query.shape[-1] % 8 == 0 and query.ndim == 4:
            output: torch.Tensor = FLASH_ATTENTION(*tensors, call.dropout_p, True, scale=call.scale)[0]
            return output
    mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return call._replace(attn_mask=mask, is_causal=False).run()


def attend_with_context(call: AttentionCall, context: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Computes scaled dot-product attention of a window over its context and itself, causal from the lower right.

    Args:
        call: The window's attention: queries (..., W, E), and keys and values of the window, (..., W, E), or of the
            context's A rows and the window where a cache has joined them, (..., A + W, E). A mask covers A + W keys,
            or the window's W alone: the context is then visible to all. ``is_causal`` is aligned with the last key.
        context: Keys and values of the context, (..., A, E) each; ``None`` where the call holds them.

    Returns:
        The attended values, (..., W, E).
    """
    if context is not None:
        key, value = torch.cat([context[0], call.key], dim=-2), torch.cat([context[1], call.value], dim=-2)
        call = call._replace(key=key, value=value)
    if call.is_causal:
        return _attend_causally(call)
    mask, rows, keys = call.attn_mask, call.query.shape[-2], call.key.shape[-2]
    if mask is not None and mask.shape[-1] == rows != keys:
        visible = mask.new_full((*mask.shape[:-1], keys - rows), mask.dtype == torch.bool)
        call = call._replace(attn_mask=torch.cat([visible, mask], dim=-1))
    return call.run()


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
    """Runs ``torch.nn.functional.multi_head_attention_forward`` with its attention handed to a function.

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
