# SPDX-License-Identifier: Apache-2.0
"""Runs a training step up to its loss and restores weights, buffers and random states."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torchmetrics import Metric

from reco_lightning.windowing.engines.attention import AttentionCall
from reco_lightning.windowing.engines.interception import FunctionInterceptor
from reco_lightning.windowing.injection.foreign_losses import ForeignLosses

__all__ = ["CrossEntropyCall", "DryRun", "InertOptimizer", "StepEndedError"]

CrossEntropyCall = Callable[..., torch.Tensor]


class StepEndedError(BaseException):
    """Ends a traced training step; no ``except Exception`` of the user's catches it."""


class InertOptimizer:
    """Takes an optimizer's or scheduler's place in a traced step: calls do nothing, values can be read.

    Args:
        original: What it stands for; parameter groups are read from a copy.
    """

    def __init__(self, original: Any = None) -> None:
        self._original = original

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Copies of the parameter groups."""
        return [dict(group) for group in getattr(self._original, "param_groups", [])]

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Runs the closure, which holds the loss, and takes no step."""
        return closure() if callable(closure) else None

    def toggle_model(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Returns a context that changes nothing."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name, None)
        return (lambda *args, **kwargs: None) if value is None or callable(value) else value


class DryRun:
    """Restores, after each run of a step, what the step may have changed.

    Random states (Python, NumPy, torch, generators held by modules), buffers, attributes, lists and dictionaries held
    by modules, gradients and ``requires_grad`` flags are put back; ``self.log`` and, in manual optimisation, optimizers
    and ``manual_backward`` do nothing; dropout is off, so that two runs can be compared.

    Args:
        module: The LightningModule.
        step: Runs its training step on the batch at hand.
        evaluated: Modules put into evaluation mode during the runs (the parts of the blocks).
    """

    def __init__(self, module: nn.Module, step: Callable[[], Any], *, evaluated: list[nn.Module]) -> None:
        self.module = module
        self.step = step
        self.evaluated = evaluated
        self._foreign_losses = ForeignLosses()

    def run(
        self,
        cross_entropy: CrossEntropyCall,
        handlers: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
        *,
        fallback: Callable[..., Any] | None = None,
        log: Callable[[str, Any], None] = lambda name, value: None,
        manual_backward: Callable[..., None] = lambda loss: None,
    ) -> Any:
        """Runs the step with every call of ``F.cross_entropy`` handed to ``cross_entropy``.

        Args:
            cross_entropy: Called with the arguments of ``F.cross_entropy``; with those of ``F.nll_loss`` and this as
                ``function`` where that is called. Raises ``StepEndedError`` to end the step.
            handlers: The same for further functions.
            fallback: Called with every other function of torch, its positional and its keyword arguments.
            log: Called with what the module logs, by name.
            manual_backward: Called in the place of the module's own.

        Returns:
            What the step returned; ``None`` where it was ended by ``StepEndedError``.

        Raises:
            RuntimeError: If the step changed weights; they are not put back.
        """
        taps: dict[Callable[..., Any], Callable[..., Any]] = {
            F.cross_entropy: cross_entropy,
            F.nll_loss: partial(cross_entropy, function=F.nll_loss),
            scaled_dot_product_attention: _attention_without_dropout,
        }
        for dropout in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout):
            taps[dropout] = _no_dropout
        taps |= handlers or {}
        # compiled parts run as they were written: a watch cannot be traced, and would be compiled for one run
        with (
            self._restored(),
            self._foreign_losses,
            torch.compiler.set_stance("force_eager"),
            FunctionInterceptor(taps, fallback),
            _muted(self.module, log, manual_backward),
        ):
            try:
                return self.step()
            except StepEndedError:
                return None

    def losses(
        self, numbers: Sequence[int], handlers: Mapping[Callable[..., Any], Callable[..., Any]] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Runs the step without gradient up to the last of some calls of ``F.cross_entropy``.

        Args:
            numbers: Which calls, in order, counted from 0.
            handlers: As in ``run``.

        Returns:
            For each of them the logits and the targets that it was given.

        Raises:
            RuntimeError: If the step ended before.
        """
        given: list[tuple[torch.Tensor, torch.Tensor]] = []
        calls = 0

        def cross_entropy(
            logits: torch.Tensor, target: torch.Tensor, *args: Any, function: Any = F.cross_entropy, **kwargs: Any
        ) -> Any:
            nonlocal calls
            if calls in numbers:
                given.append((logits, target))
            if len(given) == len(numbers):
                raise StepEndedError
            calls += 1
            return function(logits, target, *args, **kwargs)

        with torch.no_grad():
            self.run(cross_entropy, handlers)
        if len(given) < len(numbers):
            raise RuntimeError("the training step did not reach its cross-entropy a second time")
        return given

    @contextmanager
    def _restored(self) -> Iterator[None]:
        module = self.module
        restores = [_remember(part, tensors=part is module or isinstance(part, Metric)) for part in module.modules()]
        weights = [
            (name, parameter, parameter.requires_grad, parameter._version, _copy_of(parameter.grad))
            for name, parameter in module.named_parameters()
        ]
        states = random.getstate(), np.random.get_state()
        with ExitStack() as stack:
            devices = {parameter.device.index for _, parameter, *_ in weights if parameter.is_cuda}
            stack.enter_context(torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the step itself will say it
            for part in self.evaluated:
                part.training = False
            try:
                yield
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
                for restore in restores:
                    restore()
                for _, parameter, flag, _, (grad, value) in weights:
                    parameter.requires_grad_(flag)
                    parameter.grad = grad
                    if grad is not None and value is not None and not torch.equal(grad, value):
                        grad.copy_(value)
                # Weights that autocast copied here without a graph must not serve the step that follows.
                torch.clear_autocast_cache()
                changed = [name for name, parameter, _, version, _ in weights if parameter._version != version]
                if changed:
                    raise RuntimeError(
                        f"training_step changes weights before its cross-entropy: {', '.join(changed[:3])}"
                        f"{' and more' if len(changed) > 3 else ''}; change them in on_train_batch_end"
                    )


_INTERNALS = frozenset(vars(nn.Module())) - {"_buffers", "_non_persistent_buffers_set", "training"}
"""What torch keeps in every module: hooks, parameters and children are left as they are."""


def _copy_of(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return tensor, None if tensor is None else tensor.detach().clone()


def _remember(owner: nn.Module, *, tensors: bool) -> Callable[[], None]:
    """Notes what a module holds; the result puts it back.

    Plain tensors are left alone in all but the LightningModule and metrics: sharding keeps weights in such places.
    """

    def is_own(name: str, value: Any) -> bool:
        return name not in _INTERNALS and (tensors or not isinstance(value, torch.Tensor))

    attributes = {name: value for name, value in vars(owner).items() if is_own(name, value)}
    known = set(vars(owner))
    containers = (list, dict, OrderedDict, set, deque)
    contents = [(value, copy.copy(value)) for value in attributes.values() if type(value) in containers]
    buffers = [_copy_of(buffer) for buffer in owner._buffers.values() if buffer is not None]
    if isinstance(owner, Metric):  # which adds to its states in place
        buffers += [_copy_of(value) for value in attributes.values() if isinstance(value, torch.Tensor)]
    sources = [(value, _get_state(value)) for value in attributes.values() if isinstance(value, _SOURCES)]

    def restore() -> None:
        held = vars(owner)
        for name in [name for name, value in held.items() if name not in known and is_own(name, value)]:
            del held[name]
        held.update(attributes)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        for buffer, value in buffers:
            assert buffer is not None
            assert value is not None
            if not torch.equal(buffer, value):  # a graph made in the run may hold the buffer as it is
                buffer.detach().copy_(value)
        for source, state in sources:
            _set_state(source, state)

    return restore


_SOURCES = (torch.Generator, random.Random, np.random.Generator)


def _get_state(source: Any) -> Any:
    if isinstance(source, torch.Generator):
        return source.get_state()
    return source.getstate() if isinstance(source, random.Random) else source.bit_generator.state


def _set_state(source: Any, state: Any) -> None:
    if isinstance(source, torch.Generator):
        source.set_state(state)
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.bit_generator.state = state


def _no_dropout(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return input


def _attention_without_dropout(*args: Any, **kwargs: Any) -> torch.Tensor:
    return AttentionCall(*args, **kwargs)._replace(dropout_p=0.0).run()


@contextmanager
def _muted(module: nn.Module, log: Callable[[str, Any], None], manual_backward: Callable[..., None]) -> Iterator[None]:
    def log_one(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log(name, value)

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log_one(name, value)

    stand_ins: dict[str, Any] = {"log": log_one, "log_dict": log_dict}
    if not getattr(module, "automatic_optimization", True):
        optimizers, schedulers = _optimizers(module)
        stand_ins |= {
            "optimizers": lambda *args, **kwargs: optimizers[0] if len(optimizers) == 1 else optimizers,
            "lr_schedulers": lambda: (schedulers[0] if len(schedulers) == 1 else schedulers) if schedulers else None,
            "manual_backward": lambda loss, *args, **kwargs: manual_backward(loss),
            "clip_gradients": lambda *args, **kwargs: None,
            "toggle_optimizer": lambda *args, **kwargs: None,
            "untoggle_optimizer": lambda *args, **kwargs: None,
        }
    own = {name: vars(module)[name] for name in stand_ins if name in vars(module)}
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            vars(module).pop(name, None)
        vars(module).update(own)


def _optimizers(module: Any) -> tuple[list[InertOptimizer], list[InertOptimizer]]:
    """Stand-ins for the module's optimizers and schedulers, as many as there are."""
    try:
        trainer = module.trainer
        optimizers, schedulers = list(trainer.optimizers), [c.scheduler for c in trainer.lr_scheduler_configs]
    except RuntimeError:  # not attached to a trainer
        configured: Any = module.configure_optimizers()
        schedulers = []
        if isinstance(configured, (list, tuple)) and configured and isinstance(configured[0], (list, tuple)):
            configured, schedulers = configured  # ([optimizers], [schedulers])
        optimizers = list(configured) if isinstance(configured, (list, tuple)) else [configured]
        entries = [entry for entry in optimizers if isinstance(entry, dict)]
        schedulers = [*schedulers, *(entry["lr_scheduler"] for entry in entries if "lr_scheduler" in entry)]
        optimizers = [entry["optimizer"] if isinstance(entry, dict) else entry for entry in optimizers]
    return [InertOptimizer(optimizer) for optimizer in optimizers], [InertOptimizer() for _ in schedulers]
