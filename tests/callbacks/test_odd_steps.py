# SPDX-License-Identifier: Apache-2.0
"""Steps without a loss, and modules that train several networks in turn: only the network's own steps are windowed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning import ReCoCallback, WindowSampler, explain
from tests.helpers.foreign import trainer
from tests.helpers.networks import heads
from tests.helpers.networks.common import BLOCKS, DIM, PER_BLOCK, VOCAB, draw_ids, flat_loss

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=15)
WAITS = r"trains none of the blocks 'network.blocks.layers' .* it computes no loss; windows begin with the first step"


def build(cls):
    torch.manual_seed(3)
    return cls()


def fit(module, steps, **options):
    """The fit's run, and what was logged in each step."""
    logged = []

    class Keeping(ReCoCallback):
        def on_train_batch_end(self, *args):
            before = self._report
            super().on_train_batch_end(*args)
            logged.append(before is not None)

    run = trainer(Keeping(WINDOWS, **options), max_epochs=1)
    run.fit(module, torch.utils.data.DataLoader([draw_ids(seed) for seed in range(steps)], batch_size=None))
    return run, logged


class BadSamples(heads.FunctionHeadModule):
    """Skips its first two batches, and the fourth."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (0, 1, 3) else self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")
def test_a_step_that_returns_none_is_waited_for():
    with pytest.warns(UserWarning, match=WAITS):
        _, logged = fit(build(BadSamples), 5)
    assert logged == [False, False, True, False, True]


class AlwaysBad(BadSamples):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.", "ignore:.*windows begin with")
def test_an_epoch_without_any_loss_is_refused():
    with pytest.raises(MisconfigurationException, match=r"no step of the epoch could be windowed: .* computes no loss"):
        fit(build(AlwaysBad), 2)


def test_explain_says_so_too():
    with pytest.raises(MisconfigurationException, match="it computes no loss"):
        explain(build(AlwaysBad), draw_ids(0), ReCoCallback(WINDOWS))


class InTurn(heads.FunctionHeadModule):
    """A critic with a cross-entropy of its own in even steps, the autoregressive network in odd ones."""

    first = 0

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB))

    def configure_optimizers(self):
        parts = self.network, self.critic
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    def training_step(self, batch, batch_idx):
        network, critic = self.optimizers()
        if batch_idx % 2 == self.first:
            with torch.no_grad():
                drawn = self.network(batch[:, :-1]).argmax(-1)
            loss, optimizer = flat_loss(self.critic(drawn), batch), critic
        else:
            loss, optimizer = self.loss(batch), network
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class InTurnFrom1(InTurn):
    first = 1


@pytest.mark.filterwarnings("ignore:.*windows begin with")
@pytest.mark.parametrize("cls", [InTurn, InTurnFrom1])
def test_the_steps_of_another_network_are_left_alone(cls):
    module = build(cls)
    plain = copy.deepcopy(module)
    _, logged = fit(module, 6, network="network")
    assert logged == [batch_idx % 2 != cls.first for batch_idx in range(6)]
    drawn = {}

    def critic_step(ids, batch):
        loss = flat_loss(plain.critic(ids), batch)
        gradients = torch.autograd.grad(loss, list(plain.critic.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(plain.critic.parameters(), gradients, strict=True):
                weight -= 0.1 * gradient

    class Drawing(cls):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == self.first:
                with torch.no_grad():
                    drawn[batch_idx] = self.network(batch[:, :-1]).argmax(-1)
            super().training_step(batch, batch_idx)

    again = build(Drawing)
    fit(again, 6, network="network")
    for batch_idx in range(6):
        if batch_idx % 2 == cls.first:
            critic_step(drawn[batch_idx], draw_ids(batch_idx))
    for own, other in zip(module.critic.parameters(), plain.critic.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


class OtherLoss(heads.FunctionHeadModule):
    """Runs its blocks with gradient, and has a loss that no window knows."""

    def loss(self, batch):
        return F.mse_loss(self.network(batch[:, :-1]), F.one_hot(batch, VOCAB).float())


def test_a_loss_that_is_not_known_is_refused_on_the_first_batch():
    with pytest.raises(MisconfigurationException, match=r"no call of torch.nn.functional.cross_entropy"):
        fit(build(OtherLoss), 1)
