# SPDX-License-Identifier: Apache-2.0
"""Tracks memory and operations of a training step, on fake tensors too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_iter
from typing_extensions import override

from reco_lightning.windowing.cost import OperationCounter, collect_new_objects
from reco_lightning.windowing.engines.attention import AttentionCall
from reco_lightning.windowing.engines.interception import FunctionInterceptor

__all__ = ["Kernels", "StepTrace", "StepTracker", "run_kernels", "trace_step"]

Kernels = Literal["cuda", "cpu", "math"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class StepTrace:
    """The memory and operations of a training step beyond weights and optimizer state.

    Args:
        operations: Floating-point operations, forward and backward, recomputation included.
        saved_bytes: Alive between forward and backward, gradients left out.
        peak_bytes: Alive at the highest point of forward and backward, gradients included where they are kept.
        rest_bytes: Alive after the backward pass, while the optimizer works, gradients left out.
    """

    operations: int
    saved_bytes: int
    peak_bytes: int
    rest_bytes: int


class StepTracker(OperationCounter):
    """Follows, while entered, the memory of new tensors from their making to their end, and counts operations.

    It sees what an allocator is asked for by operators. Scratch space inside a kernel, and what an allocator rounds up
    or cannot reuse, are beyond it. Tensors without data (of ``FakeTensorMode``) are followed like all others.

    Attributes:
        live: Bytes alive.
        peak: The most that were alive at once.
        operations: As of `OperationCounter`.

    Example:
        >>> with StepTracker() as tracker:
        ...     made = torch.ones(4) + torch.ones(4)
        >>> tracker.live, tracker.peak
        (16, 48)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = {id(value.untyped_storage()) for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        output = super().__torch_dispatch__(func, types, args, kwargs)
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor) and id(value.untyped_storage()) not in given:
                self._follow(value.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def end(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, end)
        self.live += size
        self.peak = max(self.peak, self.live)


def trace_step(
    step: Callable[[], torch.Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    gradients: bool = True,
) -> StepTrace:
    """Runs forward and backward as a trainer does and follows their memory; no gradient is left behind.

    The trainer's order counts: the last step's gradients are alive during the forward, and go before the backward.

    Args:
        step: Computes the loss.
        parameters: The network's parameters.
        autocast: Makes the context of the forward.
        gradients: Whether gradients are kept whole; without, each goes as soon as it is complete, as where every
            process keeps a share of it alone.

    Example:
        >>> layer = nn.Linear(4, 4, bias=False)
        >>> trace = trace_step(lambda: layer(torch.ones(2, 4)).sum(), list(layer.parameters()))
        >>> trace.operations, trace.saved_bytes  # the input (2, 4) and the loss are saved
        (128, 36)
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kept = sum(parameter.nbytes for parameter in trained) if gradients else 0
    with ExitStack() as stack:
        if gc.isenabled():  # when Python collects is chance, and would make the peak so
            gc.disable()
            stack.callback(gc.enable)
        stack.enter_context(collect_new_objects())
        tracker = stack.enter_context(StepTracker())
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if gradients else None
            if not gradients:
                stack.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
        with autocast():
            loss = step()
        gc.collect()  # what a cycle of references still holds is nobody's to keep
        saved = tracker.live - kept
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        del loss
        gc.collect()
        held = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
        rest = tracker.live - held
        for parameter in trained:
            parameter.grad = None
    return StepTrace(tracker.operations, saved, tracker.peak, rest)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def run_kernels(kernels: Kernels) -> AbstractContextManager[Any]:
    """Returns the context in which a step keeps what these kernels keep; in ``"cuda"`` values are not computed.

    Args:
        kernels: ``"cuda"``: flash attention, which keeps its output and a number per row and head in place of the
            scores, and norms in one kernel. ``"cpu"``: what a CPU runs. ``"math"``: attention written out, with all
            scores kept.

    Example:
        >>> states = torch.ones(1, 1, 64, 8, requires_grad=True)
        >>> def kept(kernels):
        ...     with run_kernels(kernels), StepTracker() as tracker:
        ...         loss = scaled_dot_product_attention(states, states, states, is_causal=True).sum()
        ...     return tracker.live
        >>> kept("cpu") < 64 * 64 * 4 < kept("math")
        True
    """
    if kernels == "math":
        return sdpa_kernel(SDPBackend.MATH)
    if kernels == "cpu":
        return nullcontext()
    return FunctionInterceptor({scaled_dot_product_attention: _cuda_attention, F.rms_norm: _cuda_norm})


def _cuda_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    query, key, value, attn_mask, dropout_p, *_ = AttentionCall(*args, **kwargs)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.ndim > 2:  # a mask of the caller's own, and not the engine's causal one
        bias = torch.empty_like(attn_mask, dtype=query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
        outputs = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, False)
    else:
        outputs = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, True)
    return cast(torch.Tensor, outputs[0])


def _cuda_norm(
    states: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        states = states.float()
    return _OneKernelNorm.apply(states, weight)


class _OneKernelNorm(torch.autograd.Function):
    """The memory of a norm in one kernel, which torch has for CUDA alone: of no value, but of its shapes."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, states.new_empty(*states.shape[:-1], 1), weight)
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, _, weight = ctx.saved_tensors
        return torch.empty_like(states), None if weight is None else torch.empty_like(weight)
