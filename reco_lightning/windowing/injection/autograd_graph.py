# SPDX-License-Identifier: Apache-2.0
"""Queries on the autograd graph between head and loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["depends", "is_copied", "reaches_parameter"]

_COPIES = frozenset(
    f"{name}Backward{number}"
    for name in ("Alias", "Clone", "Permute", "ReshapeAlias", "Slice", "ToCopy", "Transpose", "UnsafeView", "View")
    for number in range(2)
)
"""What autograd calls the steps from a tensor to a copy or a view of it."""


def depends(output: torch.Tensor, source: torch.Tensor) -> bool:
    """Returns whether a tensor has a gradient with respect to another tensor; no gradient is computed.

    Args:
        output: What may depend, with a graph.
        source: On what: a tensor with a graph, or a leaf that requires a gradient.

    Example:
        >>> states = torch.ones(2, requires_grad=True)
        >>> depends(states * 2, states), depends(torch.ones(2, requires_grad=True) * 2, states)
        (True, False)
    """
    return output is source or any(
        node is source.grad_fn if source.grad_fn is not None else getattr(node, "variable", None) is source
        for node in _nodes(output)
    )


def _nodes(output: torch.Tensor, *, until: torch.autograd.graph.Node | None = None) -> Iterator[Any]:
    """The nodes of a tensor's graph, those that lie behind ``until`` alone left out."""
    waiting, seen = [output.grad_fn], {until, None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        assert node is not None
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def is_copied(output: torch.Tensor, source: torch.Tensor) -> bool:
    """Returns whether nothing but copies and views lies between ``source`` and ``output``, on one device.

    Args:
        output: The later tensor.
        source: The earlier one.

    Example:
        >>> states = torch.ones(2, 2, requires_grad=True) * 1
        >>> is_copied(states.double()[:, 1:].clone(), states), is_copied(states * 1, states)
        (True, False)
    """
    node = output.grad_fn
    while node is not None and node != source.grad_fn:
        if node.name() not in _COPIES:
            return False
        node = node.next_functions[0][0]
    return node is not None and output.device == source.device


def reaches_parameter(output: torch.Tensor, source: torch.Tensor) -> bool:
    """Returns whether the way from ``output`` back to ``source`` meets a parameter.

    Args:
        output: The later tensor.
        source: The earlier one.

    Example:
        >>> states = torch.ones(2, requires_grad=True) * 1
        >>> reaches_parameter(states * torch.ones(2, requires_grad=True), states), reaches_parameter(states * 2, states)
        (True, False)
    """
    return any(hasattr(node, "variable") for node in _nodes(output, until=source.grad_fn))  # a leaf of the graph
