# SPDX-License-Identifier: Apache-2.0
"""Restricts a user's ``F.cross_entropy`` call to the rows of the sampled windows.

Used by the injection, between an engine's windowed logits and the loss that training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from reco_lightning.windowing.losses.chunked_cross_entropy import linear_cross_entropy
from reco_lightning.windowing.rows import HeadInput, LossRows, Places, WindowGroup

__all__ = [
    "WindowCrossEntropy",
    "loss_rows",
    "plain_cross_entropy",
    "read_options",
    "select_rows",
    "window_cross_entropy",
]

_OPTIONS = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


def read_options(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a call of ``F.cross_entropy`` by name, the reduction of torch 0.4 as that of today.

    Example:
        >>> read_options([None, False], {})
        {'ignore_index': -100, 'reduction': 'sum', 'weight': None}
    """
    options = {"ignore_index": -100, "reduction": "mean"} | dict(zip(_OPTIONS, args, strict=False)) | dict(kwargs)
    size_average, reduce = options.pop("size_average", None), options.pop("reduce", None)
    if size_average is not None or reduce is not None:
        options["reduction"] = "none" if reduce is False else "sum" if size_average is False else "mean"
    return options


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
    rows: LossRows,
    own: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the windows' rows out of a call of ``F.cross_entropy``.

    Args:
        logits: As in ``loss_rows``.
        target: As in ``loss_rows``.
        groups: The groups of the batch with their rows of the network.
        batch: B, the size of the batch.
        rows: Rows of the network that the loss rows come from.
        own: Logits of each group (B_g, rows, V), where ``logits`` are a placeholder; or states (B_g, rows, D).

    Returns:
        Logits (R, V) and targets (R,), group by group.
    """
    chosen, targets, _ = _select(logits, target, _spans(groups, rows, target.device), batch=batch, own=own)
    return chosen, targets


_Span = tuple[slice, Places, Places]
"""A group's samples, its places among the loss rows, and those of the loss rows among its own."""


def _spans(groups: Sequence[WindowGroup], rows: LossRows, device: torch.device) -> list[_Span]:
    return [(group.samples, *rows.places(group, device)) for group in groups]


def _select(
    logits: torch.Tensor,
    target: torch.Tensor,
    spans: Sequence[_Span],
    *,
    batch: int,
    own: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Logits (R, V), targets (R,), and how many of these rows are each group's."""
    length = loss_rows(logits, target, batch)
    if own is None:
        wide = logits.reshape(batch, length, -1) if logits.ndim == 2 else logits.flatten(2).transpose(1, 2)  # (B, L, V)
        chosen = [wide[samples][:, places].flatten(0, 1) for samples, places, _ in spans]
    else:
        chosen = [part[:, places].flatten(0, 1) for part, (_, _, places) in zip(own, spans, strict=True)]
    targets = [target.reshape(batch, length)[samples][:, places].flatten() for samples, places, _ in spans]
    if len(chosen) == 1:
        return chosen[0], targets[0], (len(targets[0]),)
    return torch.cat(chosen), torch.cat(targets), tuple(map(len, targets))


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
    rows: LossRows,
    own: HeadInput | Sequence[torch.Tensor] | None = None,
    function: Callable[..., torch.Tensor] = F.cross_entropy,
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
        rows: Rows of the network that the loss rows come from.
        own: Logits as in ``select_rows``, the loss is made in the type of ``logits``; or the head that has yet to make
            them, and what it reads: not all of them exist at a time, but for weights of classes, smoothing and
            ``"none"``.
        function: ``F.cross_entropy``, or ``F.nll_loss`` where ``logits`` are log-probabilities.
        options: Further arguments of ``F.cross_entropy``.
    """
    options = read_options((), options)
    reduction, ignored, weight = options.pop("reduction"), options["ignore_index"], options.get("weight")
    chunked, head = False, None
    if isinstance(own, HeadInput):
        is_plain = function is F.cross_entropy and weight is None and not options.get("label_smoothing")
        chunked = is_plain and reduction != "none"
        head, own = own, own.states if chunked else own.logits()
    spans = _spans(groups, rows, target.device)
    chosen, places, sizes = _select(logits, target, spans, batch=batch, own=own)
    counts = places != ignored
    if head is not None and chunked:
        with torch.autocast(logits.device.type, enabled=False):
            total, losses = linear_cross_entropy(chosen, head.weight, places, bias=head.bias, ignore_index=ignored)
    else:
        losses = function(chosen.to(logits.dtype), places, reduction="none", **options)
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
            scaled = (losses * scale.to(losses.dtype)).split(sizes)
            value = losses.new_zeros(batch, rows.length)
            for part, (samples, of_loss, _) in zip(scaled, spans, strict=True):
                value[samples, of_loss] = part.view(samples.stop - samples.start, -1)
            value = value.view(target.shape)
    return WindowCrossEntropy(value, divisor, mean, losses.detach(), counted, sizes)


def plain_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    function: Callable[..., torch.Tensor] = F.cross_entropy,
    **options: Any,
) -> WindowCrossEntropy:
    """Runs the caller's own call, bit for bit, on a window that is the whole sequence.

    Args:
        logits: As in ``F.cross_entropy``.
        target: As there.
        function: That function, or ``F.nll_loss``.
        options: As there.
    """
    options = read_options((), options)
    value = function(logits, target, **options)
    reduction, mean = options["reduction"], value
    divisor: torch.Tensor | float = 1.0
    if reduction != "mean":
        counted = (target != options["ignore_index"]).sum().clamp_min(1)
        mean, divisor = value.sum() / counted, counted if reduction == "sum" else 1.0
    return WindowCrossEntropy(value, divisor, mean, mean.detach()[None], torch.ones_like(mean)[None], (1,))


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total / count.where(count != 0, 1)
