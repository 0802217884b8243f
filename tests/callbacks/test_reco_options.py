# SPDX-License-Identifier: Apache-2.0
"""What goes beyond the paper in ``ReCoCallback``: schedules, attached blocks, draws by loss, other continuity terms."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, VideoTransformer, WindowSampler, continuity_loss
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.losses.continuity import Continuity, gradient_norm
from reco_lightning.windowing.running_losses import RunningLosses
from reco_lightning.windowing.sampler import Window

BLOCKS, PER_BLOCK, VOCAB = 5, 4, 16
TOKENS = BLOCKS * PER_BLOCK


class Plain(pl.LightningModule):
    """The reference network, plain SGD, so that a step is its gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.network = VideoTransformer(vocab_size=VOCAB, grid=(BLOCKS, 2, 2), dim=32, depth=2, heads=2)

    def training_step(self, tokens, batch_idx):
        logits = self.network(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback, *, steps, accumulate=1, **options):
    module = Plain()
    draw = torch.Generator().manual_seed(1)
    data = DataLoader(torch.randint(VOCAB, (4 * steps * accumulate, TOKENS), generator=draw), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        accumulate_grad_batches=accumulate,
        **({"max_steps": steps} | options),
    )
    trainer.fit(module, data)
    return module


@pytest.fixture
def runs(monkeypatch):
    """What every step of a fit was run with: its windows, its attached tokens, its progress."""
    seen = []
    run = Injection.run

    def record(self, windows, step, **options):
        seen.append((windows, options["attached"], options["progress"]))
        return run(self, windows, step, **options)

    monkeypatch.setattr(Injection, "run", record)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_lengthens_the_windows_at_its_shares_of_the_training(runs, accumulate):
    sampler = WindowSampler(BLOCKS, PER_BLOCK, schedule={0.8: 5, 0.5: 3})
    fit(ReCoCallback(sampler), steps=10, accumulate=accumulate)
    lengths = [len(window) // PER_BLOCK for (window,), _, _ in runs]
    assert lengths == [2] * 5 * accumulate + [3] * 3 * accumulate + [5] * 2 * accumulate


def test_a_schedule_needs_a_training_with_an_end():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    sampler = WindowSampler(BLOCKS, PER_BLOCK, schedule={0.5: 3})
    with pytest.raises(MisconfigurationException, match="set max_steps or max_epochs"):
        fit(ReCoCallback(sampler), steps=2, max_steps=-1, max_epochs=-1)


def test_step_kinds_are_the_shares_of_the_whole_training():
    sampler = WindowSampler(3, 4, first_window_prob=None, schedule={0.5: 3})
    kinds = ReCoCallback(sampler, attached_blocks=1, attached_share=0.5).settings.step_kinds
    found = {(kind.window, kind.attached): kind.probability for kind in kinds}
    half, quarter, eighth = Window(0, 12), Window(0, 8), Window(4, 12)
    assert found == {
        (quarter, 4): 0.125, (quarter, 0): 0.125, (eighth, 4): 0.125, (eighth, 0): 0.125,
        (half, 4): 0.25, (half, 0): 0.25,
    }  # fmt: skip


@pytest.mark.slow
def test_attached_blocks_join_a_share_of_the_steps(runs):
    fit(ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK), attached_blocks=2, attached_share=0.5), steps=40)
    attached = [tokens for _, tokens, _ in runs]
    assert set(attached) == {0, 2 * PER_BLOCK}
    assert 10 <= attached.count(0) <= 30


def test_all_blocks_attached_equal_an_attached_context():
    sampler = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=2)
    one = fit(ReCoCallback(sampler, attached_blocks=BLOCKS), steps=3)
    other = fit(ReCoCallback(sampler, context="attached"), steps=3)
    for own, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-4)


def window_terms(network, tokens, window, lag):
    """Cross-entropy and continuity of the first window, which has no context, from a plain forward."""
    states = []
    hook = network.head.register_forward_pre_hook(lambda _m, inputs: states.append(inputs[0]))
    logits = network(tokens[:, :-1])[:, : window.stop]
    hook.remove()
    hidden = states[0][:, : window.stop]
    loss = F.cross_entropy(network.head(hidden).flatten(0, 1), tokens[:, : window.stop].flatten())
    assert logits.shape[1] == window.stop
    return loss, continuity_loss(hidden, lag=lag), hidden


@pytest.mark.parametrize(
    "options", [{"continuity_lag": PER_BLOCK}, {"continuity_balanced": True}, {"continuity_schedule": "linear"}]
)
def test_a_step_moves_the_weights_by_the_gradient_of_the_stated_term(options):
    sampler = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=1.0)
    moved = fit(ReCoCallback(sampler, continuity_weight=0.5, **options), steps=1)
    module = Plain()
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (4, TOKENS), generator=draw)
    loss, term, hidden = window_terms(module.network, tokens, sampler.windows[0], options.get("continuity_lag", 1))
    factor = 0.5
    if "continuity_balanced" in options:
        of_loss, of_term = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, term))
        factor = 0.5 * of_loss.norm() / of_term.norm()
        assert not 0.4 < factor < 0.6  # it must differ from the plain factor for the test to tell
    (loss + factor * term).backward()
    for before, after in zip(module.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close((before - after) / 0.1, before.grad, atol=2e-6, rtol=1e-4)


def test_weights_of_the_schedules():
    for schedule, halfway, end in (("constant", 0.2, 0.2), ("linear", 0.1, 0.0), ("cosine", 0.1, 0.0)):
        continuity = Continuity(0.2, schedule=schedule)
        assert [continuity.at(p) for p in (0, 0.5, 1)] == pytest.approx([0.2, halfway, end])
    assert Continuity(0.2, schedule="cosine").at(0.25) == pytest.approx(0.1 * (1 + math.sqrt(0.5)))


def test_gradient_norm_is_that_of_all_states_together():
    states = [torch.ones(1, 2, 2, requires_grad=True), torch.ones(1, 1, 3, requires_grad=True)]
    value = 2 * states[0].sum() + (states[1] ** 2).sum()  # gradients: four times 2, three times 2
    assert gradient_norm(value, states).item() == pytest.approx(math.sqrt(7 * 4))


def test_windows_of_twice_the_loss_are_drawn_twice_as_often():
    sampler = WindowSampler(3, 4, first_window_prob=0.5)
    losses = RunningLosses(1.0)
    first, second = sampler.windows
    for loss in (1.0, 3.0):
        losses.add(first, torch.tensor(loss))  # mean 2
    losses.add(second, torch.tensor(1.0))
    losses.update(sampler, step=19)
    assert losses.probabilities(sampler) == [0.5, 0.5]  # only every twentieth step waits for the device
    losses.update(sampler, step=20)
    assert losses.probabilities(sampler) == pytest.approx([2 / 3, 1 / 3])
    losses.add(second, torch.tensor(11.0))
    losses.update(sampler, step=40)  # 0.8 * 1 + 0.2 * 11 = 3
    assert losses.probabilities(sampler) == pytest.approx([2 / 5, 3 / 5])
    counts = [0, 0]
    for step in range(3000):
        (window,) = sampler.sample_groups(step, 1, probabilities=losses.probabilities(sampler))
        counts[sampler.windows.index(window)] += 1
    assert counts[0] / 3000 == pytest.approx(0.4, abs=0.03)


def test_windows_never_met_count_as_mean_ones_and_other_ranks_are_heard():
    sampler = WindowSampler(4, 4, first_window_prob=None)
    losses = RunningLosses(2.0)
    losses.add(sampler.windows[0], torch.tensor(2.0))
    # another rank met the second window twice, with losses of 4 in sum
    there = torch.tensor([[0.0, 4.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    losses.update(sampler, step=20, reduce=lambda sums: sums + there)
    assert losses.probabilities(sampler) == pytest.approx([1 / 3] * 3)


@pytest.mark.slow
def test_a_fit_by_loss_reports_each_groups_loss_and_stores_them():
    callback = ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK), loss_aware=1.0, windows_per_batch=2)
    fit(callback, steps=21)
    state = callback.state_dict()["losses"]
    assert set(state["running"]) == {(w.start, w.stop) for w in callback.settings.sampler.windows}
    assert all(2 < loss < 3.5 for loss in state["running"].values())  # near log(16), in nats
    assert sum(count for _, count in state["collected"].values()) == 2  # of the last step, after the look at step 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"continuity_lag": 0}, "continuity_lag must be a whole number of 1 or more, got 0"),
        ({"continuity_lag": 7}, "continuity compares states 7 apart and needs windows of 9 tokens or more, got 8"),
        ({"continuity_schedule": "sine"}, "continuity_schedule must be one of 'constant', .* got 'sine'"),
        ({"attached_blocks": -1}, "attached_blocks must be a whole number of 0 or more, got -1"),
        ({"attached_blocks": 1, "context": "dropped"}, "attached_blocks=1 needs context='frozen' or 'keys', got"),
        ({"attached_share": 0}, r"attached_share must lie in \(0, 1\], got 0"),
        ({"loss_aware": -1.0}, "loss_aware must be a finite number of 0 or more, got -1.0"),
    ],
)
def test_refuses_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK), **options)


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        ({0.0: 3}, r"schedule must name shares of the training in \(0, 1\), got 0.0"),
        ({0.5: 6}, "schedule, from 0.5 on: window_blocks must be a whole number from 1 to frame_blocks=5, got 6"),
    ],
)
def test_refuses_a_schedule_out_of_range(schedule, match):
    with pytest.raises(ValueError, match=match):
        WindowSampler(BLOCKS, PER_BLOCK, schedule=schedule)
