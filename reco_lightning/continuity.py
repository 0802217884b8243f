# SPDX-License-Identifier: Apache-2.0
"""Representation continuity: how far neighbouring states of a window lie apart (arXiv 2604.07402, Eq. 10).

Second stage of the pipeline ``windows -> continuity -> engines -> callback``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

__all__ = ["ContinuityNorm", "continuity_loss"]

ContinuityNorm = Literal["mean", "sum"]


def continuity_loss(hidden: torch.Tensor, *, norm: ContinuityNorm = "mean", lag: int = 1) -> torch.Tensor:
    r"""Mean squared distance of states that lie ``lag`` tokens apart (Eq. 10).

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
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have the shape (B, W, D), got {tuple(hidden.shape)}")
    if norm not in get_args(ContinuityNorm):
        raise ValueError(f"norm must be 'mean' or 'sum', got {norm!r}")
    if isinstance(lag, bool) or not isinstance(lag, int) or not 1 <= lag < hidden.shape[1]:
        raise ValueError(f"lag must be a whole number of tokens from 1 to W - 1 = {hidden.shape[1] - 1}, got {lag!r}")
    states = hidden if hidden.dtype == torch.float64 else hidden.float()
    squared = (states[:, lag:] - states[:, :-lag]).square()
    return squared.mean() if norm == "mean" else squared.sum(dim=-1).mean()
