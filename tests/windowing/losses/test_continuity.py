# SPDX-License-Identifier: Apache-2.0
"""Continuity (Eq. 10) against sums made by hand."""

from __future__ import annotations

import pytest
import torch

from reco_lightning.windowing.losses.continuity import continuity_loss

# Two samples of three states of width 2; squared distances of neighbours: 5, 4 and 1, 0; of lag 2: 1 and 1.
STATES = [[[0, 0], [1, 2], [1, 0]], [[2, 2], [2, 3], [2, 3]]]


def by_hand(hidden, *, norm, lag):
    total, pairs = 0.0, 0
    for sample in hidden.tolist():
        for here, there in zip(sample, sample[lag:], strict=False):
            squared = sum((a - b) ** 2 for a, b in zip(here, there, strict=True))
            total, pairs = total + squared / (len(here) if norm == "mean" else 1), pairs + 1
    return total / pairs


@pytest.mark.parametrize(
    ("norm", "lag", "expected"), [("sum", 1, 2.5), ("mean", 1, 1.25), ("sum", 2, 1), ("mean", 2, 0.5)]
)
def test_a_case_worked_out_by_hand(norm, lag, expected):
    loss = continuity_loss(torch.tensor(STATES, dtype=torch.float64), norm=norm, lag=lag)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == expected


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize("lag", [1, 3, 6])
def test_loops_give_the_same(norm, lag):
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert continuity_loss(hidden, norm=norm, lag=lag).item() == pytest.approx(
        by_hand(hidden, norm=norm, lag=lag), 1e-12
    )


def test_the_default_is_the_mean_over_neighbours():
    hidden = torch.randn(2, 4, 3)
    assert torch.equal(continuity_loss(hidden), continuity_loss(hidden, norm="mean", lag=1))
    assert continuity_loss(hidden, norm="sum").item() == pytest.approx(3 * continuity_loss(hidden).item(), 1e-6)


def test_equal_states_cost_nothing():
    assert continuity_loss(torch.ones(2, 4, 3)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_computed_in_float32(dtype):
    hidden = (100 + torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    loss = continuity_loss(hidden)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(continuity_loss(hidden.double()).item(), 1e-5)
    huge = torch.tensor([[[0.0], [1000.0]]], dtype=torch.float16)  # its square is beyond float16
    assert continuity_loss(huge).item() == 1e6


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize("lag", [1, 2])
def test_gradients(norm, lag):
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda states: continuity_loss(states, norm=norm, lag=lag), hidden)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 3), {}, r"hidden must have the shape \(B, W, D\), got \(4, 3\)"),
        ((1, 4, 3), {"norm": "max"}, "norm must be one of 'mean', 'sum', got 'max'"),
        ((1, 4, 3), {"lag": 0}, "lag must be a whole number of 1 or more, got 0"),
        ((1, 4, 3), {"lag": 4}, "from 1 to W - 1 = 3, got 4"),
        ((1, 4, 3), {"lag": 1.5}, r"lag must be a whole number of 1 or more, got 1\.5"),
        ((1, 1, 3), {}, "from 1 to W - 1 = 0, got 1"),
    ],
)
def test_errors(shape, options, message):
    with pytest.raises(ValueError, match=message):
        continuity_loss(torch.zeros(shape), **options)
