# SPDX-License-Identifier: Apache-2.0
"""Records one plain run of a training step: its blocks, what is made of their states, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.windowing.engines.call_slicing import find_hidden, map_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.engines.linear_calls import LINEAR_FUNCTIONS, find_linear_call
from reco_lightning.windowing.injection.attention_watch import AttentionWatch, under_checkpoint
from reco_lightning.windowing.injection.autograd_graph import depends
from reco_lightning.windowing.injection.dry_run import StepEndedError
from reco_lightning.windowing.injection.loss_calls import HeadRecord, MetLoss
from reco_lightning.windowing.injection.other_uses import OtherUses
from reco_lightning.windowing.injection.row_alignment import RowEvidence
from reco_lightning.windowing.losses.cross_entropy import read_options

__all__ = ["Overrides", "Stack", "StepRecorder"]


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


@dataclass
class Stack:
    """A list of modules that may be the network's blocks, and how they were called.

    Args:
        name: Its name.
        blocks: The modules.
        calls: Their indices in the order of the calls.
        attentions: Those that reached ``F.scaled_dot_product_attention``.
        shape: Shape of the states, once the last block was called.
        last_input: What the last call was given.
        behind: The stack whose states they were given, if any.
        problem: Why they cannot be windowed.
        recomputed: Whether they run under activation checkpointing.
        recomputes_parts: Whether they checkpoint their attention inside themselves.
        unmasked: Whether one attends with neither mask nor ``is_causal``.
    """

    name: str
    blocks: list[nn.Module]
    calls: list[int] = field(default_factory=list)
    attentions: set[int] = field(default_factory=set)
    shape: torch.Size | None = None
    last_input: torch.Tensor | None = None
    behind: Stack | None = None
    problem: str | None = None
    recomputed: bool = False
    recomputes_parts: bool = False
    unmasked: bool = False

    @property
    def is_part_of_heads(self) -> bool:
        """Whether they are layers of what stands behind another stack: they attend to nothing, and that one does."""
        if self.attentions or self.behind is None:
            return False
        return bool(self.behind.attentions) or self.are_layers

    @property
    def are_layers(self) -> bool:
        """Whether the modules have no parts, as linear layers have none."""
        return not any(list(block.children()) for block in self.blocks)

    def goes_on_from(self, other: Stack) -> bool:
        """Returns whether both may attend over the same rows."""
        may_attend = bool(other.attentions) or not (self.attentions or other.are_layers)
        return may_attend and other.shape == self.shape


class StepRecorder:
    """Watches one plain run of the step: the blocks run without gradient, what follows them with it.

    Args:
        module: The LightningModule.
        stacks: Lists of modules that may be the network's blocks, by name.
        tokens: N, video tokens of a sample.
        overrides: What the user names.

    Attributes:
        met: The network's losses.
        stack: Its blocks.
        records: What modules and linear functions behind blocks returned.
        linear_calls: All calls of linear functions behind the last blocks.
        called: Names of the modules that were called.
        lists: Names of lists that are no stacks of blocks: they end the run.
        problems: Why the step cannot be windowed.
    """

    def __init__(
        self, module: nn.Module, stacks: dict[str, list[nn.Module]], tokens: int, overrides: Overrides
    ) -> None:
        self.module = module
        self.stacks = [Stack(name, blocks) for name, blocks in stacks.items()]
        self.tokens = tokens
        self.overrides = overrides
        self.records: list[HeadRecord] = []
        self.linear_calls: list[HeadRecord] = []
        self.called: list[str] = []
        self.active: list[str] = []
        self.finished: list[Stack] = []
        self.losses = 0
        self.met: list[MetLoss] = []
        self.stack: Stack | None = None  # of the losses
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

    def _block(self, stack: Stack, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = find_hidden(args, kwargs)
        if hidden is None or hidden.ndim < 2:  # embeddings, say, which are called with ids: no stack of blocks
            return original(*args, **kwargs)
        if not torch.is_grad_enabled() and not hidden.requires_grad:
            return original(*args, **kwargs)
        if hidden is stack.last_input and len(stack.blocks) > 1:  # heads, say, that all read the same
            self._leave_out(stack)
        if index == 0 and hidden.requires_grad:
            stack.behind = self._stack_of(hidden)
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
        if stack.behind is not None and stack.is_part_of_heads:
            self._leave_out(stack)
        stack.shape, stack.last_input = hidden.shape, None
        self.finished.append(stack)
        self.linear_calls.clear()
        try:
            # What follows is watched with a graph of its own, which ends here.
            return map_hidden(output, partial(self.uses.root, stack.name))
        except TypeError as error:
            stack.problem = str(error)
            return output

    def _leave_out(self, stack: Stack) -> None:
        """Ends the run: a list of modules is none of blocks that turn states into states, one after the other."""
        self.lists.append(stack.name)
        raise StepEndedError

    def cross_entropy(
        self, logits: torch.Tensor, target: torch.Tensor, *args: Any, function: Any = F.cross_entropy, **kwargs: Any
    ) -> torch.Tensor:
        """Stands in for a loss function during the trace; the step goes on, in search of others."""
        number = self.losses
        self.losses += 1
        stack = self._stack_of(logits) if logits.requires_grad else None
        if stack is None:
            loss: torch.Tensor = self.uses.derived.call(function, (logits, target, *args), kwargs)
            return loss
        self._check(stack)
        if self.problems:
            raise StepEndedError
        self.stack = stack
        reached = tuple(record for record in self.records if depends(logits, record.output))
        met = MetLoss(number, logits, target, function, read_options(args, kwargs)["ignore_index"], reached)
        self.met.append(met)
        return self.uses.cross_entropy(met, args, kwargs)

    def _stack_of(self, logits: torch.Tensor) -> Stack | None:
        """The blocks whose states logits are made of."""
        for stack in self.finished[::-1]:
            root = self.uses.roots.get(stack.name)
            sources = [record.output for record in self.records] if root is None else [root]
            if any(depends(logits, source) for source in sources):
                return stack
        return None

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for ``Tensor.backward``: what may follow it is a step of an optimizer that is not the trainer's."""
        self.uses.take(args[0])
        if self.met:
            raise StepEndedError
        torch.Tensor.backward(*args, **kwargs)

    @property
    def handlers(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What stands in for torch's functions during the trace, besides the loss."""
        return {torch.Tensor.backward: self.backward, F.pad: self.evidence.pad}

    def _check(self, stack: Stack) -> None:
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
        elif stack.behind is not None and stack.goes_on_from(stack.behind):
            self.problems.append(
                f"two lists of blocks run one after the other on the same rows, '{stack.behind.name}' and "
                f"'{stack.name}', and windows would freeze the context of one alone; put them into one ModuleList, or "
                "name by blocks= the one that attends"
            )
        elif stack.calls != list(range(len(stack.blocks))):
            stack.problem = f"its blocks were called in the order {stack.calls[:9]}, and not once each"
        if stack.problem:
            self.problems.append(f"the blocks '{stack.name}' feed the loss, but {stack.problem}")
