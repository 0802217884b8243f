# SPDX-License-Identifier: Apache-2.0
"""Restricts a user's ``F.cross_entropy`` call to the rows of the sampled windows.

Used by the injection, between an engine's windowed logits and the loss that training sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.windowing.losses.chunked_cross_entropy import linear_cross_entropy
from reco_lightning.windowing.rows import HeadInput, WindowGroup

__all__ = ["group_losses", "head_cross_entropy", "loss_rows", "select_rows", "window_cross_entropy"]


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
    logits: torch.Tensor,
    target: torch.Tensor,
    groups: Sequence[WindowGroup],
    *,
    batch: int,
    offset: int,
    own: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the windows' rows out of a call of ``F.cross_entropy``.

    Args:
        logits: As in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        offset: Row of the network that the first loss row of a sample comes from.
        own: Logits of each group (B_g, rows, V), where ``logits`` are a placeholder; or states (B_g, rows, D).

    Returns:
        Logits (R, V) and targets (R,), group by group.
    """
    rows = loss_rows(logits, target, batch)
    target = target.view(batch, rows)
    spans = [(group.samples, slice(group.loss_start - offset, group.stop - offset)) for group in groups]
    if own is None:
        wide = logits.view(batch, rows, -1) if logits.ndim == 2 else logits.flatten(2).transpose(1, 2)  # (B, L, V)
        own = [wide[span] for span in spans]
    chosen, targets = [part.flatten(0, 1) for part in own], [target[span].flatten() for span in spans]
    if len(chosen) == 1:
        return chosen[0], targets[0]
    return torch.cat(chosen), torch.cat(targets)


def group_losses(
    rows: torch.Tensor, target: torch.Tensor, groups: Sequence[WindowGroup], *, head_input: HeadInput | None = None
) -> list[torch.Tensor]:
    """Mean cross-entropy of each group's window, nats, without graph.

    Args:
        rows: Logits as ``select_rows`` returns them, (R, V); states (R, D) where they have yet to be made.
        target: Likewise, (R,).
        groups: The groups of the batch.
        head_input: Where they have, the head that makes them.

    Returns:
        Scalars, one per group.
    """
    sizes = [(group.samples.stop - group.samples.start) * (group.stop - group.loss_start) for group in groups]
    with torch.no_grad():
        parts = zip(rows.split(sizes), target.split(sizes), strict=True)
        if head_input is None:
            return [F.cross_entropy(part.float(), places) for part, places in parts]
        weight, bias = head_input.weight, head_input.bias
        with torch.autocast(rows.device.type, enabled=False):
            return [linear_cross_entropy(part.to(weight.dtype), weight, places, bias=bias) for part, places in parts]


def head_cross_entropy(
    head_input: HeadInput,
    logits: torch.Tensor,
    target: torch.Tensor,
    groups: Sequence[WindowGroup],
    *,
    batch: int,
    offset: int,
    **options: Any,
) -> torch.Tensor:
    """Cross-entropy of the windows' rows, whose logits a linear head has yet to make; never all of them at a time.

    Args:
        head_input: The head, and what it reads.
        logits: The placeholder that the caller gave, as in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        offset: Row of the network that the first loss row of a sample comes from.
        options: Further arguments of ``F.cross_entropy``. For weights of classes, smoothing and ``reduction="none"``
            all logits are made.

    Returns:
        As ``window_cross_entropy``.
    """
    reduction, ignored = options.get("reduction", "mean"), options.get("ignore_index", -100)
    odd = any(options.get(name) is not None for name in ("weight", "size_average", "reduce"))
    if odd or reduction not in ("mean", "sum") or options.get("label_smoothing"):
        with torch.autocast(logits.device.type, enabled=False):
            own = [F.linear(part, head_input.weight, head_input.bias) for part in head_input.states]
        return window_cross_entropy(logits, target, groups, batch=batch, offset=offset, own=own, **options)
    rows, places = select_rows(logits, target, groups, batch=batch, offset=offset, own=head_input.states)
    with torch.autocast(logits.device.type, enabled=False):
        loss = linear_cross_entropy(
            rows, head_input.weight, places, bias=head_input.bias, ignore_index=ignored, reduction=reduction
        )
    if reduction == "sum":
        loss = loss * ((target != ignored).sum() / (places != ignored).sum().clamp_min(1))
    return loss


def window_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    groups: Sequence[WindowGroup],
    *,
    batch: int,
    offset: int,
    own: Sequence[torch.Tensor] | None = None,
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
        own: Logits as in ``select_rows``; the loss is made in the type of ``logits``.
        reduction: ``"mean"`` is the mean over the windows' rows. ``"sum"`` and ``"none"`` are scaled by all rows /
            window rows, so that the caller's own division by the number of rows gives that mean; rows of
            ``ignore_index`` count in neither. ``"none"`` has zeros elsewhere.
        options: Further arguments of ``F.cross_entropy``.

    Returns:
        A scalar, or losses shaped like ``target`` for ``"none"``.
    """
    own_logits, own_target = select_rows(logits, target, groups, batch=batch, offset=offset, own=own)
    own_logits = own_logits.to(logits.dtype)
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
        part = losses[begin : begin + (group.samples.stop - group.samples.start) * length].view(-1, length)
        start = group.loss_start - offset
        parts.append(F.pad(part, (start, rows - start - length)))
        begin += part.numel()
    return torch.cat(parts).view(target.shape)
