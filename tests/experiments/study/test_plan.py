# SPDX-License-Identifier: Apache-2.0
"""Plans: every packaged one is sound, and what no run takes is named before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from reco_lightning.experiments.study.data_spec import DataSpec
from reco_lightning.experiments.study.plan import load_plan, plan_names
from reco_lightning.experiments.study.settings import Settings

SETTINGS = Settings()


def written(tmp_path: Path, *runs: object, **rest: object) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"runs": list(runs), **rest}))
    return str(path)


def key(plan: str, number: int, seed: int = 0, steps: int = 10) -> str:
    return load_plan(plan).lines[number].spec(steps=steps, seed=seed, settings=SETTINGS).key


@pytest.mark.parametrize("name", plan_names())
def test_every_packaged_plan_compares_with_plain_training(name: str) -> None:
    plan = load_plan(name)
    assert plan.about.endswith(".")
    kinds = {line.data for line in plan.lines}
    assert all(any(line.plain for line in plan.lines if line.data == data) for data in kinds)


def test_the_packaged_plans_are_those_of_the_page() -> None:
    assert plan_names() == [
        "clips", "controls", "gap", "goal", "lambda", "map", "mixed", "overlap", "rollout", "tables123",
    ]  # fmt: skip


def test_a_line_says_all_that_decides_a_run(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "method": "reco",
            "set": {"windows_per_batch": 4, "context": "keys", "stride_blocks": 0.5},
            "name": "mixed",
            "batch_size": 8,
            "cost": 0.5,
            "data": {"motion": "fast"},
            "lengths": [9],
        },
        {"method": "baseline", "steps": 0.5},
        {"method": "reco", "cost": 1},
        data={"clips": 7, "blocks": 3},
        about="Own.",
    )
    plan = load_plan(path)
    assert plan.name == "own"
    mixed, half, equal = plan.lines
    assert (mixed.name, mixed.batch_size, mixed.budget, mixed.share, mixed.lengths) == ("mixed", 8, "cost", 0.5, (9,))
    assert mixed.data == DataSpec("digits", motion="fast", clips=7, blocks=3)
    callback = mixed.method.callback(3, 16)
    assert callback is not None
    assert (
        callback.settings.windows_per_batch,
        callback.settings.context,
        callback.settings.sampler.stride_blocks,
    ) == (4, "keys", 0.5)
    assert (half.name, half.budget, half.share, half.plain) == ("plain, 0.5 of the steps", "steps", 0.5, False)
    assert equal.name == "reco, equal cost"


def test_equal_runs_share_a_file_and_different_ones_do_not(tmp_path: Path) -> None:
    same = key("lambda", 1)
    path = written(
        tmp_path,
        {"method": "local-opt-balanced", "name": "another name"},
        {"method": "local-opt-balanced", "cost": 1.0},
        {"method": "local-opt-balanced", "batch_size": 31},
        {"method": "local-opt-balanced", "lengths": [9]},
        {"method": "local-opt-balanced", "data": {"motion": "fast"}},
        {"method": "local-opt-balanced", "set": {"context": "keys"}},
    )
    keys = [key(path, number) for number in range(6)]
    assert keys[0] == same
    others = [*keys[1:], key(path, 0, seed=1), key(path, 0, steps=11)]
    line = load_plan(path).lines[0]
    others.append(line.spec(steps=10, seed=0, settings=replace(SETTINGS, dim=32)).key)
    assert len({same, *others}) == 1 + len(others)


def test_lengths_are_cut_to_what_real_clips_have() -> None:
    assert load_plan("rollout", "clips").lines[0].lengths == (9,)
    assert load_plan("rollout", "digits").lines[0].lengths == (9, 17)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"method": "reco", "set": {"window": 3}},
            r"run 1: set takes window_blocks, .*windows_per_batch.*, got window$",
        ),
        ({"method": "reco", "set": {"seed": 3}}, "set takes .*, got seed"),
        ({"method": "reco", "set": {"context": "thawed"}}, "context must be one of .*, got 'thawed'"),
        ({"method": "reco", "set": {"window_blocks": 9}}, "window_blocks must be a whole number from 1 to"),
        ({"method": "baseline", "set": {"context": "keys"}}, "'baseline' is plain training and takes no arguments"),
        ({"method": "reko"}, "method must be one of .*reco.*, got 'reko'"),
        ({"method": "reco", "stepz": 1}, "a run takes method, name, set, .*, got stepz"),
        ({"name": "reco"}, "a run must be a mapping with `method`"),
        ("reco", "a run must be a mapping with `method`, got 'reco'"),
        ({"method": "reco", "steps": 1, "cost": 1}, "steps or cost, each a share of the plain run's, got both"),
        ({"method": "reco", "cost": 1200}, "cost must be a share of the plain run's, above 0 and at most 10, got 1200"),
        ({"method": "reco", "batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"method": "reco", "data": {"motions": "fast"}}, "data takes motion, clips and blocks, got motions"),
        ({"method": "reco", "data": {"name": "clips"}}, "data takes motion, clips and blocks, got name"),
        ({"method": "reco", "data": {"motion": "still"}}, "motion must be one of 'slow', 'fast', got 'still'"),
        ({"method": "reco", "data": {"blocks": 1}}, "blocks must be a whole number of 2 or more, got 1"),
        ({"method": "reco", "lengths": [5]}, "lengths must be frame blocks, each above the 5 of training"),
    ],
)
def test_what_no_run_takes_is_named(tmp_path: Path, run: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_plan(written(tmp_path, run))


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plan must be one of clips, .*, got 'tables'"):
        load_plan("tables")
    with pytest.raises(ValueError, match="must hold a list `runs` of one line or more"):
        load_plan(written(tmp_path))
    with pytest.raises(ValueError, match="takes about, data, lengths, runs, got seeds"):
        load_plan(written(tmp_path, {"method": "reco"}, seeds=3))
    with pytest.raises(ValueError, match="two runs of the name 'reco' on the same data"):
        load_plan(written(tmp_path, {"method": "reco"}, {"method": "reco"}))
    with pytest.raises(ValueError, match="motion is a choice for digits; real clips move as they do, got 'fast'"):
        load_plan("map", "clips")
    with pytest.raises(ValueError, match="data must be one of 'digits', 'clips', got 'films'"):
        load_plan("map", "films")  # type: ignore[arg-type]
