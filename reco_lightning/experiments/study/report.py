# SPDX-License-Identifier: Apache-2.0
"""The report of a study: one table with confidence intervals, its numbers as JSON, and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reco_lightning.experiments.study.figures import write_figures
from reco_lightning.experiments.study.locks import write_json
from reco_lightning.experiments.study.plan import Line, Plan
from reco_lightning.experiments.study.rows import Estimate, Row
from reco_lightning.experiments.study.settings import Settings

__all__ = ["write_report"]


def write_report(plan: Plan, folder: Path, *, seeds: int, steps: int, settings: Settings) -> Path:
    """Writes `report.md`, `report.json` and figures of the finished runs of a plan.

    Args:
        plan: The plan.
        folder: The study's folder.
        seeds: Seeds that are wanted.
        steps: Steps of the plain run.
        settings: Sizes.

    Returns:
        The report.
    """
    rows, missing = [], []
    for line in plan.lines:
        records = {}
        for seed in range(seeds):
            spec = line.spec(steps=steps, seed=seed, settings=settings)
            path = folder / "runs" / f"{spec.key}.json"
            if path.is_file():
                records[seed] = json.loads(path.read_text(encoding="utf-8"))
            else:
                missing.append(f"{_title(line, plan)}, seed {seed}")
        rows.append(Row(line, records))
    place = folder / f"report-{plan.name}-{plan.lines[0].data.name}"
    place.mkdir(exist_ok=True)
    figures = write_figures(rows, place, title=lambda line: _title(line, plan))
    text = _markdown(plan, rows, missing, figures, seeds=seeds, steps=steps)
    (place / "report.md").write_text(text, encoding="utf-8")
    write_json(place / "report.json", _numbers(plan, rows, missing, seeds=seeds, steps=steps))
    return place / "report.md"


def _markdown(
    plan: Plan, rows: Sequence[Row], missing: Sequence[str], figures: Sequence[str], *, seeds: int, steps: int
) -> str:
    lengths = sorted({length for row in rows for length in row.line.lengths})
    heads = ["run", "steps", "cost", "cross-entropy", "against plain", "Fréchet distance", "against plain"]
    heads += [f"at {length} blocks" for length in lengths] + ["s / step"]
    lines = [
        f"# {plan.name}",
        "",
        f"{plan.about} {seeds} seeds, {steps} steps of the plain run. ± is half of the 95 % confidence interval "
        "(Student's t over the seeds). Cost: operations as a share of the plain run's. Cross-entropy: nats per token, "
        "on held-out clips. Fréchet distance: of generated to real clips; lower is better. Differences are to "
        "plain training in full on the same data, seed by seed.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for row in rows:
        if row.records:
            lines.append("| " + " | ".join(_cells(row, _plain_row(row, rows), plan, lengths)) + " |")
    floors = {
        (row.line.data.label, length): value
        for row in rows
        for record in list(row.records.values())[:1]
        for length, value in record["frechet_floor"].items()
    }
    if floors:
        lines += ["", "Fréchet distance of real training clips to the held-out ones:", ""]
        lines += [f"- {label}, {length} blocks: {value:.2f}" for (label, length), value in floors.items()]
    if missing:
        lines += ["", f"Missing, and in no number above: {len(missing)} runs.", "", *(f"- {name}" for name in missing)]
    lines += ["", *(f"![{name}]({name})" for name in figures)]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: Row, plain: Row | None, plan: Plan, lengths: Sequence[int]) -> list[str]:
    blocks = str(row.line.data.blocks)

    def show(found: Estimate | None, digits: int, *, sign: bool = False) -> str:
        return "" if found is None else found.text(digits, sign=sign)

    def against(*names: str, digits: int) -> str:
        return "" if plain is None or plain is row else show(row.against(plain, *names), digits, sign=True)

    steps, cost, seconds = row.of("steps"), row.of("cost"), row.of("step_processor_seconds")
    assert steps is not None
    assert cost is not None  # every record has them
    assert seconds is not None
    return [
        _title(row.line, plan),
        f"{steps.mean:.0f}",
        f"{cost.mean:.3f}",
        show(row.of("cross_entropy"), 3),
        against("cross_entropy", digits=3),
        show(row.of("frechet", blocks), 2),
        against("frechet", blocks, digits=2),
        *(show(row.of("frechet", str(length)), 2) for length in lengths),
        f"{seconds.mean:.3f}",
    ]


def _numbers(plan: Plan, rows: Sequence[Row], missing: Sequence[str], *, seeds: int, steps: int) -> dict[str, Any]:
    def plainly(found: Estimate | None) -> dict[str, Any] | None:
        return None if found is None else {"mean": found.mean, "half_width": found.half_width, "n": found.n}

    found = []
    for row in rows:
        plain = _plain_row(row, rows)
        blocks = row.line.data.blocks
        entry: dict[str, Any] = {
            "name": row.line.name,
            "data": row.line.data.label,
            "seeds": sorted(row.records),
            **{name: plainly(row.of(name)) for name in ("steps", "cost", "cross_entropy", "step_processor_seconds")},
            "by_block": [plainly(row.of("by_block", str(block))) for block in range(blocks)],
            "frechet": {str(n): plainly(row.of("frechet", str(n))) for n in (blocks, *row.line.lengths)},
        }
        if plain is not None and plain is not row:
            entry["against_plain"] = {
                "cross_entropy": plainly(row.against(plain, "cross_entropy")),
                "frechet": {
                    str(n): plainly(row.against(plain, "frechet", str(n))) for n in (blocks, *row.line.lengths)
                },
            }
        found.append(entry)
    return {
        "plan": plan.name,
        "about": plan.about,
        "seeds": seeds,
        "steps": steps,
        "rows": found,
        "missing": list(missing),
    }


def _plain_row(row: Row, rows: Sequence[Row]) -> Row | None:
    """Plain training in full on the same data."""
    return next((other for other in rows if other.line.plain and other.line.data == row.line.data), None)


def _title(line: Line, plan: Plan) -> str:
    if len({one.data for one in plan.lines}) == 1:
        return line.name
    return f"{line.name} ({line.data.label})"
