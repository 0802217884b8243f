# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens on rows of a network, with every kind of prefix, and the batch shared out among them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from reco_lightning.windowing.rows import RowLayout, WindowGroup, split_batch
from reco_lightning.windowing.sampler import Window

N = 20


def rows_of(window, *, prefix, last_fed):
    rows = prefix + N - (not last_fed)
    (group,) = split_batch([window], RowLayout(N, int(last_fed)), batch=3, rows=rows)
    assert group.window == window
    assert group.samples == slice(0, 3)
    return group.first, group.loss_start, group.stop


@pytest.mark.parametrize("last_fed", [False, True])
@pytest.mark.parametrize(
    ("prefix", "window", "expected"),
    [
        (1, Window(0, 8), (0, 0, 8)),  # row 0 holds the prefix and predicts token 0
        (1, Window(8, 16), (8, 8, 16)),
        (1, Window(12, 20), (12, 12, 20)),
        (1, Window(0, 20), (0, 0, 20)),
        (0, Window(0, 8), (0, 0, 7)),  # nothing predicts token 0
        (0, Window(8, 16), (7, 7, 15)),
        (0, Window(1, 9), (0, 0, 8)),
        (0, Window(0, 20), (0, 0, 19)),
        (3, Window(0, 8), (0, 2, 10)),  # the first window owns the prefix
        (3, Window(8, 16), (10, 10, 18)),
        (3, Window(1, 9), (3, 3, 11)),
    ],
)
def test_rows_of_a_window(prefix, window, expected, last_fed):
    assert rows_of(window, prefix=prefix, last_fed=last_fed) == expected


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("last_fed", [False, True])
@pytest.mark.parametrize("start", [0, 1, 8, 12])
def test_the_loss_rows_predict_the_windows_tokens(prefix, last_fed, start):
    holds = [None] * prefix + list(range(N))  # what stands at each row
    _, loss_start, stop = rows_of(Window(start, start + 8), prefix=prefix, last_fed=last_fed)
    predicted = [holds[row + 1] for row in range(loss_start, stop)]
    missing = prefix == 0 and start == 0
    assert predicted == list(range(start + missing, start + 8))


WINDOWS = [Window(4 * index, 4 * index + 8) for index in range(4)]


@pytest.mark.parametrize(
    ("batch", "windows", "sizes", "used"),
    [
        (8, 4, [2, 2, 2, 2], [0, 1, 2, 3]),
        (10, 4, [3, 3, 2, 2], [0, 1, 2, 3]),
        (4, 4, [1, 1, 1, 1], [0, 1, 2, 3]),
        (3, 4, [1, 1, 1], [0, 2, 3]),
        (2, 4, [1, 1], [1, 3]),
        (1, 4, [1], [2]),
        (1, 1, [1], [0]),
        (5, 2, [3, 2], [0, 1]),
    ],
)
def test_the_batch_is_shared_out_evenly(batch, windows, sizes, used):
    groups = split_batch(WINDOWS[:windows], RowLayout(N), batch=batch, rows=N)
    assert [group.samples.stop - group.samples.start for group in groups] == sizes
    assert [group.window for group in groups] == [WINDOWS[index] for index in used]
    assert groups[0].samples.start == 0
    assert groups[-1].samples.stop == batch
    assert all(a.samples.stop == b.samples.start for a, b in pairwise(groups))


def test_groups_compare_by_value():
    arguments = {"layout": RowLayout(N), "batch": 2, "rows": N}
    assert split_batch(WINDOWS, **arguments) == split_batch(WINDOWS, **arguments)
    assert split_batch(WINDOWS[:1], **arguments) == (
        WindowGroup(WINDOWS[0], slice(0, 2), first=0, loss_start=0, stop=8),
    )


@pytest.mark.parametrize(("rows", "tail"), [(N - 2, 0), (N - 1, 1)])
def test_a_sequence_too_short_for_the_video_is_refused(rows, tail):
    with pytest.raises(ValueError, match=rf"{rows} rows, too few for .* = 20 video tokens; make the sampler's"):
        split_batch([WINDOWS[0]], RowLayout(N, tail), batch=2, rows=rows)
