# SPDX-License-Identifier: Apache-2.0
"""The mask with which the last rows of a sequence attend causally."""

from __future__ import annotations

import torch

__all__ = ["causal_mask"]


def causal_mask(rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """Returns the mask (rows, keys) with which the last ``rows`` of ``keys`` positions attend causally.

    The ``is_causal=True`` of ``scaled_dot_product_attention`` is aligned with the first key and is wrong here.

    Example:
        >>> causal_mask(2, 3, torch.device("cpu")).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
