# SPDX-License-Identifier: Apache-2.0
"""Describes a step's cross-entropies: which head makes the logits of each, of which rows of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from reco_lightning.windowing.injection.autograd_graph import is_copied, reaches_parameter
from reco_lightning.windowing.injection.row_alignment import row_origins
from reco_lightning.windowing.losses.cross_entropy import loss_rows
from reco_lightning.windowing.rows import LossRows

__all__ = ["HeadRecord", "LossCall", "MetLoss", "TracedHead", "describe_losses"]


@dataclass(frozen=True)
class TracedHead:
    """A module or a function that makes logits of the states of all rows.

    Args:
        name: Name of the module; ``"linear()"`` for the function.
        is_module: Whether it is a module.
        call: Which call of a linear function behind the blocks and outside the heads that are modules; 0 for a module.
        like: An empty tensor of the logits' type and device.
        is_viewed: Whether each of its losses is given its output itself, or a view of it.
        is_copied: Whether each is given that or a copy of it, in a type of its own.
        learns_behind: Whether parameters stand between its output and a loss.
    """

    name: str
    is_module: bool
    call: int
    like: torch.Tensor
    is_viewed: bool
    is_copied: bool
    learns_behind: bool


@dataclass(frozen=True)
class LossCall:
    """One cross-entropy on the network's states.

    Args:
        number: Which call of ``F.cross_entropy`` in the step it is, counted from 0.
        head: Number of the head that makes its logits; ``None`` where no single one does: what reads the states of all
            rows makes them then.
        rows_after_loss: Rows of the network after the one that feeds the last loss row.
        scattered: The network's row of each loss row of a sample, where they do not follow one another.
        logits: What it was given in the plain step.
        length: L, loss rows of a sample.
        weight: How much its mean counts in the loss that the step makes of all its cross-entropies.
    """

    number: int
    head: int | None
    rows_after_loss: int
    scattered: tuple[int, ...] | None
    logits: torch.Tensor
    length: int
    weight: float = 1.0

    def origins(self, rows: int) -> Sequence[int]:
        """Returns the network's row of each loss row of a sample, of T = ``rows``."""
        if self.scattered is not None:
            return self.scattered
        return range(rows - self.rows_after_loss - self.length, rows - self.rows_after_loss)

    def loss_rows(self, rows: int, length: int) -> LossRows:
        """Returns the rows of a batch whose samples have ``length`` loss rows of T = ``rows``."""
        return LossRows(rows - self.rows_after_loss - length, length, self.scattered)


@dataclass
class HeadRecord:
    """What a module, or a linear function, made of states that left the blocks.

    Args:
        name: Name of the module, or of the function.
        module: The module; ``None`` for a function.
        states: What it read.
        output: What it returned.
        version: Version of ``output`` then.
        inside: Names of the modules that were at work.
    """

    name: str
    module: nn.Module | None
    states: torch.Tensor
    output: torch.Tensor
    version: int
    inside: tuple[str, ...]

    def is_seen_in(self, logits: torch.Tensor) -> bool:
        """Returns whether logits are the output as it was, or a view of that."""
        same = logits.untyped_storage().data_ptr() == self.output.untyped_storage().data_ptr()
        return same and self.output._version == self.version

    def is_copied_in(self, logits: torch.Tensor) -> bool:
        """Returns whether logits are the output as it was, or copies and views of that."""
        return self.output._version == self.version and is_copied(logits, self.output)


@dataclass(frozen=True)
class MetLoss:
    """A cross-entropy as the trace met it.

    Args:
        number: Which call of ``F.cross_entropy`` it is.
        logits: Its logits, with a graph.
        target: Its targets.
        function: ``F.cross_entropy``, or ``F.nll_loss`` on log-probabilities.
        ignore_index: The value of targets that do not count.
        reached: What its logits depend on.
    """

    number: int
    logits: torch.Tensor
    target: torch.Tensor
    function: Callable[..., torch.Tensor]
    ignore_index: int
    reached: tuple[HeadRecord, ...]

    @property
    def classes(self) -> int:
        """V, the classes of its logits."""
        return self.logits.shape[-1] if self.logits.ndim == 2 else self.logits.shape[1]


def _find_head(loss: MetLoss, size: int, named: str | None) -> HeadRecord | None:
    """The one module or linear function that makes a loss's logits of the states of all ``size`` = B * T rows."""
    makers = [record for record in loss.reached if record.output.shape[-1] == loss.classes]
    leaves = [record for record in makers if record.module is not None and _is_layer(record.module)]
    projections = [record for record in leaves if record.states.shape[-1] != loss.classes]
    functions = [record for record in makers if record.module is None]
    by_name = [record for record in loss.reached if record.module is not None and _is_named(record, named)]
    chosen = next(iter(by_name or projections or leaves[::-1] or functions), None)
    if chosen is None or chosen.states.shape[:-1].numel() != size:
        return None
    if not by_name and len(projections or leaves[:1] or functions) > 1:  # heads that are stacked, or added
        return None
    return chosen


def _is_named(record: HeadRecord, named: str | None) -> bool:
    return named is not None and (record.name == named or record.name.endswith(f".{named}"))


def _is_layer(module: nn.Module) -> bool:
    return not list(module.children()) and any(True for _ in module.parameters())


def describe_losses(
    losses: Sequence[MetLoss],
    root: torch.Tensor,
    records: Sequence[HeadRecord],
    linear_calls: Sequence[HeadRecord],
    named: str | None,
) -> tuple[list[TracedHead], list[LossCall], list[HeadRecord]]:
    """Describes the losses of a traced step.

    Args:
        losses: What was met, in order.
        root: The states that left the blocks, (B, T, D) or (B, T, H, W, C), from which the graph begins.
        records: What modules and functions made of them.
        linear_calls: All calls of linear functions behind the blocks.
        named: The user's name for the head.

    Returns:
        The heads, the losses, and the records of the heads. ``scattered`` is empty, and has yet to be found, where the
        rows of a loss do not follow one another.

    Raises:
        ValueError: If a loss has another form, or no module has the user's name; the text says which.
    """
    batch, rows = root.shape[0], root.shape[1:-1].numel()
    lengths = [loss_rows(loss.logits, loss.target, batch) for loss in losses]
    if named is not None and not any(_is_named(record, named) for loss in losses for record in loss.reached):
        seen = list(dict.fromkeys(record.name for loss in losses for record in loss.reached))
        raise ValueError(
            f"no module turns the states into logits of {losses[0].classes} classes by the name head={named!r}; seen "
            f"after the blocks: {seen}; set head= to the module that makes the logits"
        )
    made_by = [_find_head(loss, batch * rows, named) for loss in losses]
    times = Counter(record.module for record in records)
    made_by = [None if head and head.module and times[head.module] > 1 else head for head in made_by]
    while shared := _read_otherwise(losses, made_by):
        made_by = [None if any(head is record for record in shared) else head for head in made_by]
    used = list({id(head): head for head in made_by if head is not None}.values())
    calls = []
    for loss, head, length in zip(losses, made_by, lengths, strict=True):
        outputs = [head.output] if head is not None else [root, *(record.output for record in loss.reached)]
        sources = [output for output in outputs if output.shape[:-1].numel() == batch * rows]
        try:
            offsets = {origin - row for _, row, origin in row_origins(loss.logits, sources, batch, length)}
        except RuntimeError:  # a sharded weight of the heads is not whole any more
            offsets = set()
        number = next((index for index, record in enumerate(used) if record is head), None)
        follow = len(offsets) == 1
        after = rows - length - offsets.pop() if follow else 0
        calls.append(LossCall(loss.number, number, after, None if follow else (), loss.logits.detach(), length))
    heads = []
    for index, record in enumerate(used):
        given = [loss.logits for loss, call in zip(losses, calls, strict=True) if call.head == index]
        heads.append(
            TracedHead(
                record.name,
                is_module=record.module is not None,
                call=_number(record, used, linear_calls),
                like=record.output.detach().new_empty(()),
                is_viewed=all(map(record.is_seen_in, given)),
                is_copied=all(map(record.is_copied_in, given)),
                learns_behind=any(reaches_parameter(logits, record.output) for logits in given),
            )
        )
    return heads, calls, used


def _read_otherwise(losses: Sequence[MetLoss], heads: Sequence[HeadRecord | None]) -> list[HeadRecord]:
    """Heads whose output enters the logits of a loss that they do not make."""
    return [
        head
        for head in heads
        if head is not None
        and any(
            other is not head and any(record is head for record in loss.reached)
            for loss, other in zip(losses, heads, strict=True)
        )
    ]


def _number(record: HeadRecord, heads: Sequence[HeadRecord], linear_calls: Sequence[HeadRecord]) -> int:
    if record.module is not None:
        return 0
    modules = {head.name for head in heads if head.module is not None}
    outside = [call for call in linear_calls if not modules.intersection(call.inside)]
    return next(index for index, call in enumerate(outside) if call is record)
