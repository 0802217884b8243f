# SPDX-License-Identifier: Apache-2.0
"""Figures: what is drawn where, labels with units, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from reco_lightning.support.plots import COLOURS, loss_curves, position_cross_entropy

pytestmark = pytest.mark.third_party


def test_loss_curves_draws_every_run_with_its_own_colour_dash_and_marker() -> None:
    fig, ax = loss_curves({"plain": [(0, 5.0), (10, 4.0)], "ReCo": [(0, 5.0), (10, 4.5)]}, x_label="TFLOP")
    assert [line.get_label() for line in ax.lines] == ["plain", "ReCo"]
    assert ax.lines[1].get_xydata().tolist() == [[0, 5.0], [10, 4.5]]
    assert [to_hex(line.get_color()).upper() for line in ax.lines] == list(COLOURS[:2])
    assert len({line.get_linestyle() for line in ax.lines}) == len({line.get_marker() for line in ax.lines}) == 2
    assert ax.get_xlabel() == "TFLOP"
    assert "nats per token" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "ReCo"]
    assert fig is ax.figure


def test_more_runs_than_colours_are_all_drawn() -> None:
    runs = {str(number): [(0.0, float(number))] for number in range(len(COLOURS) + 2)}
    assert len(loss_curves(runs)[1].lines) == len(runs)


def test_position_cross_entropy_marks_borders_and_block_means() -> None:
    values = [3.0, 1.0, 6.0, 4.0, 0.0, 2.0]
    _, ax = position_cross_entropy({"plain": values}, 2)
    assert ax.lines[0].get_ydata().tolist() == values
    means = [line.get_ydata().tolist() for line in ax.lines[1:4]]
    assert means == [[2.0, 2.0], [5.0, 5.0], [1.0, 1.0]]
    assert [list(line.get_xdata()) for line in ax.lines[1:4]] == [[0, 2], [2, 4], [4, 6]]
    assert [line.get_xdata()[0] for line in ax.lines[4:]] == [0, 2, 4, 6]
    assert [text.get_text() for text in ax.texts] == ["block 0", "block 1", "block 2"]
    assert "token position" in ax.get_xlabel()
    assert "(nats)" in ax.get_ylabel()


def test_given_axes_are_used() -> None:
    fig = Figure()
    left, right = fig.subplots(1, 2)
    assert loss_curves({"a": [(0, 1)]}, ax=left) == (fig, left)
    assert position_cross_entropy({"a": np.ones(4)}, 2, ax=right) == (fig, right)
    part = fig.subfigures(2)[0].subplots()
    assert loss_curves({"a": [(0, 1)]}, ax=part) == (fig, part)


@pytest.mark.parametrize("curves", [{}, {"plain": []}])
def test_loss_curves_without_points(curves: dict) -> None:
    with pytest.raises(ValueError, match="curves must hold runs of one point or more each"):
        loss_curves(curves)


@pytest.mark.parametrize(
    ("values", "tokens"), [({}, 2), ({"a": [1.0, 2.0, 3.0]}, 2), ({"a": []}, 2), ({"a": [1.0]}, 0)]
)
def test_position_cross_entropy_needs_whole_blocks(values: dict, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"values must hold whole frame blocks of tokens_per_block={tokens}"):
        position_cross_entropy(values, tokens)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "reco_lightning\[demo\]"'):
        loss_curves({"a": [(0, 1)]})
