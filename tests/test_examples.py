# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, and what they print is true."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries say in a user's script is no failure of it


def load(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_your_module_learns_with_and_without_the_callback(capsys):
    losses = load("your_module")["main"](steps=120)
    assert losses.keys() == {"plain", "reco"}
    assert all(loss < 0.6 for loss in losses.values())  # all tokens alike: 2.8 nats; always background: 0.4 and more
    assert "engine 'frozen'" in capsys.readouterr().out


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"your_module"}
