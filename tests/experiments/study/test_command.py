# SPDX-License-Identifier: Apache-2.0
"""The whole command on a plan in miniature: it runs, resumes, shares a folder, and loses nothing that was killed."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from reco_lightning.experiments.study import command
from reco_lightning.experiments.study.command import do_runs, run_plan, study
from reco_lightning.experiments.study.locks import lock
from reco_lightning.experiments.study.plan import Plan, load_plan
from reco_lightning.experiments.study.settings import Settings

TINY = Settings(dim=16, depth=1, heads=2, validations=1, held_out_clips=8, compared_clips=16, features=4)
RUNS = """
about: "A plan in miniature."
data: {blocks: 3}
runs:
  - {method: baseline, batch_size: 32}
  - {method: reco, batch_size: 4, cost: 0.25}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "own.yaml"
    path.write_text(RUNS)
    return load_plan(str(path))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.distributed
def test_a_study_runs_from_end_to_end_in_two_processes_and_once_only(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    report = run_plan(plan, seeds=1, output=str(output), steps=2, workers=2, settings=TINY)
    found = names(output / "runs")
    assert len(found) == 2
    assert all(name.endswith(".json") for name in found)
    text = report.read_text()
    assert "Missing" not in text
    assert text.count("\n| ") == 3  # the head and two lines
    assert (report.parent / "cost.png").stat().st_size > 1000
    records = [json.loads((output / "runs" / name).read_text()) for name in found]
    assert sorted(one["spec"]["batch_size"] for one in records) == [4, 32]
    assert all(0 < one["cost"] <= 1 for one in records)
    assert "Look at" in capsys.readouterr().out

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(command, "run", never)
    assert run_plan(plan, seeds=1, output=str(output), steps=2, settings=TINY).read_text() == text


def test_a_run_that_is_killed_leaves_nothing_half_and_is_done_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    specs = [line.spec(steps=1, seed=0, settings=TINY) for line in plan.lines]
    done: list[str] = []

    def stop_at_the_second(spec: Any, *, folder: Path) -> dict[str, Any]:
        if done:
            raise KeyboardInterrupt
        done.append(spec.key)
        return {"cross_entropy": 1.0, "frechet": {"3": 1.0}, "seconds": 1.0}

    monkeypatch.setattr(command, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        do_runs(specs, tmp_path)
    assert names(tmp_path / "runs") == [f"{done[0]}.json"]
    asked: list[str] = []

    def note(spec: Any, *, folder: Path) -> dict[str, Any]:
        asked.append(spec.key)
        return {"cross_entropy": 1.0, "frechet": {"3": 1.0}, "seconds": 1.0}

    monkeypatch.setattr(command, "run", note)
    do_runs([*specs, specs[1]], tmp_path)
    assert asked == [specs[1].key]


def test_a_run_that_another_process_holds_is_left_to_it(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    spec = plan.lines[0].spec(steps=1, seed=0, settings=TINY)
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("it was run"))
    with lock(tmp_path / "runs" / f"{spec.key}.lock") as held:
        assert held
        do_runs([spec], tmp_path)
    assert names(tmp_path / "runs") == []


def test_a_report_alone_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("it was run"))
    study(plan="lambda", output=str(tmp_path), report=True)
    assert "Missing, and in no number above: 21 runs." in (tmp_path / "report-lambda-digits" / "report.md").read_text()


def test_a_worker_that_fails_is_an_error(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        exitcode = 1

        def __init__(self, **kwargs: Any) -> None:
            pass

        def start(self) -> None:
            pass

        def join(self) -> None:
            pass

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Failed)
    with pytest.raises(RuntimeError, match="2 of 2 workers ended with an error, which stands above"):
        run_plan(plan, seeds=1, output=str(tmp_path), steps=1, workers=2, settings=TINY)


@pytest.mark.parametrize("package", ["matplotlib", "scipy", "sklearn"])
def test_a_missing_package_is_named_before_anything_is_done(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ModuleNotFoundError, match=rf'a study needs {package}: pip install "reco_lightning\[study\]"'):
        study(output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["seeds", "workers", "steps"])
def test_numbers_below_one_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got 0"):
        study(**{name: 0})
