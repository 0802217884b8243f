# SPDX-License-Identifier: Apache-2.0
"""Draws figures of trainings and metrics as ``(fig, ax)`` (extra `demo` or `metrics`)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from reco_lightning.support.argument_checks import (
    check_int,
    check_int_sequence,
    check_path,
    check_str,
    check_strs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "frame_scores",
    "group_bars",
    "interval_curves",
    "log_figure",
    "loss_curves",
    "position_cross_entropy",
]

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
    """Draws losses of several runs against steps, operations or time.

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
    check_str(x_label=x_label, y_label=y_label)
    lengths = _lengths("curves", curves, width=(2,))
    if not lengths or not all(lengths.values()):
        raise ValueError(f"curves must hold runs of one point or more each, got numbers of points {lengths}")
    fig, ax = _axes(ax)
    for (name, points), style in zip(curves.items(), _styles(markers=True), strict=False):
        x, y = zip(*points, strict=True)
        ax.plot(x, y, label=name, **style)
    return _finish(fig, ax, x_label, y_label)


def position_cross_entropy(
    values: Mapping[str, Sequence[float] | npt.NDArray[np.floating]],
    tokens_per_block: int,
    *,
    y_label: str = "validation cross-entropy (nats)",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws the cross-entropy by position, with the borders of the frame blocks and the mean of each block.

    Args:
        values: Mean cross-entropy of each token position in nats, (N,), by the name of the run; NaN where a position is
            not predicted.
        tokens_per_block: Tokens of a frame block; divides N.
        y_label: Name and unit of the loss.
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
    check_int(tokens_per_block=tokens_per_block)
    check_str(y_label=y_label)
    lengths = _lengths("values", values)
    if not lengths or tokens_per_block < 1 or any(n == 0 or n % tokens_per_block for n in lengths.values()):
        raise ValueError(
            f"values must hold whole frame blocks of tokens_per_block={tokens_per_block} tokens for each run, got "
            f"lengths {lengths}"
        )
    fig, ax = _axes(ax)
    for (name, line), style in zip(values.items(), _styles(markers=False), strict=False):
        array = np.asarray(line, dtype=float)
        cells = np.ma.masked_invalid(array.reshape(-1, tokens_per_block))
        blocks = cells.mean(1).filled(np.nan)  # (K,)
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
    return _finish(fig, ax, x_label, y_label)


def interval_curves(
    intervals: Sequence[int],
    curves: Mapping[str, Sequence[float] | npt.NDArray[np.floating]],
    *,
    y_label: str,
    real: str = "real data",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a measure between two frames against their distance, of generated videos and of the real data.

    Args:
        intervals: Distances in frames, (K,), rising.
        curves: The measure at each distance, (K,), by the name that the legend shows; one of them is ``real``.
        y_label: Name and unit of the measure.
        real: Name of the real data's curve, which is drawn in black.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: The real data's curve is missing, or a curve has another length than ``intervals``.

    Example:
        >>> fig, ax = interval_curves([1, 4], {"real data": [30.0, 25.0], "ReCo": [31.0, 27.0]}, y_label="PSNR (dB)")
        >>> ax.get_xlabel()
        'distance from source to target frame (frames)'
    """
    check_int_sequence(intervals=intervals)
    check_str(y_label=y_label, real=real)
    lengths = _lengths("curves", curves)
    if real not in curves or set(lengths.values()) != {len(intervals)}:
        raise ValueError(
            f"curves must hold {real!r} and have one value for each of {len(intervals)} intervals, got lengths "
            f"{lengths}; without the real data's curve none can be read: a frozen video has the best PSNR and no flow"
        )
    fig, ax = _axes(ax)
    ax.plot(intervals, curves[real], label=real, color="black", linewidth=2.0, marker="x", markersize=6)
    others = {name: line for name, line in curves.items() if name != real}
    for (name, line), style in zip(others.items(), _styles(markers=True), strict=False):
        ax.plot(intervals, line, label=name, **style)
    ax.set_xticks(list(intervals))
    return _finish(fig, ax, "distance from source to target frame (frames)", y_label)


def group_bars(
    values: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a measure by group of videos, the runs side by side.

    Args:
        values: The measure of each group, (G,), by the name of the run; NaN draws no bar.
        groups: Names of the G groups, which stand under them.
        x_label: What the groups are, with its unit.
        y_label: Name and unit of the measure.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: There is no run, or one with another number of values than groups.

    Example:
        >>> fig, ax = group_bars({"ReCo": [2.0, 3.0]}, ["low", "high"], x_label="motion", y_label="distance")
        >>> [float(bar.get_height()) for bar in ax.patches]
        [2.0, 3.0]
    """
    check_strs(groups=groups)
    check_str(x_label=x_label, y_label=y_label)
    lengths = _lengths("values", values)
    if set(lengths.values()) != {len(groups)}:
        raise ValueError(f"values must hold {len(groups)} values, one a group, for each run, got lengths {lengths}")
    fig, ax = _axes(ax)
    width = 0.8 / len(values)
    for number, (name, line) in enumerate(values.items()):
        places = np.arange(len(groups)) + (number - (len(values) - 1) / 2) * width
        hatch = ("", "//", "..", "xx")[number % 4]
        ax.bar(places, line, width, label=name, color=COLOURS[number % len(COLOURS)], hatch=hatch, edgecolor="white")
    ax.set_xticks(range(len(groups)), list(groups))
    return _finish(fig, ax, x_label, y_label)


def frame_scores(
    scores: Mapping[str, Sequence[float] | npt.NDArray[np.floating]],
    *,
    y_label: str,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a score of single frames against their place in the video.

    Args:
        scores: The score of each scored frame, first to last, (F,), by the name of the run.
        y_label: Name and unit of the score.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: There is no run, or one without frames.

    Example:
        >>> fig, ax = frame_scores({"ReCo": [0.30, 0.28]}, y_label="CLIP score (cosine)")
        >>> ax.get_xlabel()
        'scored frame, from the first of the clip to the last'
    """
    check_str(y_label=y_label)
    lengths = _lengths("scores", scores)
    if not lengths or not all(lengths.values()):
        raise ValueError(f"scores must hold runs of one frame or more each, got numbers of frames {lengths}")
    fig, ax = _axes(ax)
    from matplotlib.ticker import MaxNLocator

    for (name, line), style in zip(scores.items(), _styles(markers=True), strict=False):
        ax.plot(range(len(line)), line, label=name, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(fig, ax, "scored frame, from the first of the clip to the last", y_label)


@rank_zero_only
def log_figure(trainer: pl.Trainer, key: str, fig: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG and shows it in every logger of a trainer that can show pictures.

    W&B and TensorBoard get the picture; for all others the file is the record. Does nothing outside rank 0.

    Args:
        trainer: Its loggers, and its step.
        key: Name under which the figure appears, for example ``val/position_loss``.
        fig: The figure.
        path: Where to; missing folders are made.

    Example:
        >>> import tempfile
        >>> fig, ax = loss_curves({"plain": [(0, 5.5), (100, 4.2)]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = pl.Trainer(logger=False, accelerator="cpu", default_root_dir=folder)
        ...     log_figure(trainer, "loss", fig, Path(folder, "loss.png"))
        ...     [file.name for file in Path(folder).iterdir()]
        ['loss.png']
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_str(key=key)
    check_path(path=path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(fig)
    canvas.print_png(path)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [os.fspath(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # (H, W, 3)
            logger.experiment.add_image(key, pixels, trainer.global_step, dataformats="HWC")


def _lengths(argument: str, lines: Any, *, width: tuple[int, ...] = ()) -> dict[str, int]:
    """Lengths by name; refuses what is no mapping of names to rows of numbers, or of points."""
    wrong = ValueError(
        f"{argument} must be a mapping of names to rows of {'points (x, y)' if width else 'numbers'}, got {lines!r}"
    )
    if not isinstance(lines, Mapping):
        raise wrong
    try:
        rows = {name: np.asarray(line, dtype=float) for name, line in lines.items()}
    except (TypeError, ValueError):
        raise wrong from None
    if any(row.ndim == 0 or (row.size and row.shape[1:] != width) for row in rows.values()):
        raise wrong
    return {name: len(row) for name, row in rows.items()}


def _axes(ax: Axes | None) -> tuple[Figure, Axes]:
    if ax is not None and not hasattr(ax, "get_figure"):
        raise ValueError(f"ax must be matplotlib's Axes, or None for a new figure, got {ax!r}")
    if ax is not None:
        return ax.figure.figure, ax
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
