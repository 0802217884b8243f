# SPDX-License-Identifier: Apache-2.0
"""Runs minGPT-shaped attention, written by hand, through ``scaled_dot_product_attention``.

TATS, taming-transformers, OmniTokenizer's language model and many others carry it: linear layers ``query``, ``key``,
``value`` and ``proj``, a number of heads ``n_head`` and a registered ``mask`` (1, 1, T, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from reco_lightning.windowing.engines.interception import PatchedMethod

__all__ = ["MinGPTAttention", "attend", "is_mingpt_attention"]


def is_mingpt_attention(module: nn.Module) -> bool:
    """Returns whether a module has the parts of minGPT's ``CausalSelfAttention``.

    Example:
        >>> is_mingpt_attention(nn.Linear(2, 2))
        False
    """
    linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("query", "key", "value", "proj"))
    return linear and isinstance(getattr(module, "n_head", None), int) and "mask" in module._buffers


def attend(module: Any, states: torch.Tensor, start: int, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the attention of ``states`` over themselves, as the module's own forward computes it.

    Args:
        module: A module for which ``is_mingpt_attention`` holds.
        states: Normed states of consecutive rows, (B, R, D).
        start: The sequence's row at which they start; the mask is read from there.
        causal: Whether the mask is plainly causal and need not be read.

    Returns:
        The attended and projected states (B, R, D), and their keys and values, (2, B, heads, R, E).
    """
    query, key, value = (
        rearrange(layer(states), "b r (h e) -> b h r e", h=module.n_head)
        for layer in (module.query, module.key, module.value)
    )
    stop = start + states.shape[1]
    mask = None if causal else module.mask[..., start:stop, :stop] != 0
    drop = getattr(module, "attn_drop", None)
    dropout = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    output = module.proj(rearrange(output, "b h r e -> b r (h e)"))
    residual = getattr(module, "resid_drop", None)
    return output if residual is None else residual(output), torch.stack((key, value))


class MinGPTAttention:
    """Takes the place of one such module's forward while an engine runs a part of the sequence.

    Args:
        module: The attention module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.start: int | None = None
        self._module = module
        self._returns_keys: bool | None = None
        mask = module.get_buffer("mask") != 0
        # n_unmasked > 0 lets the first rows see each other
        self._causal = bool(torch.equal(mask, torch.ones_like(mask).tril()))
        self._patch = PatchedMethod(module, "forward", self._forward)

    def install(self) -> None:
        """Replaces the forward."""
        self._patch.install()

    def remove(self) -> None:
        """Restores it."""
        self.start = None
        self._patch.remove()

    def _forward(self, original: Callable[..., Any], states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.start is None:
            return original(states, *args, **kwargs)
        if any(value is not None for value in (*args, *kwargs.values())):
            raise ValueError(
                f"{type(self._module).__name__} was called with more than its states (a cache of keys and values?); "
                "training has no use for it"
            )
        if self._returns_keys is None:
            with torch.no_grad():
                self._returns_keys = isinstance(original(states[:1, :1], *args, **kwargs), tuple)
        output, keys = attend(self._module, states, self.start, causal=self._causal)
        return (output, keys) if self._returns_keys else output
