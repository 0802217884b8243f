# SPDX-License-Identifier: Apache-2.0
"""Queries on the autograd graph between head and loss."""

from __future__ import annotations

import torch

__all__ = ["depends", "is_copied", "reaches_parameter"]

_COPIES = frozenset(
    f"{name}Backward{number}"
    for name in ("Alias", "Clone", "Permute", "ReshapeAlias", "Slice", "ToCopy", "Transpose", "UnsafeView", "View")
    for number in range(2)
)
"""What autograd calls the steps from a tensor to a copy or a view of it."""


def depends(output: torch.Tensor, source: torch.Tensor) -> bool:
    """Returns whether a tensor's first number has a gradient with respect to another tensor.

    Args:
        output: What may depend, with a graph.
        source: On what.

    Example:
        >>> states = torch.ones(2, requires_grad=True)
        >>> depends(states * 2, states), depends(torch.ones(2, requires_grad=True) * 2, states)
        (True, False)
    """
    (gradient,) = torch.autograd.grad(output.flatten()[:1].sum(), source, retain_graph=True, allow_unused=True)
    return gradient is not None


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
    waiting, seen = [output.grad_fn], {source.grad_fn, None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        assert node is not None
        if hasattr(node, "variable"):  # a leaf of the graph
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False
