# SPDX-License-Identifier: Apache-2.0
"""Figures of a study, as PNG files: losses against cost, losses by token position, and the curve of lambda."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reco_lightning.support.plots import COLOURS, position_cross_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from reco_lightning.experiments.study.plan import Line
    from reco_lightning.experiments.study.rows import Row

__all__ = ["cost_curves", "weight_curve", "write_figures"]

_TOGETHER = 6  # runs beside the first one in a figure by position: more cannot be told apart
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")


def cost_curves(curves: Mapping[str, npt.NDArray[np.float64]], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draws validation losses of any number of runs against what was spent on them; the legend stands beside them.

    Args:
        curves: Points (share of the plain run's operations, nats per token) of each run by its name, (n, 2).
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Example:
        >>> fig, ax = cost_curves({"plain": np.array([[0.5, 2.0], [1.0, 1.0]])})
        >>> ax.get_xlabel()
        "operations, share of the plain run's"
    """
    fig, ax = _axes(ax, width=9)
    for number, (name, points) in enumerate(curves.items()):
        dashes, colour = divmod(number, len(COLOURS))
        style: dict[str, Any] = {"color": COLOURS[colour], "linestyle": _DASHES[dashes % len(_DASHES)]}
        ax.plot(points[:, 0], points[:, 1], label=name, marker="os^D"[dashes % 4], markersize=4, **style)
    ax.set_xlabel("operations, share of the plain run's")
    ax.set_ylabel("validation cross-entropy (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return fig, ax


def weight_curve(
    weights: Sequence[float],
    values: Sequence[float],
    half_widths: Sequence[float | None],
    *,
    y_label: str,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a measure against the weight of the continuity loss, with confidence intervals.

    Args:
        weights: Lambda of each run, 0 or more.
        values: What was measured.
        half_widths: Halves of its intervals.
        y_label: Name and unit of the measure.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The figure and its axes.

    Example:
        >>> fig, ax = weight_curve([0, 0.1], [1.0, 2.0], [None, 0.5], y_label="loss")
        >>> ax.get_xlabel()
        'weight λ of the continuity loss'
    """
    fig, ax = _axes(ax, width=6)
    order = np.argsort(weights)
    places = np.arange(len(order))  # 0 has no place on a logarithmic axis
    errors = [half_widths[i] or 0.0 for i in order]
    ax.errorbar(places, [values[i] for i in order], yerr=errors, marker="o", capsize=4, color=COLOURS[0])
    ax.set_xticks(places, [f"{weights[i]:g}" for i in order])
    ax.set_xlabel("weight λ of the continuity loss")
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    return fig, ax


def write_figures(rows: Sequence[Row], folder: Path, *, title: Callable[[Line], str]) -> list[str]:
    """Draws what the finished runs allow.

    Args:
        rows: Lines with their runs.
        folder: Where to.
        title: Name of a line.

    Returns:
        Names of the files.
    """
    names = []
    kinds = list(dict.fromkeys(row.line.data for row in rows))
    for data in kinds:
        chosen = [row for row in rows if row.line.data == data and row.records]
        if not chosen:
            continue
        end = "" if len(kinds) == 1 else "-" + data.label.replace(", ", "-").replace(" ", "-")
        curves = {title(row.line): _mean([one["curve"] for one in row.records.values()])[:, 1:] for row in chosen}
        fig, _ = cost_curves(curves)
        names.append(_save(fig, folder / f"cost{end}.png"))
        first, others = chosen[:1], chosen[1:]
        for number, start in enumerate(range(0, max(1, len(others)), _TOGETHER), 1):
            shown = [*first, *others[start : start + _TOGETHER]]
            positions = {title(row.line): _mean([one["by_position"] for one in row.records.values()]) for row in shown}
            length = len(next(iter(positions.values())))
            fig, _ = position_cross_entropy(positions, length // data.blocks)
            names.append(_save(fig, folder / f"position{end}{'' if number == 1 else f'-{number}'}.png"))
    weighted = [row for row in rows if row.records and _is_weight_line(row)]
    if len({_weight(row) for row in weighted}) >= 3:
        for key, label in (
            (("cross_entropy",), "validation cross-entropy (nats per token)"),
            (None, "Fréchet distance"),
        ):
            found = [row.of(*(key or ("frechet", str(row.line.data.blocks)))) for row in weighted]
            kept = [(_weight(row), one) for row, one in zip(weighted, found, strict=True) if one is not None]
            fig, _ = weight_curve(
                [weight for weight, _ in kept],
                [one.mean for _, one in kept],
                [one.half_width for _, one in kept],
                y_label=label,
            )
            names.append(_save(fig, folder / f"lambda-{'cross-entropy' if key else 'frechet'}.png"))
    return names


def _axes(ax: Axes | None, *, width: float) -> tuple[Figure, Axes]:
    if ax is not None:
        return ax.figure, ax  # type: ignore[return-value]
    from matplotlib.figure import Figure as NewFigure

    fig = NewFigure(figsize=(width, 4), layout="constrained")
    return fig, fig.add_subplot()


def _is_weight_line(row: Row) -> bool:
    return row.line.name.startswith("λ = ")


def _weight(row: Row) -> float:
    assert row.line.method.options is not None
    return float(row.line.method.options["continuity_weight"])


def _mean(lists: Sequence[Any]) -> npt.NDArray[np.float64]:
    shortest = min(len(one) for one in lists)
    return np.mean([np.asarray(one[:shortest], dtype=float) for one in lists], axis=0)


def _save(fig: Figure, path: Path) -> str:
    fig.savefig(path, dpi=110)
    return path.name
