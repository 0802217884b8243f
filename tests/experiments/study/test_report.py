# SPDX-License-Identifier: Apache-2.0
"""The report: intervals by hand and by scipy, pairs of equal seeds, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from reco_lightning.experiments.study.locks import write_json
from reco_lightning.experiments.study.plan import Plan, load_plan
from reco_lightning.experiments.study.report import write_report
from reco_lightning.experiments.study.rows import Row, estimate
from reco_lightning.experiments.study.settings import Settings

SETTINGS = Settings()


def record(loss: float, distance: float, cost: float = 1.0) -> dict[str, Any]:
    return {
        "steps": 10, "cost": cost, "cross_entropy": loss, "by_block": [loss] * 5, "by_position": [loss] * 80,
        "frechet": {"5": distance, "9": 2 * distance}, "frechet_floor": {"5": 0.25}, "step_processor_seconds": 0.5,
        "curve": [[5, cost / 2, loss + 1], [10, cost, loss]],
    }  # fmt: skip


def filled(plan: Plan, folder: Path, values: dict[tuple[int, int], dict[str, Any]]) -> Path:
    (folder / "runs").mkdir(exist_ok=True)
    for (line, seed), content in values.items():
        run = plan.lines[line].spec(steps=10, seed=seed, settings=SETTINGS)
        write_json(folder / "runs" / f"{run.key}.json", content)
    return write_report(plan, folder, seeds=3, steps=10, settings=SETTINGS)


def test_an_interval_is_students() -> None:
    values = [0.2, 0.5, 0.4, 0.9]
    found = estimate(values)
    assert found is not None
    low, high = stats.t.interval(0.95, 3, loc=0.5, scale=stats.sem(values))
    assert found.mean == pytest.approx(0.5)
    assert found.half_width == pytest.approx((high - low) / 2)
    by_hand = estimate([1.0, 3.0])
    assert by_hand is not None
    assert by_hand.half_width == pytest.approx(12.706, abs=1e-3)  # t of one degree of freedom, deviation sqrt 2
    single = estimate([4.0])
    assert single is not None
    assert (single.mean, single.half_width, single.text(1)) == (4.0, None, "4.0")
    assert estimate([]) is None


def test_differences_are_of_equal_seeds_alone() -> None:
    lines = load_plan("lambda").lines
    plain = Row(lines[0], {0: record(1.0, 4), 1: record(2.0, 4), 2: record(9.0, 4)})
    other = Row(lines[1], {0: record(1.5, 4), 1: record(2.7, 4), 3: record(0.0, 4)})
    found = other.against(plain, "cross_entropy")
    assert found is not None
    assert (found.n, found.mean) == (2, pytest.approx(0.6))
    assert other.of("frechet", "17") is None


@pytest.mark.slow
def test_the_report_says_what_is_there_and_names_what_is_missing(tmp_path: Path) -> None:
    plan = load_plan("lambda")
    values = {(0, seed): record(1.0 + seed / 10, 4.0) for seed in range(3)}
    values |= {(line, seed): record(2.0 + seed / 10, 5.0, 0.5) for line in (1, 2, 3) for seed in range(3)}
    values[4, 1] = record(3.0, 6.0, 0.5)
    path = filled(plan, tmp_path, values)
    text = path.read_text()
    assert "| plain | 10 | 1.000 | 1.100 ± 0.248 |  | 4.00 ± 0.00 |  | 0.500 |" in text
    assert "| λ = 0.01 | 10 | 0.500 | 2.100 ± 0.248 | +1.000 ± 0.000 | 5.00 ± 0.00 | +1.00 ± 0.00 | 0.500 |" in text
    assert "| λ = 0.1 | 10 | 0.500 | 3.000 | +1.900 | 6.00 | +2.00 | 0.500 |" in text
    assert "| λ = 1 |" not in text
    assert "Missing, and in no number above: 8 runs." in text
    assert "- λ = 0.1, seed 0\n- λ = 0.1, seed 2\n- λ = 0.5, seed 0" in text
    assert "- digits, 5 blocks: 0.25" in text
    numbers = json.loads((path.parent / "report.json").read_text())
    assert numbers["rows"][1]["against_plain"]["cross_entropy"]["mean"] == pytest.approx(1.0)
    assert len(numbers["missing"]) == 8
    drawn = sorted(file.name for file in path.parent.glob("*.png"))
    assert drawn == ["cost.png", "lambda-cross-entropy.png", "lambda-frechet.png", "position.png"]
    assert all(f"![{name}]({name})" in text for name in drawn)


@pytest.mark.slow
def test_every_data_set_has_its_own_plain_training_and_figures(tmp_path: Path) -> None:
    plan = load_plan("map")
    values = {(0, 0): record(1.0, 4.0), (3, 0): record(2.0, 5.0), (4, 0): record(2.25, 5.0)}
    path = filled(plan, tmp_path, values)
    assert "| local-opt-balanced, equal cost (digits, fast) | 10 | 1.000 | 2.250 | +0.250 |" in path.read_text()
    assert sorted(file.name for file in path.parent.glob("cost*.png")) == ["cost-digits-fast.png", "cost-digits.png"]


@pytest.mark.slow
def test_lengths_have_columns_of_their_own(tmp_path: Path) -> None:
    plan = load_plan("rollout", "clips")
    path = filled(plan, tmp_path, {(0, 0): record(1.0, 4.0)})
    assert "| at 9 blocks | s / step |" in path.read_text()
    assert "| plain | 10 | 1.000 | 1.000 |  | 4.00 |  | 8.00 | 0.500 |" in path.read_text()


def test_a_report_without_any_run_is_a_list_of_what_is_missing(tmp_path: Path) -> None:
    path = filled(load_plan("overlap"), tmp_path, {})
    assert "Missing, and in no number above: 12 runs." in path.read_text()
    assert "real training clips" not in path.read_text()
    assert list(path.parent.glob("*.png")) == []
