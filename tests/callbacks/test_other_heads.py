# SPDX-License-Identifier: Apache-2.0
"""Heads of many makes on one trunk: gradients of a window against attention with its context cut off."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning import ReCoCallback
from tests.callbacks.test_heads import WINDOWS, compare, fit, reference
from tests.helpers.networks.attending import Block
from tests.helpers.networks.common import DIM, TOKENS, VOCAB, TokenModule, draw_ids, flat_loss
from tests.helpers.networks.heads import Trunk


class Head(TokenModule):
    """A trunk and, in the subclass, what makes a loss of its states (B, R, D) and targets (B, R)."""

    def __init__(self):
        super().__init__()
        self.network = Trunk()
        self.head = self.make()

    def make(self):
        return nn.Linear(DIM, VOCAB)

    def loss(self, batch):
        return self.of_states(self.network(batch[:, :-1]), batch)

    def of_states(self, x, targets):
        raise NotImplementedError


class FlatLinear(Head):
    def of_states(self, x, targets):
        return F.cross_entropy(self.head(x.reshape(-1, DIM)), targets.flatten())


class WeightNorm(Head):
    def make(self):
        return nn.utils.parametrizations.weight_norm(nn.Linear(DIM, VOCAB))

    def of_states(self, x, targets):
        return flat_loss(self.head(x), targets)


class ScaledAndShifted(Head):
    """The scale and the bias are parameters behind the head."""

    def make(self):
        self.scale, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(VOCAB))
        return nn.Linear(DIM, VOCAB, bias=False)

    def of_states(self, x, targets):
        return flat_loss(F.linear(x, self.head.weight) * self.scale + self.shift, targets)


class Deep(Head):
    def make(self):
        return nn.ModuleList([nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB)])

    def of_states(self, x, targets):
        first, norm, last = self.head
        return flat_loss(last(norm(F.gelu(first(x)))), targets)


class ListOfLayers(Head):
    """An MLP as a list of like layers, which looks like a stack of blocks."""

    def make(self):
        self.last = nn.Linear(DIM, VOCAB)
        return nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def of_states(self, x, targets):
        for layer in self.head:
            x = x + layer(x).relu()
        return flat_loss(self.last(x), targets)


class ListOfResidualLayers(ListOfLayers):
    def make(self):
        self.last = nn.Linear(DIM, VOCAB)
        return nn.ModuleList(nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU()) for _ in range(2))


class Added(Head):
    """Two heads whose logits are added."""

    def make(self):
        self.second = nn.Linear(DIM, VOCAB)
        return nn.Linear(DIM, VOCAB)

    def of_states(self, x, targets):
        return flat_loss(self.head(x) + self.second(x.tanh()), targets)


class Shared(Head):
    """One head for the halves of the states, in two losses."""

    def make(self):
        return nn.Linear(DIM // 2, VOCAB)

    def of_states(self, x, targets):
        first, second = x.chunk(2, dim=-1)
        return flat_loss(self.head(first), targets) + flat_loss(self.head(second), (targets + 1) % VOCAB)


class MixtureOfSoftmaxes(Head):
    def make(self):
        self.priors, self.latent = nn.Linear(DIM, 3), nn.Linear(DIM, 3 * DIM)
        return nn.Linear(DIM, VOCAB)

    def of_states(self, x, targets):
        each = self.head(self.latent(x).unflatten(-1, (3, DIM)).tanh()).softmax(-1)
        mixed = (self.priors(x).softmax(-1).unsqueeze(-1) * each).sum(-2)
        return F.nll_loss(mixed.log().flatten(0, 1), targets.flatten())


class Residual(Head):
    """A second head reads the first one's embedding, as residual quantisation does."""

    def make(self):
        self.second, self.codes = nn.Linear(DIM, VOCAB), nn.Embedding(VOCAB, DIM)
        return nn.Linear(DIM, VOCAB)

    def of_states(self, x, targets):
        deeper = x + self.codes(targets)
        return flat_loss(self.head(x), targets) + flat_loss(self.second(deeper), (targets * 3) % VOCAB)


class SmoothedAndSummed(Head):
    """Two losses of other forms and weights on heads of a list."""

    def make(self):
        return nn.ModuleList(nn.Linear(DIM, VOCAB, bias=i == 0) for i in range(2))

    def of_states(self, x, targets):
        smooth = F.cross_entropy(self.head[0](x).transpose(1, 2), targets, label_smoothing=0.1)
        total = F.cross_entropy(self.head[1](x).flatten(0, 1), targets.flatten(), reduction="sum")
        return 0.3 * smooth + total / targets.numel()


class Conv(Head):
    def make(self):
        return nn.Conv1d(DIM, VOCAB, 1)

    def of_states(self, x, targets):
        return F.cross_entropy(self.head(x.transpose(1, 2)), targets)


MODULES = [
    FlatLinear,
    WeightNorm,
    ScaledAndShifted,
    Deep,
    ListOfLayers,
    ListOfResidualLayers,
    Added,
    Shared,
    MixtureOfSoftmaxes,
    Residual,
    SmoothedAndSummed,
    Conv,
]


@pytest.mark.parametrize("cls", MODULES)
def test_a_window_trains_as_with_the_context_cut_off(cls, monkeypatch):
    torch.manual_seed(3)
    module, batch = cls(), draw_ids(0)
    before = copy.deepcopy(module)
    _, expected = reference(before, batch, lambda x, _, targets: before.of_states(x, targets), monkeypatch)
    run, own = fit(module, continuity_weight=0.0)
    compare(own, expected)
    assert run.callback_metrics["reco/cross_entropy"].isfinite()


class LookedAtTwice(Head):
    """Calls its head once more, on other states and for nothing."""

    def of_states(self, x, targets):
        logits = self.head(x)
        self.head(x.detach() * 2)
        return flat_loss(logits, targets)


class PrefixCutInFront(Head):
    """Two rows in front of the tokens, of which the first is cut off in front of the head."""

    def loss(self, batch):
        network = self.network
        x = torch.cat([network.start.expand(len(batch), 2, -1), network.embedding(batch[:, :-1])], dim=1)
        return flat_loss(self.head(network.norm(network.blocks(x))[:, 1:]), batch)


@pytest.mark.parametrize(("cls", "offset"), [(LookedAtTwice, 0), (PrefixCutInFront, 1)])
def test_a_head_that_cannot_run_on_the_window_alone_reads_the_states_of_all_rows(cls, offset):
    torch.manual_seed(3)
    module = cls()
    trace = ReCoCallback(WINDOWS).settings.select(module, lambda: module.loss(draw_ids(0))).trace
    (call,) = trace.calls
    assert (call.head, list(call.origins(trace.rows))) == (None, list(range(offset, TOKENS + offset)))
    assert trace.layout(TOKENS).prefix(trace.rows) == 1 + offset


class TwoStacks(Head):
    """The blocks of one network in two lists."""

    def make(self):
        self.more = nn.ModuleList(Block() for _ in range(2))
        return nn.Linear(DIM, VOCAB)

    def of_states(self, x, targets):
        for block in self.more:
            x = block(x)
        return flat_loss(self.head(x), targets)


def test_blocks_in_two_lists_are_refused_by_name():
    torch.manual_seed(3)
    module = TwoStacks()
    with pytest.raises(MisconfigurationException, match=r"'network.blocks.layers' and 'more', .*into one ModuleList"):
        ReCoCallback(WINDOWS).settings.select(module, lambda: module.loss(draw_ids(0)))
    trace = ReCoCallback(WINDOWS, blocks="more").settings.select(module, lambda: module.loss(draw_ids(0))).trace
    assert trace.blocks == "more"


class ListInFront(Head):
    """An MLP of like layers in front of the blocks."""

    def make(self):
        self.first = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        return nn.Linear(DIM, VOCAB)

    def loss(self, batch):
        network = self.network
        x = torch.cat([network.start.expand(len(batch), -1, -1), network.embedding(batch[:, :-1])], dim=1)
        for layer in self.first:
            x = x + layer(x).relu()
        return flat_loss(self.head(network.norm(network.blocks(x + network.position))), batch)


def test_layers_in_front_of_the_blocks_are_none_of_them():
    torch.manual_seed(3)
    module = ListInFront()
    selection = ReCoCallback(WINDOWS).settings.select(module, lambda: module.loss(draw_ids(0)))
    assert (selection.engine.name, selection.trace.blocks) == ("frozen", "network.blocks.layers")
