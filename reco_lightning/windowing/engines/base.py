# SPDX-License-Identifier: Apache-2.0
"""What every engine promises: a network run on windows, seen from outside as the plain network.

Rows are positions of the network's sequence (B, T, D), prefix included; tokens are video tokens, prefix not included.
Row r predicts the token that stands at row r + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from reco_lightning.windowing.rows import WindowOutput
from reco_lightning.windowing.sampler import Window

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs a network on windows. Installed once per fit, armed once per step.

    While armed, the network's training forward computes the windows alone and returns logits (B, T, V) that hold NaN in
    all other rows, so that a wrong alignment cannot pass unseen; zeros, except in a proof, where parameters behind the
    head would get NaN gradients from them. Where the loss reads the head's output as it is, a training forward returns
    one NaN, expanded to (B, T, V) without memory, and leaves the windows' logits in ``output``, or, where
    the loss makes them, what they are made of. Unarmed, the network is exactly what it was.
    """

    name: str
    tokens: int
    placeholder: torch.Tensor | None

    def install(self) -> None:
        """Puts the engine into the network, reversibly."""

    def remove(self) -> None:
        """Leaves the network as it was before ``install``."""

    def arm(self, windows: Sequence[Window], *, attached: int = 0, inference: bool = False) -> None:
        """Makes the next forwards run these windows, one per group of the batch.

        Args:
            windows: The windows, in tokens.
            attached: Tokens in front of each window that are trained through, without a loss of their own.
            inference: Whether this is a proof: forwards under ``no_grad`` run them too.
        """

    def finish(self) -> WindowOutput | None:
        """Ends the windowed forward and returns its output.

        Later forwards are plain; blocks that the backward pass runs again (activation checkpointing) are windowed.
        """

    def disarm(self) -> None:
        """Back to the plain network; drops everything that was kept for the backward pass."""

    @property
    def output(self) -> WindowOutput | None:
        """What the last armed forward left behind, ``None`` before it."""
