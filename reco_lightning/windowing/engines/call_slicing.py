# SPDX-License-Identifier: Apache-2.0
"""Slices a block's call to some rows of the sequence: states, rotary tables, position ids, masks.

Used by the engines, which run a block on its context's rows and on its window's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

__all__ = [
    "checkpoints_itself",
    "cut_call",
    "cut_tensor",
    "find_hidden",
    "map_hidden",
    "pack",
    "replace_arguments",
    "take_hidden",
]


def checkpoints_itself(block: nn.Module) -> bool:
    """Returns whether a block is a layer of transformers under ``gradient_checkpointing_enable()``."""
    return bool(getattr(block, "gradient_checkpointing", False))


def find_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Returns the states (B, T, D) of a block's or head's call: its first floating-point tensor, if any."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns the states (B, T, D) of a block's or head's call, as ``find_hidden`` does.

    Raises:
        TypeError: If the call has no such tensor.
    """
    hidden = find_hidden(args, kwargs)
    if hidden is None:
        kinds = [type(value).__name__ for value in (*args, *kwargs.values())]
        raise TypeError(f"a block was called without states (B, T, D): got {kinds}")
    return hidden


def map_hidden(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies a function to the states in a block's output, a tensor or a tuple that begins with one.

    Raises:
        TypeError: If the output is something else.
    """
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        values = [function(output[0]), *output[1:]]
        return output._make(values) if hasattr(output, "_make") else type(output)(values)  # _make: a named tuple
    raise TypeError(
        f"a block returned {type(output).__name__}; a tensor or a tuple that begins with one can be windowed"
    )


def pack(outputs: Sequence[Any]) -> Any:
    """Joins the groups' outputs along the batch; shorter ones are filled up with zero rows."""
    if len(outputs) == 1:
        return outputs[0]
    states = [take_hidden(tuple(output) if isinstance(output, (tuple, list)) else (output,), {}) for output in outputs]
    rows = max(state.shape[1] for state in states)
    joined = torch.cat([F.pad(state, (0, 0, 0, rows - state.shape[1])) for state in states])
    return map_hidden(outputs[0], lambda _: joined)


def replace_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sets arguments of a call by name, wherever they stand in it.

    Example:
        >>> replace_arguments(lambda x, mask=None, cache=None: None, (1, 2), {}, {"cache": 3})
        ((1, 2, 3), {})
        >>> replace_arguments(lambda x, **kwargs: None, (1,), {"mask": 2}, {"cache": 3})
        ((1,), {'mask': 2, 'cache': 3})
    """
    if not changed:
        return args, kwargs
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    named = {name: value for name, value in changed.items() if name in signature.parameters}
    bound.arguments.update(named)
    return bound.args, bound.kwargs | {name: value for name, value in changed.items() if name not in named}


def cut_tensor(value: torch.Tensor, *, start: int, stop: int, rows: int) -> torch.Tensor:
    """Cuts a sequence-shaped argument to the rows ``start ... stop`` of T = ``rows``; others pass unchanged.

    Masks (..., T, T) and (B, 1, 1, T) keep the columns ``0 ... stop``: a row attends to everything before it. A
    floating-point tensor is never cut along its last dimension otherwise, since that is a width.

    Example:
        >>> cut_tensor(torch.ones(4, 4), start=2, stop=3, rows=4).shape
        torch.Size([1, 3])
        >>> cut_tensor(torch.ones(1, 4, 8), start=2, stop=3, rows=4).shape
        torch.Size([1, 1, 8])
    """
    shape = value.shape
    if value.ndim >= 2 and shape[-1] == rows and shape[-2] == rows:
        return value[..., start:stop, :stop]
    if value.ndim == 4 and shape[-1] == rows and shape[-2] == 1:
        return value[..., :stop]
    dims = range(value.ndim - 1) if value.is_floating_point() or value.is_complex() else range(value.ndim)
    candidates = [dim for dim in dims if shape[dim] == rows]
    if not candidates:
        return value
    # Where the batch, or the heads, happen to be as many as the rows, the sequence is the later dimension.
    return value.narrow(candidates[-1], start, stop - start)


_SCALARS = (bool, int, float, str, torch.SymBool, torch.SymInt, torch.SymFloat)


def cut_block_mask(mask: BlockMask, *, start: int, stop: int, samples: slice | None) -> BlockMask:
    """Returns the mask of ``flex_attention`` for the queries ``start ... stop`` over the keys ``0 ... stop``."""
    offset = 0 if samples is None else samples.start

    def moved(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return mask.mask_mod(b + offset, h, q + start, kv)

    batch, heads = mask.kv_num_blocks.shape[:2]
    if samples is not None and batch > 1:
        batch = samples.stop - samples.start
    return create_block_mask(
        moved, batch, heads, stop - start, stop, device=mask.kv_num_blocks.device, BLOCK_SIZE=mask.BLOCK_SIZE
    )


@dataclass(eq=False)
class _Cut:
    """Cuts an argument; a function that called itself would keep the states until Python collects its cycles."""

    hidden: torch.Tensor
    states: torch.Tensor
    start: int
    stop: int
    rows: int
    samples: slice | None
    batch: int

    def __call__(self, value: Any) -> Any:
        if value is self.hidden:
            return self.states
        if isinstance(value, torch.Tensor):
            if self.samples is not None and value.ndim >= 2 and value.shape[0] == self.batch:
                if self.batch == self.rows and (value.ndim == 2 or all(size != self.rows for size in value.shape[1:])):
                    raise ValueError(
                        f"a block's argument {tuple(value.shape)} may run along the batch or the sequence, both are "
                        f"{self.rows} long; several windows in a batch cannot be told apart then: choose another "
                        "batch_size"
                    )
                value = value[self.samples]
            return cut_tensor(value, start=self.start, stop=self.stop, rows=self.rows)
        if type(value) in (tuple, list):
            return type(value)(self(item) for item in value)
        if type(value) is dict:
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, BlockMask):
            return cut_block_mask(value, start=self.start, stop=self.stop, samples=self.samples)
        if not isinstance(value, _SCALARS) and hasattr(value, "get_seq_length") and hasattr(value, "update"):
            return None
        return value


def cut_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    states: torch.Tensor,
    *,
    start: int,
    stop: int,
    rows: int,
    samples: slice | None = None,
    batch: int = 0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Makes a block's call on the rows ``start ... stop`` out of its call on the full sequence.

    Args:
        args: Positional arguments of the full call.
        kwargs: Keyword arguments of the full call.
        states: The states that take the place of the call's own.
        start: First row.
        stop: One past the last row.
        rows: T, the length of the full sequence.
        samples: The part of the batch to keep, ``None`` for all of it.
        batch: B, the size of the batch; read where ``samples`` is given.

    Returns:
        The arguments of the cut call. A key/value cache among them becomes ``None``: training has no use for one.

    Raises:
        ValueError: If it cannot be told whether an argument runs along the batch or along the sequence.
    """
    cut = _Cut(take_hidden(args, kwargs), states, start, stop, rows, samples, batch)
    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
