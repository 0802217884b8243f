# SPDX-License-Identifier: Apache-2.0
"""Writes an evaluation as JSON, a Markdown table and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

__all__ = ["report_table", "write_report"]


def report_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the scores as a Markdown table, each with what it rests on.

    Args:
        records: By name what the metric's ``record`` returned.

    Example:
        >>> record = {"metric": "FrechetVideoDistance", "value": 12.5, "clips": {"real": 8, "generated": 8}}
        >>> print(report_table({"distance": record}).splitlines()[2])
        | distance | 12.5 | FrechetVideoDistance; clips: real 8, generated 8 |
    """
    lines = ["| score | value | rests on |", "| --- | --- | --- |"]
    for name, record in records.items():
        about = [str(record["metric"])]
        about += [f"{key}: {_text(value)}" for key, value in record.items() if key not in ("metric", "value")]
        lines.append(f"| {name} | {_value(record['value'])} | {'; '.join(about)} |")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        shown = {key: each for key, each in value.items() if key != "position"}  # hundreds of numbers: in the JSON
        return "; ".join(f"{key} {_value(each)}" for key, each in shown.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    return " ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def write_report(
    folder: Path, records: Mapping[str, Mapping[str, Any]], setting: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Writes ``evaluation.json``, ``evaluation.md`` and, where matplotlib is installed, the figures.

    Args:
        folder: Where to; made if missing.
        records: By name what the metric's ``record`` returned.
        setting: What all scores rest on.
        metrics: By the same names the metrics, computed; each has a ``plot``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"setting": setting, "scores": records}, indent=2))
    lines = [f"- {key}: {_text(value)}" for key, value in setting.items()]
    figures = _write_figures(folder, metrics)
    shown = [f"![{path.stem}]({path.name})" for path in figures]
    text = "\n".join(["# Evaluation", "", *lines, "", report_table(records), *shown])
    (folder / "evaluation.md").write_text(text + "\n")
    rank_zero_info(
        f"{report_table(records)}Wrote {folder / 'evaluation.md'}, evaluation.json and {len(figures)} figures"
    )


def _write_figures(folder: Path, metrics: Mapping[str, Any]) -> list[Path]:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return []
    written = []
    for name, metric in metrics.items():
        if name in ("distance", "position_loss_data"):  # a number; and a curve of the figure that follows
            continue
        if name == "position_loss_generated":
            both = {"data": metrics["position_loss_data"].compute(), "generated": metric.compute()}
            figure, _ = metric.plot(both)
        else:
            figure, _ = metric.plot()
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written
