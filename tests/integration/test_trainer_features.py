# SPDX-License-Identifier: Apache-2.0
"""The callback beside what else a trainer does: averaging of weights, accumulation, mixed precision."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from reco_lightning import ReCoCallback, WindowSampler
from tests.helpers import foreign
from tests.helpers.foreign import BLOCKS, PER_BLOCK, ShiftedInput, batches, trainer

pytestmark = pytest.mark.third_party

FIRST = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=1.0)


def build(cls=ShiftedInput, **options):
    torch.manual_seed(3)
    return cls(**options)


class Weights(pl.Callback):
    """Keeps the trained weights after every optimiser step, and what is patched in copies."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(copy.deepcopy(pl_module.state_dict()))


def assert_close(own, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning has it from 2.6 on")
def test_exponential_averages_are_those_of_the_windowed_weights():
    module, weights = build(), Weights()
    average = callbacks.EMAWeightAveraging(decay=0.5)
    trainer(ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK)), average, weights).fit(module, batches(count=4))
    expected = copy.deepcopy(weights.steps[0])
    for step in weights.steps[1:]:
        expected = {name: 0.5 * value + 0.5 * step[name] for name, value in expected.items()}
    assert_close(module.state_dict(), expected)  # the callback leaves the averages in the module


def test_stochastic_averages_are_those_of_the_windowed_weights():
    module, weights = build(), Weights()
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1)
    trainer(ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK)), swa, weights, max_epochs=3).fit(module, batches(count=2))
    ends = [weights.steps[index] for index in (1, 3)]  # weights at the ends of the epochs before the averaging ones
    assert any(part.ndim for part in ends[0].values())
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert [name for name, part in module.named_modules() if {"forward", "training_step"} & set(vars(part))] == []


@pytest.mark.parametrize("context", ["frozen", "keys"])
def test_accumulated_batches_give_the_step_of_the_joint_batch(context):
    whole, parts = build(), build()
    trainer(ReCoCallback(FIRST, context=context)).fit(whole, batches(count=2, size=4))
    callback = ReCoCallback(FIRST, context=context)
    trainer(callback, accumulate_grad_batches=2).fit(parts, batches(count=4, size=2))
    assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(foreign.ShiftedInput, {}), (foreign.ManualOptimisation, {}), (foreign.LossInside, {})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_float16_with_a_loss_scaler_follows_float32(cls, options):
    windows = WindowSampler(BLOCKS, PER_BLOCK, seed=1)
    full, half = build(cls, **options), build(cls, **options)
    trainer(ReCoCallback(windows)).fit(full, batches(count=4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    trainer(ReCoCallback(windows), plugins=[plugin]).fit(half, batches(count=4))
    start = dict(build(cls, **options).named_parameters())
    for name, value in full.named_parameters():
        moved = (value - start[name]).norm()
        difference = (half.get_parameter(name) - value).norm()
        assert difference <= 0.05 * moved + 1e-6, f"{name}: moved {moved:.2e}, differs by {difference:.2e}"


def test_class_weights_and_ignored_targets_weigh_in_the_window_as_in_a_plain_loss():
    weight = torch.linspace(0.5, 2.0, foreign.VOCAB)

    class Weighted(ShiftedInput):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            targets = ids[:, 1:].masked_fill(ids[:, 1:] == 3, -7)
            logits = self.net(ids[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight, ignore_index=-7)

    module, data = build(Weighted), batches(count=1)
    before = copy.deepcopy(module)
    trainer(ReCoCallback(FIRST, continuity_weight=0.0)).fit(module, data)
    ids = next(iter(data))[0][:, : 2 * PER_BLOCK]  # the first window is a plain run of a shorter video
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 3, -7)
    loss = F.cross_entropy(before.net(ids[:, :-1]).flatten(0, 1), targets.flatten(), weight, ignore_index=-7)
    loss.backward()
    for (name, old), new in zip(before.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close((old - new) / 0.1, old.grad, atol=2e-6, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.1}, {"overfit_batches": 1}, {"detect_anomaly": True}], ids=str
)
def test_a_whole_window_is_the_plain_run_under_other_settings_of_the_trainer(clip):
    plain, windowed = build(), build()
    trainer(**clip).fit(plain, batches())
    whole = WindowSampler(BLOCKS, PER_BLOCK, window_blocks=BLOCKS)
    trainer(ReCoCallback(whole, continuity_weight=0.0, chunked_loss=False), **clip).fit(windowed, batches())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), windowed.parameters(), strict=True))
