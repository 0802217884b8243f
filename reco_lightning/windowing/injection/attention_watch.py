# SPDX-License-Identifier: Apache-2.0
"""Records how the blocks of a network attend during the trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from reco_lightning.windowing.engines.attention import AttentionCall

__all__ = ["AttentionWatch", "under_checkpoint"]


class AttentionWatch(TorchFunctionMode):
    """Counts, while entered, the calls of torch's attention functions and records how they are made.

    Example:
        >>> states = torch.zeros(1, 1, 2, 4)
        >>> with AttentionWatch() as watch:
        ...     _ = F.scaled_dot_product_attention(states, states, states)
        >>> watch.count, watch.unmasked, watch.checkpointed
        (1, True, False)
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.checkpointed = False
        self.unmasked = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (scaled_dot_product_attention, F.multi_head_attention_forward):
            self.count += 1
            self.checkpointed = self.checkpointed or under_checkpoint()
        if func is scaled_dot_product_attention:
            call = AttentionCall(*args, **(kwargs or {}))
            masked = call.attn_mask is not None or call.is_causal
            self.unmasked = self.unmasked or (not masked and call.query.shape[-2] == call.key.shape[-2] > 1)
        return func(*args, **(kwargs or {}))


def under_checkpoint() -> bool:
    """Returns whether the caller is run by ``torch.utils.checkpoint``."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
