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
from reco_lightning.windowing.engines.linear_calls import LINEAR_FUNCTIONS, find_linear_call
from reco_lightning.windowing.injection.attention_watch import AttentionWatch, under_checkpoint
from reco_lightning.windowing.injection.autograd_graph import depends
from reco_lightning.windowing.injection.dry_run import DryRun, StepEndedError
from reco_lightning.windowing.injection.loss_calls import HeadRecord, LossCall, MetLoss, TracedHead, describe_losses
from reco_lightning.windowing.injection.other_uses import OtherUses
from reco_lightning.windowing.injection.row_alignment import RowEvidence, find_trailing_rows
from reco_lightning.windowing.injection.scattered_rows import find_scattered_rows
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


@dataclass
class _Stack:
    name: str
    blocks: list[nn.Module]
    calls: list[int] = field(default_factory=list)
    attentions: set[int] = field(default_factory=set)
    shape: torch.Size | None = None
    last_input: torch.Tensor | None = None
    problem: str | None = None
    recomputed: bool = False
    recomputes_parts: bool = False
    unmasked: bool = False


class _Recorder:
    """Watches one plain run of the step: the blocks run without gradient, what follows them with it."""

    def __init__(
        self, module: nn.Module, stacks: dict[str, list[nn.Module]], tokens: int, overrides: Overrides
    ) -> None:
        self.module = module
        self.stacks = [_Stack(name, blocks) for name, blocks in stacks.items()]
        self.tokens = tokens
        self.overrides = overrides
        self.records: list[HeadRecord] = []
        self.linear_calls: list[HeadRecord] = []
        self.called: list[str] = []
        self.active: list[str] = []
        self.finished: list[_Stack] = []
        self.losses = 0
        self.met: list[MetLoss] = []
        self.stack: _Stack | None = None  # of the losses
        self.lists: list[str] = []  # of modules that are no stacks of blocks
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
                hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self._begin(name)))
                hooks.append(part.register_forward_hook(partial(self._leave, name), with_kwargs=True))
        for patch in patches:
            patch.install()

        def remove() -> None:
            for patch in reversed(patches):
                patch.remove()
            for hook in hooks:
                hook.remove()

        return remove

    def _begin(self, name: str) -> None:
        self.called.append(name)
        self.active.append(name)

    def _leave(self, name: str, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        while self.active and self.active.pop() != name:  # what an exception has ended was not left
            pass
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if isinstance(part, nn.Embedding) and tensors:
            self.evidence.ids.append(tensors[0])
        if self.finished and tensors and isinstance(output, torch.Tensor) and output.requires_grad and output.ndim >= 2:
            self.records.append(HeadRecord(name, part, tensors[0], output, output._version, tuple(self.active)))

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function of torch that has no handler, and follows its result."""
        result = self.uses.derived.call(function, args, kwargs)
        if self.finished and function in LINEAR_FUNCTIONS:
            call = find_linear_call(function, args, kwargs)
            if call is not None:
                name = f"{getattr(function, '__name__', 'linear').strip('_')}()"
                record = HeadRecord(name, None, call.states, result, result._version, tuple(self.active))
                self.linear_calls.append(record)
                if result.requires_grad:
                    self.records.append(record)
        return result

    def _block(self, stack: _Stack, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = find_hidden(args, kwargs)
        if hidden is None or hidden.ndim < 2:  # embeddings, say, which are called with ids: no stack of blocks
            return original(*args, **kwargs)
        if not torch.is_grad_enabled() and not hidden.requires_grad:
            return original(*args, **kwargs)
        if hidden is stack.last_input and len(stack.blocks) > 1:  # heads, say, that all read the same
            self._leave_out(stack)
        stack.last_input = hidden
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
        states = find_hidden(tuple(output) if isinstance(output, (tuple, list)) else (output,), {})
        if states is not None and states.shape != hidden.shape:
            self._leave_out(stack)
        if index < len(stack.blocks) - 1:
            if states is not None:
                self.uses.derived.follow(states)
            return output

        if hidden.ndim < 3:
            stack.problem = f"its blocks take states of the shape {tuple(hidden.shape)}, and not (B, T, D)"
        stack.shape, stack.last_input = hidden.shape, None
        self.finished.append(stack)
        self.linear_calls.clear()
        try:
            # What follows is watched with a graph of its own, which ends here.
            return map_hidden(output, partial(self.uses.root, stack.name))
        except TypeError as error:
            stack.problem = str(error)
            return output

    def _leave_out(self, stack: _Stack) -> None:
        """Ends the run: a list of modules is none of blocks that turn states into states, one after the other."""
        self.lists.append(stack.name)
        raise StepEndedError

    def cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for ``F.cross_entropy`` during the trace; the step goes on, in search of others."""
        number = self.losses
        self.losses += 1
        stack = self._stack_of(logits) if logits.requires_grad else None
        if stack is None:
            loss: torch.Tensor = self.uses.derived.call(F.cross_entropy, (logits, target, *args), kwargs)
            return loss
        self._check(stack)
        if self.problems:
            raise StepEndedError
        self.stack = stack
        reached = tuple(record for record in self.records if depends(logits, record.output))
        self.met.append(MetLoss(number, logits, target, kwargs.get("ignore_index", -100), reached))
        return self.uses.cross_entropy(number, logits, target, *args, **kwargs)

    def _stack_of(self, logits: torch.Tensor) -> _Stack | None:
        """The blocks whose states logits are made of."""
        for stack in self.finished[::-1]:
            root = self.uses.roots.get(stack.name)
            sources = [record.output for record in self.records] if root is None else [root]
            if any(depends(logits, source) for source in sources):
                return stack
        return None

    def linear_cross_entropy(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for torch's fused loss."""
        self.problems.append(
            "the loss is torch.nn.functional.linear_cross_entropy, which never makes the logits; call the head and "
            "F.cross_entropy: windows save that memory too"
        )
        raise StepEndedError

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for ``Tensor.backward``: what may follow it is a step of an optimizer that is not the trainer's."""
        if self.met:
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

    def _check(self, stack: _Stack) -> None:
        """Notes why a loss on a stack of blocks cannot be windowed, if so."""
        if self.stack is not None and self.stack is not stack:
            self.problems.append(
                f"two networks ('{self.stack.name}', '{stack.name}') have a cross-entropy each; name the one to window "
                "by network="
            )
        elif under_checkpoint():
            self.problems.append(
                "F.cross_entropy runs under torch.utils.checkpoint, whose recomputation would be the plain step's; "
                "take head and loss out of it: windows save that memory too"
            )
        elif stack.calls != list(range(len(stack.blocks))):
            stack.problem = f"its blocks were called in the order {stack.calls[:9]}, and not once each"
        if stack.problem:
            self.problems.append(f"the blocks '{stack.name}' feed the loss, but {stack.problem}")

    def describe(self, dry_run: DryRun) -> Trace:
        """Describes what was met.

        Raises:
            ValueError: If it cannot be windowed; the text says why.
        """
        stack, losses = self.stack, self.met
        assert stack is not None
        assert stack.shape is not None
        root = self.uses.roots[stack.name]
        batch, rows = root.shape[0], root.shape[1:-1].numel()
        heads, calls, records = describe_losses(losses, root, self.linear_calls, self.overrides.head)
        calls = self._find_scattered(dry_run, calls, batch, rows)
        weights = self.uses.weights(calls)
        states = [record.states for record in records]
        is_open = any(call.head is None for call in calls) or any(one is not states[0] for one in states)
        return Trace(
            network=self._find_network([head.name for head in heads if head.is_module]),
            blocks=stack.name,
            heads=tuple(heads),
            calls=tuple(replace(call, weight=weight) for call, weight in zip(calls, weights, strict=True)),
            rows=rows,
            trailing_rows=self._align(calls, batch, rows),
            prefix=self.overrides.prefix_tokens,
            attention=len(stack.attentions) == len(stack.blocks),
            recomputed=stack.recomputed,
            recomputes_parts=stack.recomputes_parts and not any(map(checkpoints_itself, stack.blocks)),
            unmasked=stack.unmasked,
            flat=len(stack.shape) == 3,
            is_open=is_open,
            hidden=(root if is_open else states[0]).detach().reshape(batch, rows, -1),
            unlogged=self.uses.logged,
            returns_loss=self.uses.returned,
        )

    def _find_network(self, heads: Sequence[str]) -> str:
        """The smallest called module with blocks and heads; the outermost one with the blocks where there is none."""
        assert self.stack is not None
        around = [name for name in self.called if _holds(name, self.stack.name)]
        common = [name for name in around if heads and all(_holds(name, head) for head in heads)]
        return max(common, key=len) if common else min(around, key=len, default="")

    def _find_scattered(self, dry_run: DryRun, calls: list[LossCall], batch: int, rows: int) -> list[LossCall]:
        numbers = [call.number for call in calls if call.scattered is not None]
        if not numbers:
            return calls
        assert self.stack is not None
        behind = list({record.module for loss in self.met for record in loss.reached if record.module is not None})
        leaves = [module for module in behind if not list(module.children())]
        try:
            found = find_scattered_rows(dry_run, self.stack.blocks[-1], leaves, numbers, batch=batch, rows=rows)
        except ValueError as error:
            raise ValueError(f"{self._name_readers(batch, rows)}{error}") from error
        if len(calls) == len(numbers) and all(len(set(one)) == len(one) and list(one) != sorted(one) for one in found):
            raise ValueError(
                f"loss rows and rows of the network are not in one order: a sample's loss rows come from the rows "
                f"{', '.join(map(str, found[0][:8]))} ...; windows need the loss over the tokens in the order of the "
                "sequence"
            )
        origins = dict(zip(numbers, found, strict=True))
        return [replace(call, scattered=origins.get(call.number)) for call in calls]

    def _name_readers(self, batch: int, rows: int) -> str:
        """Which heads read other rows than the blocks make."""
        assert self.stack is not None
        for loss in self.met:
            for record in loss.reached:
                size = record.states.shape[:-1].numel()
                if record.module is not None and record.output.shape[-1] == loss.classes and size != batch * rows:
                    own = size // batch
                    return f"the head '{record.name}' reads {own} rows, the blocks '{self.stack.name}' have {rows}; "
        return ""

    def _align(self, calls: Sequence[LossCall], batch: int, rows: int) -> int:
        """Rows after the one that predicts the last video token."""
        counted = torch.zeros(rows, dtype=torch.bool)
        for loss, call in zip(self.met, calls, strict=True):
            counts = (loss.target.reshape(batch, -1) != loss.ignore_index).any(dim=0).cpu()
            counted[torch.tensor(call.origins(rows))[counts]] = True
        start = min(min(call.origins(rows)) for call in calls)
        stop = max(max(call.origins(rows)) for call in calls) + 1
        return find_trailing_rows(
            counted[start:stop],
            rows=rows,
            offset=start,
            tokens=self.tokens,
            prefix=self.overrides.prefix_tokens,
            evidence=self.evidence,
            batch=batch,
            classes=max(loss.classes for loss in self.met),
            ignore_index=self.met[0].ignore_index,
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
        MisconfigurationException: If blocks, head or loss are not found; the message lists what was.
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
        raise MisconfigurationException(_explain_absence(module, recorder, _name_stacks(stacks)))
    trace = None
    if not recorder.problems:
        try:
            trace = recorder.describe(dry_run)
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
) -> tuple[_Recorder, DryRun]:
    """Runs the step once, watched."""
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
                fallback=recorder.function,
                log=recorder.uses.log,
                manual_backward=recorder.uses.take,
            )
        recorder.uses.take(result, returned=True)
    except Exception as error:
        if not recorder.met:  # what is wrong behind the loss is the step's own affair
            remove()
            dry_run.run(F.cross_entropy)  # what is wrong without the trace too is the step's own error
            raise MisconfigurationException(
                f"{type(module).__name__} cannot be windowed: its training step fails under the trace of "
                f"{_name_stacks(stacks)}: {type(error).__name__}: {error}; set network= or blocks= if these are the "
                "wrong ones"
            ) from error
    finally:
        remove()
    return recorder, dry_run


def _name_stacks(stacks: Mapping[str, Sequence[nn.Module]]) -> str:
    return ", ".join(f"'{name}' ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in stacks.items())


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
    if recorder.finished and uncalled:
        return (
            f"{text}; the head '{uncalled[-1]}' was never called: if its weight enters a fused linear cross-entropy "
            "(Liger), call the head and F.cross_entropy in its place: windows save that memory too"
        )
    problems = [f"the blocks '{stack.name}': {stack.problem}" for stack in recorder.stacks if stack.problem]
    if problems:
        return f"{text}; {'; '.join(problems)}"
    if not recorder.finished:
        apart = _name_stacks({stack.name: stack.blocks for stack in recorder.stacks})
        return f"{text}; the blocks {apart} are never called as a whole, once each and with gradient: set blocks="
    return f"{text}; compute the loss by F.cross_entropy, or set blocks= and head="
