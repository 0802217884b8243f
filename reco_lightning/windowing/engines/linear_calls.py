# SPDX-License-Identifier: Apache-2.0
"""Reads calls of functions that do what a linear layer does: a head that is no module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["LINEAR_FUNCTIONS", "LinearCall", "find_linear_call"]

LINEAR_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    F.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.einsum,
)


@dataclass(frozen=True)
class LinearCall:
    """A linear layer's call, by whatever function.

    Args:
        states: What it reads, (B, ..., D).
        weight: (V, D).
        bias: (V,).
        plain: Makes the call as it was written.
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    plain: Callable[[], torch.Tensor]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Returns what the layer makes of states, (B, ..., V)."""
        return self.plain() if states is self.states else F.linear(states, self.weight, self.bias)


def find_linear_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearCall | None:
    """Reads a call as that of a linear layer on states (B, ..., D).

    Args:
        function: One of ``LINEAR_FUNCTIONS``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The call; ``None`` where it is another.

    Example:
        >>> states, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
        >>> call = find_linear_call(torch.einsum, ("vd,btd->btv", weight, states), {})
        >>> torch.allclose(call(states[:, 1:]), F.linear(states, weight)[:, 1:])
        True
    """
    found = _operands(function, *args, **kwargs)
    if found is None:
        return None
    states, weight, bias = found
    if states.ndim < 2 or weight.ndim != 2 or not (states.is_floating_point() and weight.is_floating_point()):
        return None
    return LinearCall(states, weight, bias, lambda: function(*args, **kwargs))


_Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _operands(function: Callable[..., Any], *args: Any, **kwargs: Any) -> _Operands | None:
    if function is F.linear:
        return _of_linear(*args, **kwargs)
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if function is torch.einsum and isinstance(args[0], str):
        return _of_einsum(args[0], *(tensors or args[1]))
    if len(tensors) == 2 and not kwargs:
        return tensors[0], tensors[1].mT if tensors[1].ndim == 2 else tensors[1], None
    return None


def _of_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> _Operands:
    return input, weight, bias


def _of_einsum(equation: str, *operands: torch.Tensor) -> _Operands | None:
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(operands) != 2:
        return None
    for (of_states, of_weight), (states, weight) in ((terms, operands), (terms[::-1], operands[::-1])):
        width, classes = of_states[-1:], output[-1:]
        if of_states[:-1] == output[:-1] and set(of_weight) == {width, classes} and len(of_weight) == 2:
            return states, weight if of_weight == classes + width else weight.mT, None
    return None
