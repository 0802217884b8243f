# SPDX-License-Identifier: Apache-2.0
"""Raises torch.compile's limit of recompilations by one for each window."""

from __future__ import annotations

import torch
import torch._dynamo.config
from torch import nn

__all__ = ["RecompileLimit", "is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module or a part of it runs under ``torch.compile``, as a wrapper or in place.

    Example:
        >>> is_compiled(nn.Sequential(nn.Linear(2, 2)))
        False
        >>> is_compiled(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")))
        True
    """
    return any(
        "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


class RecompileLimit:
    """Raises the number of graphs that torch compiles of one function before it gives up, and puts it back.

    Each window is a shape of its own and so a graph of its own; torch's limit is 8.
    """

    def __init__(self) -> None:
        self._before: int | None = None

    def raise_by(self, graphs: int) -> None:
        """Makes room for that many graphs more."""
        self.restore()
        self._before = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = self._before + graphs

    def restore(self) -> None:
        """Puts torch's own setting back."""
        if self._before is not None:
            torch._dynamo.config.recompile_limit = self._before
            self._before = None
