# SPDX-License-Identifier: Apache-2.0
"""Figures of trainings, each function returning ``(fig, ax)``; needs matplotlib (extra `demo` or `metrics`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "loss_curves", "position_cross_entropy"]

#: Okabe and Ito's colours, which the colour-blind can tell apart, from the clearest pair on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", "--", (0, (1, 1)), "-.")
_MARKERS = "osD^v"


def loss_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str = "training step",
    y_label: str = "validation cross-entropy (nats per token)",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Losses of several runs against steps, operations or time.

    Args:
        curves: Points (x, loss) of each run, by the name that the legend shows.
        x_label: Name and unit of x.
        y_label: Name and unit of the loss.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: There is no curve, or one without points.

    Example:
        >>> fig, ax = loss_curves({"plain": [(0, 5.5), (100, 4.2)]})
        >>> ax.get_ylabel()
        'validation cross-entropy (nats per token)'
    """
    if not curves or not all(curves.values()):
        found = {name: len(points) for name, points in curves.items()}
        raise ValueError(f"curves must hold runs of one point or more each, got numbers of points {found}")
    fig, ax = _axes(ax)
    for (name, points), style in zip(curves.items(), _styles(markers=True), strict=False):
        x, y = zip(*points, strict=True)
        ax.plot(x, y, label=name, **style)
    return _finish(fig, ax, x_label, y_label)


def position_cross_entropy(
    values: Mapping[str, Sequence[float] | npt.NDArray[np.floating]],
    tokens_per_block: int,
    *,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Cross-entropy by place in the sequence, with the borders of the frame blocks and the mean of each block.

    Args:
        values: Mean cross-entropy of each token position in nats, (N,), by the name of the run.
        tokens_per_block: Tokens of a frame block; divides N.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: There is no run, or a length is no multiple of ``tokens_per_block``.

    Example:
        >>> fig, ax = position_cross_entropy({"plain": [5.0, 4.0, 3.0, 3.0]}, 2)
        >>> ax.get_xlabel()
        'token position in the sequence (borders: frame blocks of 2 tokens)'
    """
    lengths = {name: len(line) for name, line in values.items()}
    if not lengths or tokens_per_block < 1 or any(n == 0 or n % tokens_per_block for n in lengths.values()):
        raise ValueError(
            f"values must hold whole frame blocks of tokens_per_block={tokens_per_block} tokens for each run, got "
            f"lengths {lengths}"
        )
    fig, ax = _axes(ax)
    for (name, line), style in zip(values.items(), _styles(markers=False), strict=False):
        array = np.asarray(line, dtype=float)
        blocks = array.reshape(-1, tokens_per_block).mean(1)  # (K,)
        ax.plot(np.arange(len(array)), array, color=style["color"], linewidth=0.7, alpha=0.4)
        edges = np.arange(len(blocks) + 1) * tokens_per_block
        for block, (low, high) in enumerate(itertools.pairwise(edges)):
            ax.plot([low, high], [blocks[block]] * 2, label=f"{name} (mean of block)" if block == 0 else None, **style)
    longest = max(lengths.values())
    for border in range(0, longest + 1, tokens_per_block):
        ax.axvline(border, color="0.6", linewidth=0.8, zorder=0)
    for block in range(longest // tokens_per_block):
        middle = (block + 0.5) * tokens_per_block
        ax.annotate(
            f"block {block}", (middle, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", fontsize=9, color="0.3",
        )  # fmt: skip
    ax.set_xlim(0, longest)
    x_label = f"token position in the sequence (borders: frame blocks of {tokens_per_block} tokens)"
    return _finish(fig, ax, x_label, "validation cross-entropy (nats)")


def _axes(ax: Axes | None) -> tuple[Figure, Axes]:
    if ax is not None:
        return ax.get_figure(root=True), ax  # type: ignore[return-value]
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Figures need matplotlib: pip install "reco_lightning[demo]"') from error
    fig = Figure(figsize=(7.0, 3.8), layout="constrained")  # no pyplot: no window, no global state
    return fig, fig.subplots()


def _styles(*, markers: bool) -> itertools.cycle[dict[str, Any]]:
    count = len(COLOURS)
    return itertools.cycle(
        {
            "color": COLOURS[i],
            "linestyle": _DASHES[i % len(_DASHES)],
            "linewidth": 2.0,
            **({"marker": _MARKERS[i % len(_MARKERS)], "markersize": 5} if markers else {}),
        }
        for i in range(count)
    )


def _finish(fig: Figure, ax: Axes, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False)
    return fig, ax
