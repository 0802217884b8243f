# SPDX-License-Identifier: Apache-2.0
"""Restricts a user's ``F.cross_entropy`` call to the rows of the sampled windows.

Used by the injection, between an engine's windowed logits and the loss that training sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.windowing.losses.chunked_cross_entropy import linear_cross_entropy
from reco_lightning.windowing.rows import HeadInput, WindowGroup

__all__ = ["WindowCrossEntropy", "loss_rows", "plain_cross_entropy", "select_rows", "window_cross_entropy"]


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


@dataclass(frozen=True)
class WindowCrossEntropy:
    """Cross-entropy of the windows' rows.

    Args:
        value: In the form that the caller's reduction asks for: a scalar, or losses shaped like the target.
        divisor: Number by which the caller divides ``value`` to have the mean; 1 where it is a mean.
        mean: Mean over the rows that count, nats; 0 where none does.
        losses: Of each row, without graph, (R,); 0 where it does not count.
        counted: How much each row counts in the mean, (R,).
        sizes: Rows of each group.
    """

    value: torch.Tensor
    divisor: torch.Tensor | float
    mean: torch.Tensor
    losses: torch.Tensor
    counted: torch.Tensor
    sizes: tuple[int, ...]

    def group_means(self) -> list[torch.Tensor]:
        """Returns the mean of each group's rows that count, nats, without graph; 0 where none does."""
        parts = zip(self.losses.split(self.sizes), self.counted.split(self.sizes), strict=True)
        return [_mean(losses.sum(), counted.sum()) for losses, counted in parts]


def window_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    groups: Sequence[WindowGroup],
    *,
    batch: int,
    offset: int,
    own: Sequence[torch.Tensor] | None = None,
    head_input: HeadInput | None = None,
    **options: Any,
) -> WindowCrossEntropy:
    """Computes the cross-entropy of the windows' rows, in the form that the caller's reduction asks for.

    ``reduction="mean"`` is the mean over the windows' rows that count, and 0 where none does. ``"sum"`` and ``"none"``
    are scaled by all rows / window rows, so that the caller's own division by the number of rows gives that mean; rows
    of ``ignore_index`` count in neither. ``"none"`` has zeros elsewhere.

    Args:
        logits: As in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        offset: Row of the network that the first loss row of a sample comes from.
        own: Logits as in ``select_rows``; the loss is made in the type of ``logits``.
        head_input: The head that has yet to make the logits, and what it reads; not all of them exist at a time. For
            weights of classes, smoothing and ``"none"`` they do.
        options: Further arguments of ``F.cross_entropy``.
    """
    reduction, ignored, weight = _reduction(options), options.get("ignore_index", -100), options.get("weight")
    chunked = head_input is not None and reduction != "none" and weight is None and not options.get("label_smoothing")
    if head_input is not None:
        own = head_input.states if chunked else head_input.logits()
    rows, places = select_rows(logits, target, groups, batch=batch, offset=offset, own=own)
    counts = places != ignored
    if head_input is not None and chunked:
        with torch.autocast(logits.device.type, enabled=False):
            total, losses = linear_cross_entropy(
                rows, head_input.weight, places, bias=head_input.bias, ignore_index=ignored
            )
    else:
        losses = F.cross_entropy(rows.to(logits.dtype), places, reduction="none", **options)
        total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    counted = counts.to(total.dtype) if weight is None else weight[places.where(counts, 0)].where(counts, 0)
    mean = _mean(total, counted.sum())
    divisor: torch.Tensor | float = 1.0
    if reduction == "mean":
        value = mean.to(losses.dtype)
    else:
        all_counted = (target != ignored).sum()
        scale = all_counted.to(total.dtype) / counts.sum().clamp_min(1)
        if reduction == "sum":
            value, divisor = (total * scale).to(losses.dtype), all_counted.clamp_min(1)
        else:
            value = _place(losses * scale.to(losses.dtype), groups, offset, target.numel() // batch).view(target.shape)
    sizes = tuple((group.samples.stop - group.samples.start) * (group.stop - group.loss_start) for group in groups)
    return WindowCrossEntropy(value, divisor, mean, losses.detach(), counted, sizes)


def plain_cross_entropy(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> WindowCrossEntropy:
    """Runs the caller's own call, bit for bit, on a window that is the whole sequence.

    Args:
        logits: As in ``F.cross_entropy``.
        target: As there.
        options: As there.
    """
    value = F.cross_entropy(logits, target, **options)
    reduction, mean = _reduction(options), value
    divisor: torch.Tensor | float = 1.0
    if reduction != "mean":
        counted = (target != options.get("ignore_index", -100)).sum().clamp_min(1)
        mean, divisor = value.sum() / counted, counted if reduction == "sum" else 1.0
    return WindowCrossEntropy(value, divisor, mean, mean.detach()[None], torch.ones_like(mean)[None], (1,))


def _reduction(options: dict[str, Any]) -> str:
    """Takes the reduction out of the options of ``F.cross_entropy``, also the one of torch 0.4."""
    reduction: str = options.pop("reduction", "mean")
    size_average, reduce = options.pop("size_average", None), options.pop("reduce", None)
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total / count.where(count != 0, 1)


def _place(losses: torch.Tensor, groups: Sequence[WindowGroup], offset: int, rows: int) -> torch.Tensor:
    """Losses of the windows' rows (R,) in their places among those of all, (B, L)."""
    parts, begin = [], 0
    for group in groups:
        length = group.stop - group.loss_start
        part = losses[begin : begin + (group.samples.stop - group.samples.start) * length].view(-1, length)
        start = group.loss_start - offset
        parts.append(F.pad(part, (start, rows - start - length)))
        begin += part.numel()
    return torch.cat(parts)
