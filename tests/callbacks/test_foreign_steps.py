# SPDX-License-Identifier: Apache-2.0
"""Modules whose steps do what ours do not: each is windowed exactly, or refused with a reason."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from reco_lightning import ReCoCallback, WindowSampler, explain
from tests.helpers.foreign import BLOCKS, DIM, PER_BLOCK, TOKENS, VOCAB, Layer, batches, trainer

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, seed=2)


class Module(pl.LightningModule):
    """A causal network with a start token; subclasses change what is asked of it."""

    def __init__(self):
        super().__init__()
        self.ids, self.places = nn.Embedding(VOCAB + 1, DIM), nn.Embedding(TOKENS, DIM)
        self.layers = nn.ModuleList(Layer(0.0) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def embed(self, ids):
        return self.ids(F.pad(ids[:, :-1], (1, 0), value=VOCAB)) + self.places.weight

    def states(self, ids):
        states = self.embed(ids)
        for layer in self.layers:
            states = layer(states)
        return states

    def loss(self, ids, target):
        return F.cross_entropy(self.head(self.states(ids)).flatten(0, 1), target.flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0], batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def build(cls):
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("stage", ["validation_step", "test_step"])
def test_other_steps_that_call_training_step_get_the_plain_one(stage, sanity):
    class Calls(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.seen = loss.detach()
            return loss

    def other(self, batch, batch_idx):
        self.log("other", self.training_step(batch, batch_idx))

    setattr(Calls, stage, other)
    module = build(Calls)
    fit = trainer(ReCoCallback(WINDOWS), max_epochs=2, num_sanity_val_steps=sanity)
    fit.fit(module, batches(), batches() if stage == "validation_step" else None)
    if stage == "test_step":
        fit.test(module, batches(), verbose=False)
    (ids,) = [torch.cat([batch[0] for batch in batches()])]
    with torch.no_grad():
        plain = module.loss(ids, ids)
    torch.testing.assert_close(fit.callback_metrics["other"], plain)
    assert "reco/cross_entropy" in fit.logged_metrics or stage == "test_step"


def test_what_a_reentrant_checkpoint_costs_is_explained():
    class Checkpointed(Module):
        reentrant = True

        def states(self, ids):
            states = self.embed(ids)
            for layer in self.layers:
                states = checkpoint(layer, states, use_reentrant=self.reentrant)
            return states

    class Other(Checkpointed):
        reentrant = False

    batch = next(iter(batches()))
    module = build(Checkpointed)
    own, other = (explain(one, batch, ReCoCallback(WINDOWS)) for one in (module, build(Other)))
    # the other kind's recomputation ends where all that was missing is there
    assert other.plain_operations <= own.plain_operations <= 1.1 * other.plain_operations
    assert other.operations <= own.operations <= 1.1 * other.operations
    assert all(parameter.grad is None for parameter in module.parameters())


class EmbeddingList(Module):
    """One table for each axis, in a list that is called with ids."""

    def __init__(self):
        super().__init__()
        self.axes = nn.ModuleList(nn.Embedding(TOKENS, DIM) for _ in range(3))

    def embed(self, ids):
        place = torch.arange(TOKENS).expand_as(ids)
        return super().embed(ids) + sum(table(place // (axis + 1)) for axis, table in enumerate(self.axes))


class ScalarList(Module):
    """A list of modules that are called with a number, and return a dictionary."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, number):
            return {"scale": self.weight * number}

    def __init__(self):
        super().__init__()
        self.scales = nn.ModuleList(self.Scale() for _ in range(2))

    def embed(self, ids):
        scale = 1.0
        for part in self.scales:
            scale = part(scale)["scale"]
        return super().embed(ids) * scale


class DictionaryList(ScalarList):
    """The same with states, of which the list makes a dictionary."""

    class Scale(ScalarList.Scale):
        def forward(self, states):
            return {"states": states * self.weight}

    def embed(self, ids):
        states = Module.embed(self, ids)
        for part in self.scales:
            states = part(states)["states"]
        return states


@pytest.mark.parametrize("cls", [EmbeddingList, ScalarList, DictionaryList])
def test_a_list_of_modules_that_is_no_stack_of_blocks_is_passed_over(cls):
    found = explain(build(cls), next(iter(batches())), ReCoCallback(WINDOWS))
    assert (found.engine, found.blocks, found.head) == ("frozen", "layers", "head")


def test_blocks_that_return_no_states_are_refused_by_name():
    class Wrapped(Module):
        class Layer(Layer):
            def forward(self, states):
                return {"states": super().forward(states)}

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(self.Layer(0.0) for _ in range(2))

        def states(self, ids):
            states = self.embed(ids)
            for layer in self.layers:
                states = layer(states)["states"]
            return states

    with pytest.raises(
        MisconfigurationException, match=r"the blocks 'layers' feed the loss, but a block returned dict; a tensor or"
    ):
        explain(build(Wrapped), next(iter(batches())), ReCoCallback(WINDOWS))


def test_an_error_that_the_trace_alone_meets_is_a_refusal_and_one_of_the_step_is_its_own():
    class Sensitive(Module):
        """Looks at the graph between its blocks, which the trace leaves out."""

        def states(self, ids):
            states = self.embed(ids)
            for layer in self.layers:
                states = layer(states)
                if states.grad_fn is None and torch.is_grad_enabled() and layer is self.layers[0]:
                    raise KeyError("no graph")
            return states

    with pytest.raises(MisconfigurationException, match=r"fails under the trace of 'layers' .*KeyError: 'no graph'"):
        explain(build(Sensitive), next(iter(batches())), ReCoCallback(WINDOWS))

    class Broken(Module):
        def states(self, ids):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        explain(build(Broken), next(iter(batches())), ReCoCallback(WINDOWS))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"chunked_loss": False}, {"windows_per_batch": 2}, {"loss_aware": 1.0}], ids=str
)
def test_windows_of_padding_alone_leave_the_weights_finite(options, reduction):
    """The first clips are whole, all others end before the second half of the video."""

    class Padded(Module):
        def training_step(self, batch, batch_idx):
            ids, length = batch
            target = ids.masked_fill(torch.arange(TOKENS) >= length[:, None], -100)
            logits = self.head(self.states(ids)).flatten(0, 1)
            loss = F.cross_entropy(logits, target.flatten(), reduction=reduction)
            return loss if reduction == "mean" else loss / (target != -100).sum()

    lengths = torch.tensor([TOKENS] * 2 + [TOKENS // 2 - 3] * 30)
    ids = torch.randint(VOCAB, (32, TOKENS), generator=torch.Generator().manual_seed(1))
    callback = ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=5), **options)
    module = build(Padded)
    trainer(callback).fit(module, DataLoader(TensorDataset(ids, lengths), batch_size=2))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
