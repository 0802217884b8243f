# SPDX-License-Identifier: Apache-2.0
"""Finds the stacks of transformer blocks in a module."""

from __future__ import annotations

from torch import nn

__all__ = ["block_stacks", "runs_parts"]


def block_stacks(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Lists the stacks of like blocks in a module: outermost ``ModuleList`` or ``Sequential`` of one class.

    Where the entries of a ``ModuleList`` are lists of parts, as in x-transformers, the module that holds it calls them
    part by part: it is a stack of one block.

    Example:
        >>> list(block_stacks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})))
        ['layers']
    """
    stacks: dict[str, list[nn.Module]] = {}
    for name, part in module.named_modules():
        if not isinstance(part, (nn.ModuleList, nn.Sequential)) or not len(part):
            continue
        if any(name.startswith(f"{outer}.") for outer in stacks):
            continue
        owner = name.rpartition(".")[0]
        if owner and _is_list_of_parts(part):
            stacks[owner] = [module.get_submodule(owner)]
            continue
        # torch's checkpoint_wrapper stands around the block; what it recomputes has to be the windowed forward
        blocks = [getattr(block, "_checkpoint_wrapped_module", block) for block in part]
        alike = len({type(block) for block in blocks}) == 1 and isinstance(blocks[0], nn.Module)
        if alike and any(True for _ in blocks[0].parameters()):
            stacks[name] = blocks
    return stacks


def runs_parts(block: nn.Module) -> bool:
    """Returns whether a block calls the parts of layers that are no modules of their own."""
    return any(map(_is_list_of_parts, block.modules()))


def _is_list_of_parts(part: nn.Module) -> bool:
    if not isinstance(part, nn.ModuleList) or not len(part):
        return False
    return all(isinstance(entry, (nn.ModuleList, nn.ModuleDict)) for entry in part) and any(
        True for _ in part.parameters()
    )
