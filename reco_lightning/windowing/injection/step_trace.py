# SPDX-License-Identifier: Apache-2.0
"""Traces a training step and finds the blocks, the head and the rows that feed its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning.support.block_stacks import block_stacks
from reco_lightning.windowing.engines.call_slicing import checkpoints_itself
from reco_lightning.windowing.injection.dry_run import DryRun
from reco_lightning.windowing.injection.loss_calls import LossCall, TracedHead, describe_losses
from reco_lightning.windowing.injection.row_alignment import find_trailing_rows
from reco_lightning.windowing.injection.scattered_rows import find_scattered_rows
from reco_lightning.windowing.injection.step_recorder import Overrides, StepRecorder
from reco_lightning.windowing.rows import RowLayout

__all__ = ["NothingTrainedError", "Trace", "trace_step"]


class NothingTrainedError(MisconfigurationException):
    """A step that trains none of the blocks: a bad sample that it skips, or the turn of another network."""


@dataclass(frozen=True)
class Trace:
    """The findings of the trace.

    Args:
        network: Name of the smallest called module that holds blocks and heads.
        blocks: Name of the list of blocks.
        heads: What makes logits of the states, and is run on windows alone.
        calls: The network's cross-entropies, in their order.
        rows: T, the length of the network's sequence.
        trailing_rows: Rows after the one that predicts the last video token.
        prefix: P where the user says it, which then holds for every batch.
        attention: Whether every block called ``F.scaled_dot_product_attention``.
        recomputed: Whether the blocks run under activation checkpointing.
        recomputes_parts: Whether the blocks checkpoint their attention inside themselves.
        unmasked: Whether a call of ``F.scaled_dot_product_attention`` in the blocks was neither causal nor masked.
        flat: Whether the blocks' states are (B, T, D), and not of more dimensions.
        is_open: Whether something besides the heads reads the states, or the heads do not all read the same.
        hidden: The states that the heads read, or those that leave the blocks where it is open, (B, T, D).
        unlogged: What the step logs of the states or the logits besides its loss: names of the functions, by key.
        returns_loss: Whether the step returned a loss.
    """

    network: str
    blocks: str
    heads: tuple[TracedHead, ...]
    calls: tuple[LossCall, ...]
    rows: int
    trailing_rows: int
    prefix: int | None
    attention: bool
    recomputed: bool
    recomputes_parts: bool
    unmasked: bool
    flat: bool
    is_open: bool
    hidden: torch.Tensor
    unlogged: Mapping[str, str] = field(default_factory=dict)
    returns_loss: bool = False

    @property
    def head(self) -> str:
        """Names of the heads; ``""`` where the states of all rows are read by something else alone."""
        return ", ".join(head.name for head in self.heads)

    def layout(self, tokens: int) -> RowLayout:
        """Returns where ``tokens`` video tokens lie in the sequence."""
        return RowLayout(tokens, self.trailing_rows, self.prefix)


def _describe(recorder: StepRecorder, dry_run: DryRun) -> Trace:
    """Describes what was met.

    Raises:
        ValueError: If it cannot be windowed; the text says why.
    """
    stack, losses = recorder.stack, recorder.met
    assert stack is not None
    assert stack.shape is not None
    root = recorder.uses.roots[stack.name]
    batch, rows = root.shape[0], root.shape[1:-1].numel()
    heads, calls, records = describe_losses(
        losses, root, recorder.records, recorder.linear_calls, recorder.overrides.head
    )
    calls = _find_scattered(recorder, dry_run, calls, batch, rows)
    weights = recorder.uses.weights(calls)
    states = [record.states for record in records]
    is_open = any(call.head is None for call in calls) or any(one is not states[0] for one in states)
    return Trace(
        network=_find_network(recorder, [head.name for head in heads if head.is_module]),
        blocks=stack.name,
        heads=tuple(heads),
        calls=tuple(replace(call, weight=weight) for call, weight in zip(calls, weights, strict=True)),
        rows=rows,
        trailing_rows=_align(recorder, calls, batch, rows),
        prefix=recorder.overrides.prefix_tokens,
        attention=len(stack.attentions) == len(stack.blocks),
        recomputed=stack.recomputed,
        recomputes_parts=stack.recomputes_parts and not any(map(checkpoints_itself, stack.blocks)),
        unmasked=stack.unmasked,
        flat=len(stack.shape) == 3,
        is_open=is_open,
        hidden=(root if is_open else states[0]).detach().reshape(batch, rows, -1),
        unlogged=recorder.uses.logged,
        returns_loss=recorder.uses.returned,
    )


def _find_network(recorder: StepRecorder, heads: Sequence[str]) -> str:
    """The smallest called module with blocks and heads; the outermost one with the blocks where there is none."""
    assert recorder.stack is not None
    around = [name for name in recorder.called if _holds(name, recorder.stack.name)]
    common = [name for name in around if heads and all(_holds(name, head) for head in heads)]
    return max(common, key=len) if common else min(around, key=len, default="")


def _find_scattered(
    recorder: StepRecorder, dry_run: DryRun, calls: list[LossCall], batch: int, rows: int
) -> list[LossCall]:
    numbers = [call.number for call in calls if call.scattered is not None]
    if not numbers:
        return calls
    assert recorder.stack is not None
    behind = list({record.module for loss in recorder.met for record in loss.reached if record.module is not None})
    leaves = [module for module in behind if not list(module.children())]
    try:
        found = find_scattered_rows(dry_run, recorder.stack.blocks[-1], leaves, numbers, batch=batch, rows=rows)
    except ValueError as error:
        raise ValueError(f"{_name_readers(recorder, batch, rows)}{error}") from error
    if len(calls) == len(numbers) and all(len(set(one)) == len(one) and list(one) != sorted(one) for one in found):
        raise ValueError(
            f"loss rows and rows of the network are not in one order: a sample's loss rows come from the rows "
            f"{', '.join(map(str, found[0][:8]))} ...; windows need the loss over the tokens in the order of the "
            "sequence"
        )
    origins = dict(zip(numbers, found, strict=True))
    return [replace(call, scattered=origins.get(call.number)) for call in calls]


def _name_readers(recorder: StepRecorder, batch: int, rows: int) -> str:
    """Which heads read other rows than the blocks make."""
    assert recorder.stack is not None
    for loss in recorder.met:
        for record in loss.reached:
            size = record.states.shape[:-1].numel()
            if record.module is not None and record.output.shape[-1] == loss.classes and size != batch * rows:
                own = size // batch
                return f"the head '{record.name}' reads {own} rows, the blocks '{recorder.stack.name}' have {rows}; "
    return ""


def _align(recorder: StepRecorder, calls: Sequence[LossCall], batch: int, rows: int) -> int:
    """Rows after the one that predicts the last video token."""
    counted = torch.zeros(rows, dtype=torch.bool)
    for loss, call in zip(recorder.met, calls, strict=True):
        counts = (loss.target.reshape(batch, -1) != loss.ignore_index).any(dim=0).cpu()
        counted[torch.tensor(call.origins(rows))[counts]] = True
    start = min(min(call.origins(rows)) for call in calls)
    stop = max(max(call.origins(rows)) for call in calls) + 1
    return find_trailing_rows(
        counted[start:stop],
        rows=rows,
        offset=start,
        tokens=recorder.tokens,
        prefix=recorder.overrides.prefix_tokens,
        evidence=recorder.evidence,
        batch=batch,
        classes=max(loss.classes for loss in recorder.met),
        ignore_index=recorder.met[0].ignore_index,
    )


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def trace_step(
    module: nn.Module, step: Callable[[], Any], *, tokens: int, overrides: Overrides
) -> tuple[Trace, DryRun]:
    """Runs a training step up to its cross-entropy, without a trace, and reports what feeds it.

    Args:
        module: The LightningModule.
        step: Runs its training step on the batch at hand.
        tokens: N, video tokens of a sample.
        overrides: What the user names.

    Returns:
        The findings, and the dry run in which the same step can be run again.

    Raises:
        MisconfigurationException: If blocks, head or loss are not found; the message lists what was. A
            ``NothingTrainedError`` where the step trains none of the blocks.
    """
    stacks = block_stacks(module)
    if overrides.network is not None:
        stacks = {name: blocks for name, blocks in stacks.items() if _holds(overrides.network, name)}
    if overrides.blocks is not None:
        named = overrides.blocks
        stacks = {name: b for name, b in stacks.items() if name == named or name.endswith(f".{named}")}
    if not stacks:
        raise MisconfigurationException(
            f"no stack of blocks was found in {type(module).__name__} with network={overrides.network!r}, "
            f"blocks={overrides.blocks!r}; a ModuleList or Sequential of like modules was sought, these exist: "
            f"{list(block_stacks(module)) or 'none'}; set blocks= to the name of one"
        )
    recorder, dry_run = _record(module, step, stacks, tokens, overrides)
    while recorder.lists and overrides.blocks is None:
        stacks = {name: blocks for name, blocks in stacks.items() if name not in recorder.lists}
        recorder, dry_run = _record(module, step, stacks, tokens, overrides)
    if not recorder.met and not recorder.problems:
        if not recorder.uses.has_loss or not any(stack.calls for stack in recorder.stacks):
            ended = "runs none of them with gradient" if recorder.uses.has_loss else "computes no loss"
            raise NothingTrainedError(
                f"training_step of {type(module).__name__} trains none of the blocks {_name_stacks(stacks)}: it {ended}"
            )
        raise MisconfigurationException(_explain_absence(module, recorder, _name_stacks(stacks)))
    trace = None
    if not recorder.problems:
        try:
            trace = _describe(recorder, dry_run)
        except ValueError as error:
            recorder.problems.append(str(error))
    if trace is not None:
        modules = {record.name: record.output for record in recorder.records}
        recorder.problems += recorder.uses.problems(dry_run, trace, modules)
    if recorder.problems or trace is None:
        raise MisconfigurationException(f"{type(module).__name__} cannot be windowed: {'; '.join(recorder.problems)}")
    return trace, dry_run


def _record(
    module: nn.Module, step: Callable[[], Any], stacks: dict[str, list[nn.Module]], tokens: int, overrides: Overrides
) -> tuple[StepRecorder, DryRun]:
    """Runs the step once, watched."""
    evaluated = [
        part for blocks in stacks.values() for block in blocks for part in block.modules() if part is not block
    ]
    dry_run = DryRun(module, step, evaluated=evaluated)
    recorder = StepRecorder(module, stacks, tokens, overrides)
    remove = recorder.watch()
    try:
        with torch.enable_grad():
            result = dry_run.run(
                recorder.cross_entropy,
                recorder.handlers,
                fallback=recorder.function,
                log=recorder.uses.log,
                manual_backward=recorder.uses.take,
            )
        recorder.uses.take(result, returned=True)
    except Exception as error:
        if not recorder.met:  # what is wrong behind the loss is the step's own affair
            remove()
            dry_run.run(_plain_loss)  # what is wrong without the trace too is the step's own error
            raise MisconfigurationException(
                f"{type(module).__name__} cannot be windowed: its training step fails under the trace of "
                f"{_name_stacks(stacks)}: {type(error).__name__}: {error}; set network= or blocks= if these are the "
                "wrong ones"
            ) from error
    finally:
        remove()
    return recorder, dry_run


def _plain_loss(*args: Any, function: Any = F.cross_entropy, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _name_stacks(stacks: Mapping[str, Sequence[nn.Module]]) -> str:
    return ", ".join(f"'{name}' ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in stacks.items())


def _explain_absence(module: nn.Module, recorder: StepRecorder, found: str) -> str:
    """Why no cross-entropy was met, as far as can be told."""
    text = (
        f"no call of torch.nn.functional.cross_entropy on the logits of one of the block stacks {found} was seen in "
        f"{type(module).__name__}.training_step ({recorder.losses} calls in all)"
    )
    inside = {part for stack in recorder.stacks for block in stack.blocks for part in block.modules()}
    uncalled = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part not in inside and name not in recorder.called
    ]
    if recorder.finished and uncalled:
        return (
            f"{text}; the head '{uncalled[-1]}' was never called: if its weight enters a fused linear cross-entropy of "
            "your own, call the head and F.cross_entropy in its place: windows save that memory too"
        )
    problems = [f"the blocks '{stack.name}': {stack.problem}" for stack in recorder.stacks if stack.problem]
    if problems:
        return f"{text}; {'; '.join(problems)}"
    if not recorder.finished:
        apart = _name_stacks({stack.name: stack.blocks for stack in recorder.stacks})
        return f"{text}; the blocks {apart} are never called as a whole, once each and with gradient: set blocks="
    return f"{text}; compute the loss by F.cross_entropy, or set blocks= and head="
