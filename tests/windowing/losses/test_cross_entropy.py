# SPDX-License-Identifier: Apache-2.0
"""A window's share of a cross-entropy against loops over its rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reco_lightning.windowing.losses.cross_entropy import loss_rows, select_rows, window_cross_entropy
from reco_lightning.windowing.rows import LossRows, RowLayout, split_batch
from reco_lightning.windowing.sampler import Window

B, V, GRID = 4, 7, (3, 2, 2)
N = 12
ALL = LossRows(0, 12)
ONE = [Window(4, 8)]
TWO = [Window(0, 4), Window(4, 12)]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": torch.linspace(0.5, 2, V, dtype=torch.float64)},
    "both": {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2, V, dtype=torch.float64)},
    "ignore": {"ignore_index": 3},
    "all": {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2, V, dtype=torch.float64), "ignore_index": 3},
}


def case(layout, length=N):
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(B, length, V, dtype=torch.float64, generator=generator)
    target = torch.randint(V, (B, length), generator=generator)
    if layout == "flat":
        return logits, target, logits.flatten(0, 1), target.flatten()
    shape = GRID if layout == "grid" else (length,)
    return logits, target, logits.transpose(1, 2).reshape(B, V, *shape), target.view(B, *shape)


def row_loss(logits, target, *, label_smoothing=0.0, weight=None, ignore_index=-100):
    """Loss and weight of one row, written out; PyTorch's documented formulas."""
    if target == ignore_index:
        return 0.0, 0.0
    logs = logits.log_softmax(0)
    weight = torch.ones(V, dtype=torch.float64) if weight is None else weight
    loss = -(1 - label_smoothing) * weight[target] * logs[target] - label_smoothing / V * (weight * logs).sum()
    return float(loss), float(weight[target])


def in_window(groups, sample, row, offset):
    group = next(g for g in groups if g.samples.start <= sample < g.samples.stop)
    return group.loss_start <= row + offset < group.stop


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("windows", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("layout", ["flat", "line", "grid"])
def test_every_layout_reduction_and_option_equals_loops(layout, windows, name):
    options = OPTIONS[name]
    logits, target, own_logits, own_target = case(layout)
    groups = split_batch(windows, RowLayout(N), batch=B, rows=N)
    cells = [
        (b, r, *row_loss(logits[b, r], target[b, r], **options))
        for b in range(B)
        for r in range(N)
        if in_window(groups, b, r, 0)
    ]
    total, weight = sum(cell[2] for cell in cells), sum(cell[3] for cell in cells)
    ignored = options.get("ignore_index", -100)
    scale = int((target != ignored).sum()) / sum(bool(target[b, r] != ignored) for b, r, *_ in cells)

    def run(reduction):
        return window_cross_entropy(
            own_logits, own_target, groups, batch=B, rows=ALL, reduction=reduction, **options
        ).value

    assert run("mean").item() == pytest.approx(total / weight, 1e-10)
    assert run("sum").item() == pytest.approx(total * scale, 1e-10)
    expected = torch.zeros(B, N, dtype=torch.float64)
    for b, r, loss, _ in cells:
        expected[b, r] = loss * scale
    torch.testing.assert_close(run("none"), expected.view(own_target.shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ignored", [0, 10])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_callers_division_by_its_rows_gives_the_windows_mean(reduction, ignored):
    _, _, logits, target = case("flat")
    target[:ignored] = -100
    groups = split_batch(ONE, RowLayout(N), batch=B, rows=N)
    arguments = {"batch": B, "rows": ALL}
    mean = window_cross_entropy(logits, target, groups, **arguments).value
    loss = window_cross_entropy(logits, target, groups, reduction=reduction, **arguments)
    assert loss.mean == mean
    loss = loss.value.sum()
    torch.testing.assert_close(loss / (target != -100).sum(), mean)


def test_several_groups_give_the_token_weighted_mean():
    _, _, logits, target = case("flat")
    groups = split_batch(TWO, RowLayout(N), batch=B, rows=N)
    joint = window_cross_entropy(logits, target, groups, batch=B, rows=ALL)
    of_groups = joint.group_means()
    parts = []
    for group in groups:
        rows = slice(group.samples.start * N, group.samples.stop * N)
        own = split_batch([group.window], RowLayout(N), batch=2, rows=N)
        parts.append(window_cross_entropy(logits[rows], target[rows], own, batch=2, rows=ALL).value)
    torch.testing.assert_close(joint.value, (4 * parts[0] + 8 * parts[1]) / 12)
    torch.testing.assert_close(of_groups, parts)


@pytest.mark.parametrize(
    ("rows", "tail", "length", "offset"),
    [
        (N - 1, 0, N - 1, 0),  # no prefix: the first token has no row
        (N + 2, 0, N, 2),  # prefix of 3, loss on the video's rows alone
        (N + 3, 1, N + 3, 0),  # prefix of 3, last token fed, loss on all rows
    ],
)
def test_the_windows_rows_are_found_behind_any_prefix(rows, tail, length, offset):
    logits, target, own_logits, own_target = case("flat", length)
    groups = split_batch(ONE, RowLayout(N, tail), batch=B, rows=rows)
    start = length - tail - N + 4  # loss row of token 4, counted from the target's end
    chosen = select_rows(own_logits, own_target, groups, batch=B, rows=LossRows(offset, length))
    assert torch.equal(chosen[0], logits[:, start : start + 4].flatten(0, 1))
    assert torch.equal(chosen[1], target[:, start : start + 4].flatten())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_outside_the_window_may_be_nan_and_get_no_gradient(reduction):
    logits, target, _, _ = case("flat")
    leaf = logits.clone().requires_grad_()
    spoilt = leaf.clone()
    spoilt[:, :4] = float("nan")
    spoilt[:, 8:] = float("nan")
    groups = split_batch(ONE, RowLayout(N), batch=B, rows=N)
    loss = window_cross_entropy(
        spoilt.flatten(0, 1), target.flatten(), groups, batch=B, rows=ALL, reduction=reduction, label_smoothing=0.1
    ).value
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[:, :4].abs().max() == leaf.grad[:, 8:].abs().max() == 0
    assert leaf.grad[:, 4:8].abs().amin() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_whole_sequence_is_the_plain_call(reduction):
    _, _, logits, target = case("grid")
    groups = split_batch([Window(0, N)], RowLayout(N), batch=B, rows=N)
    own = window_cross_entropy(logits, target, groups, batch=B, rows=ALL, reduction=reduction).value
    torch.testing.assert_close(own, F.cross_entropy(logits, target, reduction=reduction), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_window_of_ignored_rows_alone_is_zero_and_so_is_its_gradient(reduction):
    _, _, logits, target = case("flat")
    groups = split_batch(ONE, RowLayout(N), batch=B, rows=N)
    target = target.view(B, N).index_fill(1, torch.arange(4, 8), -100).flatten()
    logits.requires_grad_()
    loss = window_cross_entropy(logits, target, groups, batch=B, rows=ALL, reduction=reduction)
    assert loss.value.abs().max() == loss.mean == loss.group_means()[0] == 0
    assert torch.autograd.grad(loss.value.sum(), logits)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [({"size_average": False}, "sum"), ({"reduce": False}, "none"), ({"size_average": True}, "mean")],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_the_reduction_of_torch_0_4_is_understood(legacy, reduction):
    _, _, logits, target = case("flat")
    groups = split_batch(ONE, RowLayout(N), batch=B, rows=N)
    own = window_cross_entropy(logits, target, groups, batch=B, rows=ALL, **legacy).value
    wanted = window_cross_entropy(logits, target, groups, batch=B, rows=ALL, reduction=reduction).value
    assert torch.equal(own, wanted)


@pytest.mark.parametrize(
    ("logits", "target", "rows"), [((12, V), (12,), 3), ((4, V, 5), (4, 5), 5), ((4, V, 3, 2, 2), (4, 3, 2, 2), 12)]
)
def test_rows_of_a_sample(logits, target, rows):
    assert loss_rows(torch.zeros(logits), torch.zeros(target, dtype=torch.long), batch=4) == rows


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        ((13, V), (13,)),  # rows taken out
        ((8, V), (16,)),
        ((3, V, 5), (3, 5)),  # another batch
        ((4, V, 5), (4, 6)),
        ((4, V, 5), (20,)),
        ((V,), ()),
    ],
)
def test_other_forms_are_refused(logits, target):
    with pytest.raises(ValueError, match=r"windows need \(B \* L, V\) with .* use ignore_index"):
        loss_rows(torch.zeros(logits), torch.zeros(target, dtype=torch.long), batch=4)


def test_class_probabilities_are_refused():
    with pytest.raises(
        ValueError, match=r"got class probabilities as its target; windows need class indices \(int64\)"
    ):
        loss_rows(torch.zeros(4, V), torch.zeros(4, V), batch=4)
