# SPDX-License-Identifier: Apache-2.0
"""Counts the floating-point operations and the saved bytes of a training step.

Beside the pipeline: ``explain`` and the demo compare windowed and plain steps with it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from reco_lightning.windowing.engines.attention import FLASH_ATTENTION, AttentionCall
from reco_lightning.windowing.engines.interception import FunctionInterceptor

__all__ = [
    "OperationCounter",
    "collect_new_objects",
    "count_hidden_operations",
    "count_operations",
    "count_saved_bytes",
]

_aten = torch.ops.aten
_COUNTED = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class OperationCounter(TorchDispatchMode):
    """Counts, while entered, floating-point operations as ``torch.utils.flop_counter`` does.

    Torch's own mode follows modules too, by hooks that reentrant checkpoints do not pass.

    Attributes:
        operations: Operations so far (a multiply-add is two), attention in full squares.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in _COUNTED:
            self.operations += _COUNTED[func._overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def count_operations(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Counts the floating-point operations of a forward and its backward pass; no gradient is left behind.

    Attention is counted in full squares, masked or not, as by ``torch.utils.flop_counter``. On CPU the attention that
    is written out is run, since the fused one is not counted there.

    Args:
        loss: Computes the scalar loss.
        parameters: The parameters that it trains.

    Returns:
        Operations (a multiply-add is two).

    Example:
        >>> layer = nn.Linear(4, 4, bias=False)
        >>> count_operations(lambda: layer(torch.ones(2, 4)).sum(), list(layer.parameters()))
        128
    """
    written_out: AbstractContextManager[object] = nullcontext()
    if all(parameter.device.type == "cpu" for parameter in parameters):
        written_out = sdpa_kernel(SDPBackend.MATH)
    gradients = [parameter.grad for parameter in parameters]
    try:
        with OperationCounter() as counter, written_out:
            loss().backward()  # torch.autograd.grad does not pass reentrant checkpoints
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return int(counter.operations)


def count_hidden_operations(loss: Callable[[], torch.Tensor]) -> int:
    """Counts the operations of ``count_operations`` that attention spends on masked query-key pairs.

    Kernels of causal attention leave them out.

    Args:
        loss: Computes the loss.

    Returns:
        Operations, forward and backward.

    Example:
        >>> states = torch.ones(1, 1, 3, 4)
        >>> count_hidden_operations(lambda: scaled_dot_product_attention(states, states, states, is_causal=True).sum())
        48
    """
    hidden = 0.0

    def count(query: torch.Tensor, key: torch.Tensor, output: torch.Tensor, share: float) -> None:
        nonlocal hidden
        products = 2 * output.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + output.shape[-1])
        # the backward pass has two products for each of the forward's, and a fused one makes the scores anew
        backward = (2 if query.device.type == "cpu" else 2.5) if output.requires_grad else 0
        hidden += share * products * (1 + backward)

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = AttentionCall(*args, **kwargs)
        output = call.run()
        share = _hidden_share(call.query, call.key) if call.is_causal else 0.0
        if call.attn_mask is not None:
            boolean = call.attn_mask.dtype == torch.bool
            closed = ~call.attn_mask if boolean else call.attn_mask == float("-inf")
            share = float(closed.double().mean())
        count(call.query, call.key, output, share)
        return output

    def attend_flash(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        outputs = FLASH_ATTENTION(query, key, value, dropout_p, is_causal, **kwargs)
        count(query, key, outputs[0], _hidden_share(query, key) if is_causal else 0.0)
        return outputs

    with FunctionInterceptor({scaled_dot_product_attention: attend, FLASH_ATTENTION: attend_flash}):
        loss()
    return round(hidden)


def _hidden_share(query: torch.Tensor, key: torch.Tensor) -> float:
    """Share of the pairs of rows that causal attention hides; the last query stands at the last key."""
    rows = query.shape[-2]
    return rows * (rows - 1) / 2 / (rows * key.shape[-2])


def count_saved_bytes(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Counts the bytes of memory that a forward keeps for its backward pass, the parameters' own left out.

    Args:
        loss: Computes the loss.
        parameters: The network's parameters.

    Returns:
        Bytes, each piece of memory counted once.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> count_saved_bytes(lambda: layer(torch.ones(2, 4)).sum(), list(layer.parameters()))
        32
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # an operation's output, kept as it is, would hold its own graph for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def collect_new_objects() -> Iterator[None]:
    """Limits ``gc.collect`` to the objects made inside; a full collection takes 0.2 s, more than a small step.

    Example:
        >>> with collect_new_objects():
        ...     ring = [1]
        ...     ring.append(ring)
        ...     del ring
        ...     gc.collect() >= 1
        True
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
