# SPDX-License-Identifier: Apache-2.0
"""The window's share of somebody else's cross-entropy: which rows of a call are a window's, and the call on them alone.

Used by the injection, between an engine's windowed logits and the loss that training sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.engines.base import Group

__all__ = ["group_losses", "loss_rows", "select_rows", "window_cross_entropy"]


def loss_rows(logits: torch.Tensor, target: torch.Tensor, batch: int) -> int:
    """Returns L, the loss rows of a sample in a call of ``F.cross_entropy``.

    Args:
        logits: (B * L, V) sample by sample, or (B, V, ...) with L places.
        target: Class indices, (B * L,) or (B, ...).
        batch: B, the size of the batch.

    Raises:
        ValueError: If the call has another form.

    Example:
        >>> loss_rows(torch.zeros(6, 8), torch.zeros(6, dtype=torch.long), batch=2)
        3
    """
    if target.is_floating_point():
        raise ValueError("F.cross_entropy got class probabilities as its target; windows need class indices (int64)")
    flat = logits.ndim == 2 and target.shape == logits.shape[:1]
    grid = logits.ndim >= 3 and logits.shape[0] == batch and target.shape == (batch, *logits.shape[2:])
    if not (flat or grid) or target.numel() % batch:
        raise ValueError(
            f"F.cross_entropy got logits {tuple(logits.shape)} and targets {tuple(target.shape)} for a batch of "
            f"{batch}; windows need (B * L, V) with (B * L,) or (B, V, ...) with (B, ...): take no rows out before the "
            "loss, use ignore_index"
        )
    return target.numel() // batch


def select_rows(
    logits: torch.Tensor, target: torch.Tensor, groups: Sequence[Group], *, batch: int, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the windows' rows out of a call of ``F.cross_entropy``.

    Args:
        logits: As in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        offset: Row of the network that the first loss row of a sample comes from.

    Returns:
        Logits (R, V) and targets (R,), group by group.
    """
    rows = loss_rows(logits, target, batch)
    if logits.ndim == 2:
        logits, target = logits.view(batch, rows, -1), target.view(batch, rows)
    else:
        logits, target = logits.flatten(2).transpose(1, 2), target.flatten(1)  # (B, L, V), (B, L)
    spans = [(group.samples, slice(group.loss_start - offset, group.stop - offset)) for group in groups]
    chosen = [(logits[span].flatten(0, 1), target[span].flatten()) for span in spans]
    if len(chosen) == 1:
        return chosen[0]
    return torch.cat([part[0] for part in chosen]), torch.cat([part[1] for part in chosen])


def group_losses(
    logits: torch.Tensor, target: torch.Tensor, groups: Sequence[Group], *, batch: int, offset: int
) -> list[torch.Tensor]:
    """Mean cross-entropy of each group's window, nats, without graph.

    Args:
        logits: As in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        offset: Row of the network that the first loss row of a sample comes from.

    Returns:
        Scalars, one per group.
    """
    with torch.no_grad():
        own = [select_rows(logits, target, [group], batch=batch, offset=offset) for group in groups]
        return [F.cross_entropy(part.float(), places) for part, places in own]


def window_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    groups: Sequence[Group],
    *,
    batch: int,
    offset: int,
    reduction: str = "mean",
    **options: Any,
) -> torch.Tensor:
    """Cross-entropy of the windows' rows, in the form that the caller's reduction asks for.

    Args:
        logits: As in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        offset: Row of the network that the first loss row of a sample comes from.
        reduction: ``"mean"`` is the mean over the windows' rows. ``"sum"`` and ``"none"`` are scaled by all rows /
            window rows, so that the caller's own division by the number of rows gives that mean; rows of
            ``ignore_index`` count in neither. ``"none"`` has zeros elsewhere.
        options: Further arguments of ``F.cross_entropy``.

    Returns:
        A scalar, or losses shaped like ``target`` for ``"none"``.
    """
    own_logits, own_target = select_rows(logits, target, groups, batch=batch, offset=offset)
    if reduction == "mean":
        return F.cross_entropy(own_logits, own_target, reduction="mean", **options)
    ignored = options.get("ignore_index", -100)
    losses = F.cross_entropy(own_logits, own_target, reduction=reduction, **options)
    wide = torch.promote_types(losses.dtype, torch.float32)
    counted, own_counted = (target != ignored).sum().to(wide), (own_target != ignored).sum().clamp_min(1)
    losses = losses * (counted / own_counted).to(losses.dtype)
    if reduction == "sum":
        return losses
    rows = target.numel() // batch
    parts, begin = [], 0
    for group in groups:
        length = group.stop - group.loss_start
        own = losses[begin : begin + (group.samples.stop - group.samples.start) * length].view(-1, length)
        start = group.loss_start - offset
        parts.append(F.pad(own, (start, rows - start - length)))
        begin += own.numel()
    return torch.cat(parts).view(target.shape)
