# SPDX-License-Identifier: Apache-2.0
"""Loads weights that must match a network to the last key."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["load_exactly"]


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], *, claim: str, remedy: str) -> None:
    """Fills a module with a state dict that has to fit it exactly.

    Args:
        module: Of any device but meta.
        weights: One tensor for each key of its state dict; any floating dtype.
        claim: What the error says first: that the file must hold exactly these weights.
        remedy: What the error says last.

    Raises:
        ValueError: Keys are missing, unknown or of another shape; all are listed, and nothing was loaded.

    Example:
        >>> import torch
        >>> weights = {"weight": torch.ones(1, 2), "scale": torch.ones(1)}
        >>> load_exactly(nn.Linear(2, 1), weights, claim="a.pt must hold exactly a line", remedy="Download it again")
        Traceback (most recent call last):
            ...
        ValueError: a.pt must hold exactly a line. Missing: bias. Unknown: scale. Download it again
    """
    expected = module.state_dict()
    problems = {
        "Missing": sorted(expected.keys() - weights.keys()),
        "Unknown": sorted(weights.keys() - expected.keys()),
        "Of another shape": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        listed = " ".join(f"{title}: {', '.join(keys)}." for title, keys in problems.items() if keys)
        raise ValueError(f"{claim}. {listed} {remedy}")
    module.load_state_dict(dict(weights))
