# SPDX-License-Identifier: Apache-2.0
"""The base of published tokenizers: frozen and in evaluation mode."""

from __future__ import annotations

from torch import nn
from typing_extensions import Self, override

__all__ = ["FrozenNetwork"]


class FrozenNetwork(nn.Module):
    """Stays in evaluation mode, also as part of a model that is trained.

    Example:
        >>> nn.ModuleList([FrozenNetwork()]).train()[0].training
        False
    """

    @override
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)
