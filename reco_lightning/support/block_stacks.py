# SPDX-License-Identifier: Apache-2.0
"""Finds the stacks of transformer blocks in a module."""

from __future__ import annotations

from torch import nn

__all__ = ["block_stacks"]


def block_stacks(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Lists the stacks of like blocks in a module: outermost ``ModuleList`` or ``Sequential`` of one class.

    Example:
        >>> list(block_stacks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})))
        ['layers']
    """
    stacks: dict[str, list[nn.Module]] = {}
    for name, part in module.named_modules():
        if not isinstance(part, (nn.ModuleList, nn.Sequential)) or not len(part):
            continue
        # torch's checkpoint_wrapper stands around the block; what it recomputes has to be the windowed forward
        blocks = [getattr(block, "_checkpoint_wrapped_module", block) for block in part]
        alike = len({type(block) for block in blocks}) == 1 and isinstance(blocks[0], nn.Module)
        alike = alike and any(True for _ in blocks[0].parameters())
        nested = any(name.startswith(f"{outer}.") for outer in stacks)
        if alike and not nested:
            stacks[name] = blocks
    return stacks
