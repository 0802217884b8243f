# SPDX-License-Identifier: Apache-2.0
"""Counts what a step costs: floating-point operations, and bytes kept for the backward pass. Counts, never timings.

Beside the pipeline: ``explain`` and the demo compare windowed and plain steps with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_operations", "count_saved_bytes"]


def count_operations(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Floating-point operations of a forward and its backward pass; no gradient is left behind.

    Attention is counted in full squares, masked or not, as by ``torch.utils.flop_counter``. On CPU the attention that
    is written out is run, since the fused one is not counted there.

    Args:
        loss: Computes the scalar loss.
        parameters: What to differentiate for.

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
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with FlopCounterMode(display=False) as counter, written_out:
        torch.autograd.grad(loss(), trained, allow_unused=True)
    return int(counter.get_total_flops())


def count_saved_bytes(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of memory that a forward keeps for its backward pass, the parameters' own left out.

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
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for storage in kept.values())
