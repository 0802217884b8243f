# SPDX-License-Identifier: Apache-2.0
"""Position encodings of OmniTokenizer: rotary, relative and ALiBi (Wang et al., arXiv 2406.09399)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["alibi", "relative_index", "rope_angles", "rotate"]


def rope_angles(height: int, width: int, dim_head: int, device: torch.device | None = None) -> Tensor:
    """Returns the angles of the rotary positions of a grid, column and row in alternation.

    Args:
        height: h, rows.
        width: w, columns.
        dim_head: Channels per head, a multiple of 4.
        device: Of the result.

    Returns:
        float32 (h * w, dim_head / 2), radians: of each token, number 2m is its column * f_m and number 2m + 1 its row
        * f_m, with f_m = 10000 ** (-4 m / dim_head).

    Example:
        >>> rope_angles(2, 2, 4).tolist()
        [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    places = torch.arange(height * width, device=device)
    cells = torch.stack([places % width, places // width], dim=-1).float()  # (N, 2)
    frequencies = 10000.0 ** (-torch.arange(0, dim_head, 4, device=device).float() / dim_head)
    return (frequencies[:, None] * cells[:, None, :]).flatten(1)  # (N, dh / 4, 2) to (N, dh / 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring pairs of channels, each as a complex number, in float32.

    Args:
        x: (..., N, C).
        angles: (N, C / 2), radians.

    Returns:
        The shape and dtype of `x`.

    Example:
        >>> import math, torch
        >>> rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([[math.pi / 2]])).round().tolist()
        [[-0.0, 1.0]]
    """
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def relative_index(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Returns which of the (2 h - 1) * (2 w - 1) offsets lies between each two tokens of a grid.

    Args:
        height: h, rows.
        width: w, columns.
        device: Of the result.

    Returns:
        int64 (h * w, h * w): (row_i - row_j + h - 1) * (2 w - 1) + (column_i - column_j + w - 1) at [i, j].

    Example:
        >>> relative_index(1, 2).tolist()
        [[1, 0], [2, 1]]
    """
    places = torch.arange(height * width, device=device)
    rows, columns = places // width, places % width
    down = rows[:, None] - rows[None] + height - 1
    right = columns[:, None] - columns[None] + width - 1
    return down * (2 * width - 1) + right


def alibi(heads: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """Returns the penalty on distance (Press et al., arXiv 2108.12409), to be added to attention scores.

    Args:
        heads: H, a power of two.
        tokens: N.
        device: Of the result.

    Returns:
        float32 (H, N, N): -abs(i - j) * s_h, with s_h = 2 ** -(h + 1) for 8 heads.

    Example:
        >>> alibi(8, 2)[:2].tolist()
        [[[0.0, -0.5], [-0.5, 0.0]], [[0.0, -0.25], [-0.25, 0.0]]]
    """
    start = 2.0 ** -(2.0 ** (3 - math.log2(heads)))
    slopes = start ** torch.arange(1, heads + 1, device=device).float()
    places = torch.arange(tokens, device=device)
    return -(places[:, None] - places[None]).abs() * slopes[:, None, None]
