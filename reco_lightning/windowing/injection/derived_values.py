# SPDX-License-Identifier: Apache-2.0
"""Follows what a training step computes from some tensors: metrics, guards and further losses of the logits."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["DerivedValues"]

_NUMBERS = frozenset({torch.Tensor.item, torch.Tensor.__float__})
_QUIET = frozenset(
    [
        *("base", "bfloat16", "clone", "contiguous", "detach", "device", "dim", "double", "dtype", "expand", "flatten"),
        *("float", "get", "getitem", "grad_fn", "half", "len", "narrow", "ndim", "numel", "permute", "requires_grad"),
        *("reshape", "select", "shape", "size", "split", "squeeze", "stride", "to", "transpose", "type", "unflatten"),
        *("unsqueeze", "view"),
    ]
)
"""Functions that say nothing of what is computed: views, copies, and questions about shape and type."""

_SHAPED_BY_OTHERS = frozenset(["to", "type_as", "view_as", "reshape_as", "expand_as"])


class DerivedValues:
    """Follows tensors from function to function, by their identity, through what ``FunctionInterceptor`` hands on.

    Args:
        hides_numbers: Whether Python's numbers of what is followed are NaN.

    Example:
        >>> from reco_lightning.windowing.engines.interception import FunctionInterceptor
        >>> logits, derived = torch.zeros(2, 3), DerivedValues()
        >>> derived.follow(logits)
        >>> with FunctionInterceptor({}, fallback=derived.call):
        ...     accuracy, other = (logits.argmax(-1) == 0).float().mean(), torch.ones(2).sum()
        >>> derived.names(accuracy), derived.names(other)
        ('argmax, eq, mean', '')
    """

    def __init__(self, *, hides_numbers: bool = False) -> None:
        self.hides_numbers = hides_numbers
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], tuple[str, ...]]] = {}

    def follow(self, *tensors: torch.Tensor, names: tuple[str, ...] = ()) -> None:
        """Follows tensors from here on."""
        for tensor in tensors:
            self._known[id(tensor)] = weakref.ref(tensor), names

    def names(self, value: Any) -> str:
        """Functions that made a value of those that are followed; ``""`` where it is not derived from them."""
        found = [self._known[id(tensor)][1] for tensor in self._derived(_tensors(value))]
        return ", ".join(dict.fromkeys(name for names in found for name in names)) or ("itself" if found else "")

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function, and follows its result where it is given what is followed."""
        if not self._known:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", str(function)).strip("_")
        # of other arguments these read the shape or the type alone
        given = list(self._derived(tree_leaves(args[:1] if name in _SHAPED_BY_OTHERS else (args, kwargs))))
        if not given:
            return function(*args, **kwargs)
        if self.hides_numbers and function in _NUMBERS:
            return math.nan
        result = function(*args, **kwargs)
        if name.endswith("_like") or name.startswith("new_"):  # made in its shape, not of its values
            return result
        names = tuple(dict.fromkeys(each for tensor in given for each in self._known[id(tensor)][1]))
        names += () if name in _QUIET or name in names else (name,)
        self.follow(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)), names=names)
        return result

    def _derived(self, leaves: list[Any]) -> Iterator[torch.Tensor]:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                known = self._known.get(id(leaf))
                if known is not None and known[0]() is leaf:
                    yield leaf


def _tensors(value: Any) -> list[Any]:
    """Tensors in a value: a nest of them, or an object that holds them, as a metric does."""
    found: list[Any] = []
    for leaf in tree_leaves(value):
        holds = not isinstance(leaf, torch.Tensor) and hasattr(leaf, "__dict__")
        found += tree_leaves(vars(leaf)) if holds else [leaf]
    return found
