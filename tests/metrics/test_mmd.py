# SPDX-License-Identifier: Apache-2.0
"""The polynomial discrepancy from running sums against sums over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reco_lightning.metrics.mmd import PolynomialVideoMMD, polynomial_mmd


def over_pairs(x, y, *, unbiased):
    """The definition: means of the kernel over all pairs, by numpy."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1]) ** 2

    def within(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1)) if unbiased else k.mean()

    return 100 * (within(x) + within(y) - 2 * kernel(x, y).mean())


@pytest.mark.parametrize(("first", "second", "width"), [(8, 8, 3), (5, 17, 10), (30, 20, 64)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_all_pairs(first, second, width, unbiased):
    draw = np.random.default_rng(first)
    x, y = draw.standard_normal((first, width)) + 0.3, 1.5 * draw.standard_normal((second, width))
    found = polynomial_mmd(torch.from_numpy(x), torch.from_numpy(y), unbiased=unbiased)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(over_pairs(x, y, unbiased=unbiased), rel=1e-10)


def test_example_of_jedi():
    x = torch.arange(1.0, 10).view(3, 3)
    y = torch.tensor([[7.0, 6, 5], [4, 3, 2], [1, 1, 8], [0, 2, 5]])
    assert polynomial_mmd(x, y).item() == pytest.approx(27072.2222, abs=1e-3)  # JEDi's own: 270.7, before its factor


def test_unbiased_is_right_on_average():
    draw = torch.Generator().manual_seed(0)
    sets = torch.randn(400, 2, 6, 8, generator=draw, dtype=torch.float64)
    biased, unbiased = (
        torch.stack([polynomial_mmd(x, y, unbiased=flag) for x, y in sets]).mean().item() for flag in (False, True)
    )
    # E k(x, x) = (D² + 2D) / D² and E k(x, x') = 1 / D, so six clips of each kind are off by their difference / 3
    assert biased == pytest.approx(100 * (1.25 - 0.125) / 3, rel=0.05)
    assert abs(unbiased) < 1


def test_metric_equals_function():
    def means(clips):
        return clips.float().mean((2, 3, 4))

    clips = torch.randint(0, 256, (20, 3, 5, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for unbiased in (False, True):
        metric = PolynomialVideoMMD(means, width=3, unbiased=unbiased)
        for part in clips.split(6):
            metric.update(part, real=True)
            metric.update(part // 3, real=False)
        assert metric.compute().item() == pytest.approx(
            polynomial_mmd(means(clips), means(clips // 3), unbiased=unbiased).item()
        )
        assert f"unbiased {unbiased}" in metric.describe()


@pytest.mark.parametrize(
    ("first", "second", "unbiased", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), True, "2 or more, got 1 and 3"),
        (torch.zeros(0, 2), torch.zeros(3, 2), False, "1 or more, got 0 and 3"),
        (torch.zeros(2, 2), torch.zeros(3, 4), False, r"\(N, D\) and \(M, D\), got \(2, 2\) and \(3, 4\)"),
    ],
)
def test_sets_that_do_not_fit(first, second, unbiased, message):
    with pytest.raises(ValueError, match=message):
        polynomial_mmd(first, second, unbiased=unbiased)
