# SPDX-License-Identifier: Apache-2.0
"""One part of a recipe over another; that LightningCLI merges alike is in test_recipes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from reco_lightning.recipes.merge import merge

RATE = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "step"}}


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [1]}, {"a+": [2]}, {"a": [1, 2]}),
        ({"a+": [1]}, {"a+": [2]}, {"a+": [1, 2]}),
        ({}, {"a+": [1]}, {"a+": [1]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        (
            {"callbacks": [RATE]},
            {"callbacks.LearningRateMonitor": {"log_momentum": True}},
            {"callbacks": [{**RATE, "init_args": {"logging_interval": "step", "log_momentum": True}}]},
        ),
        (
            {"callbacks+": [{"class_path": "Timer"}]},
            {"callbacks.Timer": {"interval": "step"}},
            {"callbacks+": [{"class_path": "Timer", "init_args": {"interval": "step"}}]},
        ),
    ],
)
def test_merge(below: dict[str, Any], above: dict[str, Any], merged: dict[str, Any]) -> None:
    before = yaml.safe_dump([below, above])
    assert merge(below, above) == merged
    assert yaml.safe_dump([below, above]) == before


@pytest.mark.parametrize("callbacks", [[], [{"class_path": "Timer"}], [RATE, RATE]])
def test_a_change_needs_its_one_entry(callbacks: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"callbacks.LearningRateMonitor changes the one entry of callbacks"):
        merge({"callbacks": callbacks}, {"callbacks.LearningRateMonitor": {"log_momentum": True}})


def test_a_list_is_not_set_over_what_was_added() -> None:
    with pytest.raises(ValueError, match=r"callbacks is set by a part above one that adds to it with callbacks\+"):
        merge({"callbacks+": [RATE]}, {"callbacks": []})
