# SPDX-License-Identifier: Apache-2.0
"""Traces a training step and finds the blocks, the head and the rows that feed its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning.support.block_stacks import block_stacks
from reco_lightning.windowing.engines.call_slicing import checkpoints_itself, find_hidden, map_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.injection.attention_watch import AttentionWatch, under_checkpoint
from reco_lightning.windowing.injection.autograd_graph import depends, is_copied, reaches_parameter
from reco_lightning.windowing.injection.dry_run import DryRun, StepEndedError
from reco_lightning.windowing.injection.other_uses import OtherUses
from reco_lightning.windowing.injection.row_alignment import RowEvidence, find_trailing_rows, row_origins
from reco_lightning.windowing.losses.cross_entropy import loss_rows
from reco_lightning.windowing.rows import RowLayout

__all__ = ["Overrides", "Trace", "trace_step"]


@dataclass(frozen=True)
class Overrides:
    """Names that the user gives; ``None`` where the trace is to find them.

    Args:
        network: Name of the network inside the LightningModule (``"model.gpt"``).
        blocks: Name of the list of blocks, from the LightningModule or from the network.
        head: Name of the module that makes the logits, likewise.
        prefix_tokens: P, rows in front of the video tokens.
    """

    network: str | None = None
    blocks: str | None = None
    head: str | None = None
    prefix_tokens: int | None = None


@dataclass(frozen=True)
class Trace:
    """The findings of the trace.

    Args:
        network: Name of the smallest called module that holds blocks and head.
        blocks: Name of the list of blocks.
        head: Name of the module that makes the logits.
        rows: T, the length of the network's sequence.
        trailing_rows: Rows after the one that predicts the last video token.
        prefix: P where the user says it, which then holds for every batch.
        rows_after_loss: Rows after the one that feeds the last loss row.
        call: Which call of ``F.cross_entropy`` in the step is the network's, counted from 0.
        attention: Whether every block called ``F.scaled_dot_product_attention``.
        recomputed: Whether the blocks run under activation checkpointing.
        recomputes_parts: Whether the blocks checkpoint their attention inside themselves.
        unmasked: Whether a call of ``F.scaled_dot_product_attention`` in the blocks was neither causal nor masked.
        learns_behind_head: Whether parameters stand between the head's output and the loss.
        views_head: Whether the cross-entropy is given the head's output itself, or a view of it.
        copies_head: Whether it is given that or a copy of it, in a type of its own.
        head_type: Type of the head's output.
        flat: Whether the blocks' states are (B, T, D), and not of more dimensions.
        logits: The cross-entropy's input in the plain step.
        hidden: The states that the head read, (B, T, D).
        unlogged: What the step logs of the states or the logits besides its loss: names of the functions, by key.
        returns_loss: Whether the step returned a loss.
    """

    network: str
    blocks: str
    head: str
    rows: int
    trailing_rows: int
    prefix: int | None
    rows_after_loss: int
    call: int
    attention: bool
    recomputed: bool
    recomputes_parts: bool
    unmasked: bool
    learns_behind_head: bool
    views_head: bool
    copies_head: bool
    head_type: torch.dtype
    flat: bool
    logits: torch.Tensor
    hidden: torch.Tensor
    unlogged: Mapping[str, str] = field(default_factory=dict)
    returns_loss: bool = False

    def layout(self, tokens: int) -> RowLayout:
        """Returns where ``tokens`` video tokens lie in the sequence."""
        return RowLayout(tokens, self.trailing_rows, self.prefix)


@dataclass
class _Stack:
    name: str
    blocks: list[nn.Module]
    calls: list[int] = field(default_factory=list)
    attentions: set[int] = field(default_factory=set)
    shape: torch.Size | None = None
    problem: str | None = None
    recomputed: bool = False
    recomputes_parts: bool = False
    unmasked: bool = False


@dataclass
class _Record:
    stack: _Stack
    name: str
    module: nn.Module
    states: torch.Tensor
    output: torch.Tensor
    version: int

    def is_seen_in(self, logits: torch.Tensor) -> bool:
        """Returns whether logits are the module's output as it left it, or a view of that."""
        same = logits.untyped_storage().data_ptr() == self.output.untyped_storage().data_ptr()
        return same and self.output._version == self.version

    def is_copied_in(self, logits: torch.Tensor) -> bool:
        """Returns whether logits are the module's output as it left it, or copies and views of that."""
        return self.output._version == self.version and is_copied(logits, self.output)


class _Recorder:
    """Watches one plain run of the step: the blocks run without gradient, what follows them with it."""

    def __init__(
        self, module: nn.Module, stacks: dict[str, list[nn.Module]], tokens: int, overrides: Overrides
    ) -> None:
        self.module = module
        self.stacks = [_Stack(name, blocks) for name, blocks in stacks.items()]
        self.tokens = tokens
        self.overrides = overrides
        self.records: list[_Record] = []
        self.called: list[str] = []
        self.finished: _Stack | None = None
        self.losses = 0
        self.trace: Trace | None = None
        self.problems: list[str] = []
        self.evidence = RowEvidence()
        self.uses = OtherUses()

    def watch(self) -> Callable[[], None]:
        """Installs the watch; the result removes it."""
        patches, hooks = [], []
        inside: set[nn.Module] = set()
        for stack in self.stacks:
            for index, block in enumerate(stack.blocks):
                inside.update(block.modules())
                patches.append(PatchedMethod(block, "forward", partial(self._block, stack, index)))
        for name, part in self.module.named_modules():
            if part not in inside and part is not self.module:
                hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self.called.append(name)))
                hooks.append(part.register_forward_hook(partial(self._leave, name), with_kwargs=True))
        for patch in patches:
            patch.install()

        def remove() -> None:
            for patch in reversed(patches):
                patch.remove()
            for hook in hooks:
                hook.remove()

        return remove

    def _leave(self, name: str, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if isinstance(part, nn.Embedding) and tensors:
            self.evidence.ids.append(tensors[0])
        if self.finished and tensors and isinstance(output, torch.Tensor) and output.requires_grad and output.ndim >= 3:
            self.records.append(_Record(self.finished, name, part, tensors[0], output, output._version))

    def _block(self, stack: _Stack, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = find_hidden(args, kwargs)
        if hidden is None or hidden.ndim < 2:  # embeddings, say, which are called with ids: no stack of blocks
            return original(*args, **kwargs)
        if not torch.is_grad_enabled() and not hidden.requires_grad:
            return original(*args, **kwargs)
        stack.calls.append(index)
        outside = under_checkpoint()
        stack.recomputed = stack.recomputed or outside
        seen = AttentionWatch()
        with torch.no_grad(), seen:
            output = original(*args, **kwargs)
        if seen.count:
            stack.attentions.add(index)
        stack.unmasked = stack.unmasked or seen.unmasked
        stack.recomputes_parts = stack.recomputes_parts or (seen.checkpointed and not outside)
        if index < len(stack.blocks) - 1:
            return output

        if hidden.ndim < 3:
            stack.problem = f"its blocks take states of the shape {tuple(hidden.shape)}, and not (B, T, D)"
        stack.shape, self.finished = hidden.shape, stack
        try:
            # What follows is watched with a graph of its own, which ends here.
            return map_hidden(output, partial(self.uses.root, stack.name))
        except TypeError as error:
            stack.problem = str(error)
            return output

    def cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for ``F.cross_entropy`` during the trace; the step goes on, in search of a second one."""
        call = self.losses
        self.losses += 1
        reached = [record for record in self.records if logits.requires_grad and depends(logits, record.output)]
        if reached and self.trace is not None:
            self._refuse_second(reached, logits)
        elif reached:
            self._explain_loss(call, reached, logits, target, kwargs.get("ignore_index", -100))
        if self.problems:
            raise StepEndedError
        if self.trace is None or call != self.trace.call:
            return F.cross_entropy(logits, target, *args, **kwargs)
        return self.uses.cross_entropy(logits, target, *args, **kwargs)

    def linear_cross_entropy(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for torch's fused loss."""
        self.problems.append(
            "the loss is torch.nn.functional.linear_cross_entropy, which never makes the logits; call the head and "
            "F.cross_entropy: windows save that memory too"
        )
        raise StepEndedError

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for ``Tensor.backward``: what may follow it is a step of an optimizer that is not the trainer's."""
        if self.trace is not None:
            self.uses.take(args[0])
            raise StepEndedError
        torch.Tensor.backward(*args, **kwargs)

    @property
    def handlers(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What stands in for torch's functions during the trace, besides the loss."""
        handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            torch.Tensor.backward: self.backward,
            F.pad: self.evidence.pad,
        }
        if hasattr(F, "linear_cross_entropy"):
            handlers[F.linear_cross_entropy] = self.linear_cross_entropy
        return handlers

    def _refuse_second(self, reached: Sequence[_Record], logits: torch.Tensor) -> None:
        assert self.trace is not None
        second = reached[-1].stack
        if second.name != self.trace.blocks:
            self.problems.append(
                f"two networks ('{self.trace.blocks}', '{second.name}') have a cross-entropy each; name the one to "
                "window by network="
            )
            return
        head = self._find_head(reached, _classes(logits))
        self.problems.append(
            f"training_step computes two cross-entropies on the blocks '{second.name}' (heads '{self.trace.head}' and "
            f"'{head.name if head else 'none'}'); windows serve one loss: join the two, or compute the second without "
            "gradient"
        )

    def _explain_loss(
        self, call: int, reached: Sequence[_Record], logits: torch.Tensor, target: torch.Tensor, ignore_index: int
    ) -> None:
        stack = reached[-1].stack
        assert stack.shape is not None
        if under_checkpoint():
            self.problems.append(
                "F.cross_entropy runs under torch.utils.checkpoint, whose recomputation would be the plain step's; "
                "take head and loss out of it: windows save that memory too"
            )
            return
        if stack.calls != list(range(len(stack.blocks))):
            stack.problem = f"its blocks were called in the order {stack.calls[:9]}, and not once each"
        if stack.problem:
            self.problems.append(f"the blocks '{stack.name}' feed the loss, but {stack.problem}")
            return
        rows, width = stack.shape[1:-1].numel(), stack.shape[-1]
        classes = _classes(logits)
        head = self._find_head(reached, classes)
        if head is None:
            self.problems.append(
                f"no module turns the states (B, T, {width}) into logits of {classes} classes; seen after the blocks: "
                f"{[record.name for record in reached]}; set head= to the module that makes the logits; logits made by "
                "a function (F.linear with the embedding's weight) cannot be reached: let nn.Linear make them, with "
                "head.weight = embedding.weight"
            )
            return
        if head.states.shape[1:-1].numel() != rows:
            self.problems.append(
                f"the head '{head.name}' reads {head.states.shape[1:-1].numel()} rows, the blocks '{stack.name}' have "
                f"{rows}; rows must be cut after the head, not between blocks and head"
            )
            return
        self._align(call, stack, head, logits, target, ignore_index)

    def _find_head(self, reached: Sequence[_Record], classes: int) -> _Record | None:
        if self.overrides.head is not None:
            return next(
                (r for r in reached if r.name == self.overrides.head or r.name.endswith("." + self.overrides.head)),
                None,
            )
        leaves = [
            record
            for record in reached
            if record.output.shape[-1] == classes
            and not list(record.module.children())
            and any(True for _ in record.module.parameters())
        ]
        projections = [record for record in leaves if record.states.shape[-1] != classes]
        return next(iter(projections or reversed(leaves)), None)

    def _align(
        self, call: int, stack: _Stack, head: _Record, logits: torch.Tensor, target: torch.Tensor, ignore_index: int
    ) -> None:
        assert stack.shape is not None
        batch, rows = stack.shape[0], stack.shape[1:-1].numel()
        try:
            length = loss_rows(logits, target, batch)
        except ValueError as error:
            self.problems.append(str(error))
            return
        origins = row_origins(logits, head.output, batch, length)
        offsets = {origin - row for _, row, origin in origins}
        if len(offsets) != 1:
            self.problems.append(
                f"loss rows and rows of the network are not in one order: (sample, loss row, network row) {origins}; "
                "windows need the loss over the tokens in the order of the sequence"
            )
            return
        offset = offsets.pop()
        counted = (target.reshape(batch, length) != ignore_index).any(dim=0)
        try:
            trailing_rows = find_trailing_rows(
                counted,
                rows=rows,
                offset=offset,
                tokens=self.tokens,
                prefix=self.overrides.prefix_tokens,
                evidence=self.evidence,
                batch=batch,
                classes=_classes(logits),
                ignore_index=ignore_index,
            )
        except ValueError as error:
            self.problems.append(str(error))
            return
        common = [name for name in self.called if _holds(name, stack.name) and _holds(name, head.name)]
        network = max(common, key=len) if common else ""
        self.trace = Trace(
            network=network,
            blocks=stack.name,
            head=head.name,
            rows=rows,
            trailing_rows=trailing_rows,
            prefix=self.overrides.prefix_tokens,
            rows_after_loss=rows - length - offset,
            call=call,
            attention=len(stack.attentions) == len(stack.blocks),
            recomputed=stack.recomputed,
            recomputes_parts=stack.recomputes_parts and not any(map(checkpoints_itself, stack.blocks)),
            unmasked=stack.unmasked,
            learns_behind_head=reaches_parameter(logits, head.output),
            views_head=head.is_seen_in(logits),
            copies_head=head.is_copied_in(logits),
            head_type=head.output.dtype,
            flat=len(stack.shape) == 3,
            logits=logits.detach(),
            hidden=head.states.detach().flatten(1, -2),
        )


def _classes(logits: torch.Tensor) -> int:
    return logits.shape[-1] if logits.ndim == 2 else logits.shape[1]


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
        MisconfigurationException: If blocks, head or loss are not found; the message lists what was.
    """
    stacks = block_stacks(module)
    if overrides.network is not None:
        stacks = {name: blocks for name, blocks in stacks.items() if _holds(overrides.network, name)}
    if overrides.blocks is not None:
        named = overrides.blocks
        stacks = {name: b for name, b in stacks.items() if name == named or name.endswith(f".{named}")}
    found = ", ".join(f"'{name}' ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in stacks.items())
    if not stacks:
        raise MisconfigurationException(
            f"no stack of blocks was found in {type(module).__name__} with network={overrides.network!r}, "
            f"blocks={overrides.blocks!r}; a ModuleList or Sequential of like modules was sought, these exist: "
            f"{list(block_stacks(module)) or 'none'}; set blocks= to the name of one"
        )
    evaluated = [
        part for blocks in stacks.values() for block in blocks for part in block.modules() if part is not block
    ]
    dry_run = DryRun(module, step, evaluated=evaluated)
    recorder = _Recorder(module, stacks, tokens, overrides)
    remove = recorder.watch()
    try:
        with torch.enable_grad():
            result = dry_run.run(
                recorder.cross_entropy,
                recorder.handlers,
                fallback=recorder.uses.derived.call,
                log=recorder.uses.log,
                manual_backward=recorder.uses.take,
            )
        recorder.uses.take(result, returned=True)
    except Exception as error:
        if recorder.trace is None:  # what is wrong behind the loss is the step's own affair
            remove()
            dry_run.run(F.cross_entropy)  # what is wrong without the trace too is the step's own error
            raise MisconfigurationException(
                f"{type(module).__name__} cannot be windowed: its training step fails under the trace of {found}: "
                f"{type(error).__name__}: {error}; set network= or blocks= if these are the wrong ones"
            ) from error
    finally:
        remove()
    if recorder.trace is not None and not recorder.problems:
        modules = {record.name: record.output for record in recorder.records}
        recorder.problems += recorder.uses.problems(dry_run, recorder.trace, modules)
    if recorder.problems:
        raise MisconfigurationException(f"{type(module).__name__} cannot be windowed: {'; '.join(recorder.problems)}")
    if recorder.trace is None:
        raise MisconfigurationException(_explain_absence(module, recorder, found))
    trace = replace(recorder.trace, unlogged=recorder.uses.logged, returns_loss=recorder.uses.returned)
    return trace, dry_run


def _explain_absence(module: nn.Module, recorder: _Recorder, found: str) -> str:
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
    if recorder.finished is not None and uncalled:
        return (
            f"{text}; the head '{uncalled[-1]}' was never called: if its weight enters a fused linear cross-entropy "
            "(Liger), call the head and F.cross_entropy in its place: windows save that memory too"
        )
    problems = [f"the blocks '{stack.name}': {stack.problem}" for stack in recorder.stacks if stack.problem]
    if problems:
        return f"{text}; {'; '.join(problems)}"
    if recorder.finished is None:
        apart = ", ".join(
            f"'{stack.name}' ({len(stack.blocks)} x {type(stack.blocks[0]).__name__})" for stack in recorder.stacks
        )
        return f"{text}; the blocks {apart} are never called as a whole, once each and with gradient: set blocks="
    return f"{text}; compute the loss by F.cross_entropy, or set blocks= and head="
