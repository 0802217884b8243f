# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear head in chunks of rows, without all logits in memory.

Used by the injection in the place of a head and ``F.cross_entropy``. The gradients are made beside the loss, chunk by
chunk, so that no product of matrices is done twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import override

__all__ = ["CHUNK_ELEMENTS", "linear_cross_entropy"]

CHUNK_ELEMENTS = 2**24
"""Logits of a chunk at most: 64 MiB in float32, and at 8192 classes 2048 rows, which keep a GPU's matrix units busy."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the rows' losses, and these without graph; the gradients are made on the way."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        ignore_index: int,
        rows: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        losses = states.new_zeros(len(states), dtype=wide)
        of_states = torch.empty_like(states) if wanted[0] else None
        # sums over all rows: half precision would lose them, or overflow
        of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        of_bias = torch.zeros_like(weight[:, 0], dtype=wide) if wanted[2] else None
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            own = states[part]
            counted = target[part] != ignore_index
            places = target[part].where(counted, 0)[:, None]
            logits = F.linear(own, weight, bias).to(wide)
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (normaliser - logits.gather(1, places)).squeeze(1).where(counted, 0)
            if not any(wanted):
                continue
            errors = logits.sub_(normaliser).exp_()
            errors.scatter_add_(1, places, torch.full_like(normaliser, -1.0)).mul_(counted[:, None])
            if of_bias is not None:
                of_bias += errors.sum(dim=0)
            errors = errors.to(states.dtype)
            if of_states is not None:
                torch.mm(errors, weight, out=of_states[part])
            if of_weight is not None:
                of_weight += errors.T @ own
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @override
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a cross-entropy whose logits are made in chunks has no second derivative, which create_graph=True "
                "asks for; set ReCoCallback(chunked_loss=False)"
            )
        of_states, of_weight, of_bias = ctx.saved_tensors
        return (
            None if of_states is None else of_states * scale.to(of_states.dtype),
            None if of_weight is None else (of_weight * scale).to(ctx.dtype),
            None if of_bias is None else (of_bias * scale).to(ctx.dtype),
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums ``F.cross_entropy(F.linear(states, weight, bias), target)`` without all logits, but under ``torch.compile``.

    Products are made in the states' type, or in that of autocast; everything else, and the result, in float32 or wider.

    Args:
        states: What the head reads, (R, D).
        weight: The head's weight, (V, D).
        target: Class indices, (R,) int64.
        bias: The head's bias, (V,).
        ignore_index: Target of rows that do not count.
        chunk_elements: Logits that may exist at a time, 1 or more; one row is always made.

    Returns:
        The sum over the rows, a scalar, nats; a gradient that is asked for with ``create_graph=True`` is a
        RuntimeError. And the rows' losses without graph, (R,), 0 where a row does not count.

    Example:
        >>> total, rows = linear_cross_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, -100]))
        >>> round(total.item(), 4), round(rows[0].item(), 4), rows[1].item()
        (2.0794, 2.0794, 0.0)
    """
    if torch.compiler.is_compiling():  # the loss is part of a graph that the compiler plans as a whole
        logits = F.linear(states, weight, bias)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(wide, target, ignore_index=ignore_index, reduction="none")
        return losses.sum(), losses.detach()
    device = states.device.type
    parts: list[torch.Tensor | None] = [states, weight, bias]
    if torch.is_autocast_enabled(device):
        parts = [None if part is None else part.to(torch.get_autocast_dtype(device)) for part in parts]
    wanted = tuple(torch.is_grad_enabled() and part is not None and part.requires_grad for part in parts)
    rows = max(1, chunk_elements // len(weight))
    with torch.autocast(device, enabled=False):
        summed: tuple[torch.Tensor, torch.Tensor] = _LinearCrossEntropy.apply(
            *parts, target, ignore_index, rows, wanted
        )
        return summed
