# SPDX-License-Identifier: Apache-2.0
"""The representation-continuity loss between neighbouring states of a window (arXiv 2604.07402, Eq. 10).

Second stage of the pipeline ``sampler -> losses -> engines -> injection -> callback``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from reco_lightning.support.argument_checks import (
    check_choice,
    check_finite,
    check_flag,
    check_int,
    check_tensor,
)

__all__ = ["Continuity", "ContinuityNorm", "ContinuitySchedule", "continuity_loss", "gradient_norm"]

ContinuityNorm = Literal["mean", "sum"]
ContinuitySchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Continuity:
    """The continuity term of a training: what it compares, and its weight.

    Args:
        weight: Lambda of Eq. 11, 0 or more; 0 leaves the term out.
        norm: ``"mean"`` or ``"sum"`` over the hidden width, see ``continuity_loss``.
        lag: Distance in tokens of the states that are compared, 1 or more.
        schedule: ``"constant"`` (the paper); ``"linear"`` and ``"cosine"`` let the weight fall to 0 until the end.
        balanced: Whether ``weight`` is the ratio of the gradients' norms, the term's over the cross-entropy's, at the
            states, in the place of a factor.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> Continuity(0.1, schedule="linear").at(0.75)
        0.025
    """

    weight: float = 0.1
    norm: ContinuityNorm = "mean"
    lag: int = 1
    schedule: ContinuitySchedule = "constant"
    balanced: bool = False

    def __post_init__(self) -> None:
        check_finite(at_least=0, continuity_weight=self.weight)
        check_flag(continuity_balanced=self.balanced)
        check_choice(get_args(ContinuityNorm), continuity_norm=self.norm)
        check_choice(get_args(ContinuitySchedule), continuity_schedule=self.schedule)
        check_int(at_least=1, continuity_lag=self.lag)

    def at(self, progress: float) -> float:
        """Returns the weight when a share of the training is done.

        Args:
            progress: Steps done over all steps, 0 to 1.
        """
        if self.schedule == "linear":
            return self.weight * (1 - progress)
        if self.schedule == "cosine":
            return self.weight * (1 + math.cos(math.pi * progress)) / 2
        return self.weight


def gradient_norm(value: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the norm of a scalar's gradient with respect to states; the graph is kept.

    Args:
        value: The scalar.
        states: What it was computed from, each (B, W, D).

    Returns:
        A scalar without graph.

    Example:
        >>> states = torch.ones(1, 2, 2, requires_grad=True)
        >>> gradient_norm(3 * states.sum(), [states]).item()
        6.0
    """
    gradients = torch.autograd.grad(value, list(states), retain_graph=True)
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm()


def continuity_loss(hidden: torch.Tensor, *, norm: ContinuityNorm = "mean", lag: int = 1) -> torch.Tensor:
    r"""Returns the mean squared distance of states that lie ``lag`` tokens apart (Eq. 10).

    .. math:: \frac{1}{W - \text{lag}} \sum_i \lVert h_{i+\text{lag}} - h_i \rVert_2^2

    averaged over the batch. Computed in float32 or wider whatever the states' type.

    Args:
        hidden: States that the output head reads, (B, W, D).
        norm: ``"sum"`` is the squared norm of Eq. 10 to the letter; ``"mean"`` divides it by the width D, so that the
            weight of the term does not grow with the network.
        lag: Distance in tokens, 1 to W - 1; 1 is the paper, ``tokens_per_block`` compares the same place one block
            later.

    Returns:
        A scalar of 0 or more.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> states = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 3.0]]])
        >>> continuity_loss(states, norm="sum").item(), continuity_loss(states).item()
        (3.0, 1.5)
    """
    check_tensor(hidden=hidden)
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have the shape (B, W, D), got {tuple(hidden.shape)}")
    check_choice(get_args(ContinuityNorm), norm=norm)
    check_int(at_least=1, lag=lag)
    if lag >= hidden.shape[1]:
        raise ValueError(f"lag must be a whole number of tokens from 1 to W - 1 = {hidden.shape[1] - 1}, got {lag!r}")
    states = hidden if hidden.dtype == torch.float64 else hidden.float()
    squared = (states[:, lag:] - states[:, :-lag]).square()
    return squared.mean() if norm == "mean" else squared.sum(dim=-1).mean()
