# SPDX-License-Identifier: Apache-2.0
"""Windows and their probabilities against hand-made tables; draws against their own distribution."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from reco_lightning.windowing.sampler import Window, WindowSampler


def test_a_window_is_a_half_open_range():
    window = Window(4, 12)
    assert len(window) == 8
    assert window == Window(4, 12)
    assert sorted([Window(4, 12), Window(0, 8)]) == [Window(0, 8), Window(4, 12)]
    assert len({window, Window(4, 12)}) == 1


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (4, 4), (5, 4)])
def test_an_empty_window_is_refused(start, stop):
    with pytest.raises(ValueError, match=rf"0 <= start < stop, got start={start}, stop={stop}; pass"):
        Window(start, stop)


@pytest.mark.parametrize(
    ("options", "starts", "probabilities"),
    [
        ({}, (0, 8, 16, 24), (1 / 2, 1 / 6, 1 / 6, 1 / 6)),
        ({"first_window_prob": None}, (0, 8, 16, 24), (1 / 4,) * 4),
        ({"first_window_prob": 1.0}, (0, 8, 16, 24), (1, 0, 0, 0)),
        ({"stride_blocks": 2}, (0, 16), (1 / 2, 1 / 2)),  # the last block is never reached
        ({"stride_blocks": 2, "window_blocks": 1}, (0, 16, 32), (1 / 2, 1 / 4, 1 / 4)),
        ({"stride_blocks": 0.5}, (0, 4, 8, 12, 16, 20, 24), (1 / 4, 1 / 4) + (1 / 10,) * 5),
        (
            {"stride_blocks": 0.25, "window_blocks": 4},
            (0, 2, 4, 6, 8),
            (1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2),  # four windows touch the first block
        ),
        ({"window_blocks": 5}, (0,), (1,)),
        ({"window_blocks": 5, "first_window_prob": 0.3}, (0,), (1,)),
        ({"stride_blocks": 0.5, "window_blocks": 5}, (0,), (1,)),
        ({"stride_blocks": 9}, (0,), (1,)),
    ],
)
def test_starts_and_probabilities(options, starts, probabilities):
    sampler = WindowSampler(5, 8, **options)
    assert sampler.starts == starts
    assert sampler.probabilities == pytest.approx(probabilities)
    assert sum(sampler.probabilities) == pytest.approx(1)
    width = 8 * options.get("window_blocks", 2)
    assert sampler.windows == tuple(Window(start, start + width) for start in starts)
    assert (sampler.tokens, sampler.window_tokens) == (40, width)


def test_the_papers_windows():
    sampler = WindowSampler(5, 1024)
    assert sampler.starts == (0, 1024, 2048, 3072)
    assert sampler.probabilities == pytest.approx((0.5, 1 / 6, 1 / 6, 1 / 6))


@pytest.mark.parametrize(
    ("options", "never"), [({}, 0), ({"stride_blocks": 2}, 8), ({"stride_blocks": 0.5}, 0), ({"window_blocks": 5}, 0)]
)
def test_tokens_that_no_window_reaches_are_counted(options, never):
    assert WindowSampler(5, 8, **options).never_trained == never


@pytest.mark.parametrize("stride", [1 / 3, 2 / 3, 0.333333333])
def test_a_stride_that_rounds_to_whole_tokens_is_whole(stride):
    assert WindowSampler(3, 3, stride_blocks=stride).starts[1] == round(3 * stride)


def test_a_draw_depends_on_seed_and_step_alone():
    sampler = WindowSampler(5, 8, seed=3)
    draws = [sampler.sample(step) for step in range(50)]
    assert [sampler.sample(step) for step in reversed(range(50))] == draws[::-1]
    assert [WindowSampler(5, 8, seed=3).sample(step) for step in range(50)] == draws
    assert [WindowSampler(5, 8, seed=4).sample(step) for step in range(50)] != draws
    assert [pickle.loads(pickle.dumps(sampler)).sample(step) for step in range(50)] == draws


def test_draws_stay_what_they_are_in_every_release():
    sampler = WindowSampler(5, 1024)
    assert [sampler.sample(step).start // 1024 for step in range(12)] == [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 3, 3]


@pytest.mark.parametrize(
    "options", [{}, {"first_window_prob": None}, {"stride_blocks": 0.5}, {"first_window_prob": 1.0}]
)
@pytest.mark.parametrize("groups", [1, 3])
def test_draws_have_the_probabilities(options, groups):
    sampler = WindowSampler(5, 8, **options)
    steps = 6000 // groups
    counts = Counter(window.start for step in range(steps) for window in sampler.sample_groups(step, groups))
    for start, probability in zip(sampler.starts, sampler.probabilities, strict=True):
        assert counts[start] / (steps * groups) == pytest.approx(probability, abs=0.025)
        assert probability or not counts[start]


@pytest.mark.parametrize("groups", [1, 2, 4, 6, 12])
def test_groups_take_their_share_of_the_windows_in_every_single_step(groups):
    sampler = WindowSampler(5, 8)
    for step in range(100):
        counts = Counter(window.start for window in sampler.sample_groups(step, groups))
        assert sum(counts.values()) == groups
        for start, probability in zip(sampler.starts, sampler.probabilities, strict=True):
            assert abs(counts[start] - probability * groups) < 1 + 1e-9


def test_each_single_group_has_the_probabilities_too():
    # A batch smaller than the number of groups uses some of them: no window may be lost to it.
    sampler = WindowSampler(5, 8)
    for group in range(2):
        counts = Counter(sampler.sample_groups(step, 2)[group].start for step in range(4000))
        for start, probability in zip(sampler.starts, sampler.probabilities, strict=True):
            assert counts[start] / 4000 == pytest.approx(probability, abs=0.03)


def test_one_group_is_the_step_s_window():
    sampler = WindowSampler(5, 8)
    assert all(sampler.sample_groups(step, 1) == [sampler.sample(step)] for step in range(20))


def test_repr_builds_the_same_sampler():
    sampler = WindowSampler(5, 8, window_blocks=3, stride_blocks=0.5, first_window_prob=None, seed=7)
    again = eval(repr(sampler))
    assert repr(again) == repr(sampler)
    assert again.probabilities == sampler.probabilities


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8), {}, "frame_blocks must be a whole number of 1 or more, got 0"),
        ((True, 8), {}, "frame_blocks must be a whole number of 1 or more, got True"),
        ((5, 0), {}, "tokens_per_block must be a whole number of 1 or more, got 0"),
        ((5, 2.0), {}, r"tokens_per_block must be a whole number of 1 or more, got 2\.0"),
        ((5, 8), {"window_blocks": 0}, "window_blocks must be a whole number from 1 to frame_blocks=5, got 0"),
        ((5, 8), {"window_blocks": 6}, "got 6; frame_blocks itself is the plain baseline"),
        ((5, 8), {"first_window_prob": 0}, r"first_window_prob must lie in \(0, 1\], got 0; pass None"),
        ((5, 8), {"first_window_prob": 1.1}, r"first_window_prob must lie in \(0, 1\], got 1\.1"),
        ((5, 8), {"first_window_prob": float("nan")}, r"first_window_prob must lie in \(0, 1\], got nan"),
        ((5, 8), {"stride_blocks": 0}, "stride_blocks must be a number above 0, got 0"),
        ((5, 8), {"stride_blocks": float("inf")}, "stride_blocks must be a number above 0, got inf"),
        ((5, 8), {"stride_blocks": "1"}, "stride_blocks must be a number above 0, got '1'"),
        ((5, 8), {"stride_blocks": 0.3}, r"whole number of tokens, got 0\.3 x tokens_per_block=8; choose .* 1/8"),
        ((5, 8), {"stride_blocks": 1e-9}, "whole number of tokens, got 1e-09 x tokens_per_block=8"),
        ((5, 8), {"seed": 0.5}, r"seed must be a whole number, got 0\.5"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        WindowSampler(*arguments, **options)


def test_errors_of_a_draw():
    sampler = WindowSampler(5, 8)
    with pytest.raises(ValueError, match="step must be a whole number of 0 or more, got -1"):
        sampler.sample(-1)
    with pytest.raises(ValueError, match="groups must be a whole number of 1 or more, got 0"):
        sampler.sample_groups(0, 0)
