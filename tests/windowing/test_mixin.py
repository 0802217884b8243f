# SPDX-License-Identifier: Apache-2.0
"""``ReCoMixin`` in a training step of one's own, and without a trainer."""

from __future__ import annotations

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from reco_lightning import ReCoCallback, ReCoMixin, VideoTransformer, WindowSampler
from reco_lightning.windowing.engines.frozen import FrozenEngine
from tests.helpers import foreign, reference
from tests.helpers.foreign import batches, trainer

GRID = (foreign.BLOCKS, 2, 3)


class Plain(pl.LightningModule):
    def __init__(self, start_token=True):
        super().__init__()
        torch.manual_seed(0)
        self.network = VideoTransformer(
            vocab_size=foreign.VOCAB, grid=GRID, dim=32, depth=2, heads=2, start_token=start_token
        )

    def training_step(self, batch, batch_idx):
        tokens = batch[0]
        logits = self.network(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.shape[1] :].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Windowed(ReCoMixin, Plain):
    def __init__(self, start_token=True, **options):
        super().__init__(start_token)
        self.init_reco(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2), **options)

    def training_step(self, batch, batch_idx):
        tokens = batch[0]
        return self.reco_loss(self.windowed(self.network, tokens[:, :-1], targets=tokens, progress=batch_idx / 4))


OPTIONS = (
    {},
    {"blocks": "network.blocks", "head": "network.head"},
    {"context": "keys"},
    {"context": "attached"},
    {"context": "dropped"},
    {"windows_per_batch": 3},
    {"engine": "prefix"},
    {"engine": "masked"},
    {"chunked_loss": False},
    {"continuity_weight": 0.0},
    {"continuity_lag": foreign.PER_BLOCK, "continuity_norm": "sum"},
    {"continuity_balanced": True},
    {"continuity_schedule": "cosine"},
    {"attached_blocks": 1, "attached_share": 0.5},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("start_token", [True, False])
def test_equals_the_callback(start_token, options):
    own, other = Windowed(start_token, **options), Plain(start_token)
    trainer().fit(own, batches(count=4))
    sampler = WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2)
    trainer(ReCoCallback(sampler, **options)).fit(other, batches(count=4))
    for (name, a), b in zip(own.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_gives_logits_targets_and_states_of_the_window():
    module = Windowed()
    tokens = next(iter(batches(count=1)))[0]
    step = module.windowed(module.network, tokens[:, :-1], targets=tokens, step=3)
    (window,) = step.windows
    assert window == WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2).sample(3)
    logits, hidden = reference.forward(module.network, tokens[:, :-1])
    span = slice(window.start, window.stop)
    torch.testing.assert_close(step.logits, logits[:, span].flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.hidden[0], hidden[:, span], atol=1e-5, rtol=1e-5)
    assert torch.equal(step.targets, tokens[:, span].flatten())


def test_a_schedule_follows_the_progress_that_is_stated():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    module.init_reco(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, schedule={0.5: foreign.BLOCKS}))
    with pytest.raises(ValueError, match="progress must be given where the sampler or the continuity has a schedule"):
        module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)
    for progress, blocks in ((0.4, 2), (0.5, foreign.BLOCKS)):
        step = module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0, progress=progress)
        assert [len(window) for window in step.windows] == [blocks * foreign.PER_BLOCK]


def test_the_windows_of_every_stage_are_verified(monkeypatch):
    seen, activate = [], FrozenEngine.activate

    def record(self, windows, *, attached=0, inference=False):
        seen.extend(windows if inference else ())
        activate(self, windows, attached=attached, inference=inference)

    monkeypatch.setattr(FrozenEngine, "activate", record)
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    module.init_reco(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, schedule={0.5: 3}))
    module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0, progress=0.0)
    size = foreign.PER_BLOCK
    assert [(window.start // size, window.stop // size) for window in seen] == [
        (0, 2), (1, 3), (3, 5), (0, 3), (1, 4), (2, 5)
    ]  # fmt: skip


def test_validation_copies_and_removal_are_plain():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    plain = module.network(tokens[:, :-1]).detach()
    module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)
    with torch.no_grad():
        assert torch.equal(module.network(tokens[:, :-1]), plain)
    copied = copy.deepcopy(module)
    assert torch.equal(copied.network(tokens[:, :-1]), plain)
    module.remove_reco()
    assert torch.equal(module.network(tokens[:, :-1]), plain)


def gradients(module, loss):
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters())), strict=True))


@pytest.mark.parametrize("options", [{}, {"engine": "prefix"}, {"engine": "masked"}, {"context": "dropped"}], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_forward_in_the_same_step_is_plain(options, checkpointed):
    def windowed_loss():
        return module.reco_loss(module.windowed(module.network, ids, targets=tokens, step=3))

    module, tokens = Windowed(**options), next(iter(batches(count=1)))[0]
    ids = tokens[:, :-1]
    if checkpointed:
        for index, block in enumerate(module.network.blocks):
            module.network.blocks[index] = checkpoint_wrapper(block)
    plain = module.network(ids)
    alone, windowed = gradients(module, plain.square().mean()), gradients(module, windowed_loss())
    loss = windowed_loss()
    with torch.set_grad_enabled(not checkpointed):  # what is recomputed is windowed
        second = module.network(ids)
    torch.testing.assert_close(second, plain, rtol=0, atol=0)
    both = gradients(module, loss + (0.0 if checkpointed else second.square().mean()))
    for name, gradient in both.items():
        expected = windowed[name] + (0.0 if checkpointed else alone[name])
        torch.testing.assert_close(gradient, expected, msg=lambda text, name=name: f"{name}: {text}")


class Interrupted(Windowed):
    """Its network ends in an error at the calls that are chosen, counted from 1."""

    def __init__(self, *chosen):
        super().__init__()
        self.chosen, self.calls = chosen, itertools.count(1)  # a number would be put back after a dry run

    def run(self, ids):
        if next(self.calls) in self.chosen:
            raise RuntimeError("out of luck")
        return self.network(ids)


def assert_as_before(module, before, tokens):
    """Neither patched nor changed, and plain in training and evaluation."""
    assert [name for name, part in module.named_modules() if "forward" in vars(part)] == []
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    fresh = Plain()
    fresh.load_state_dict(before)
    for mode in (True, False):
        module.train(mode)
        assert torch.equal(module.network(tokens[:, :-1]), fresh.train(mode).network(tokens[:, :-1]))
    module.train()


@pytest.mark.parametrize("call", [1, 2, 3])  # in the trace, and in the verification of the first and the second window
def test_a_network_that_raises_while_it_is_examined_is_left_as_it_was(call):
    module, tokens = Interrupted(call), next(iter(batches(count=1)))[0]
    module.init_reco(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2), engine="frozen")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises((RuntimeError, MisconfigurationException), match="out of luck"):
        module.windowed(module.run, tokens[:, :-1], targets=tokens, step=0)
    assert_as_before(module, before, tokens)
    module.reco_loss(module.windowed(module.run, tokens[:, :-1], targets=tokens, step=0)).backward()


def test_a_network_that_raises_in_a_step_is_plain_afterwards():
    module, tokens = Interrupted(), next(iter(batches(count=1)))[0]
    module.windowed(module.run, tokens[:, :-1], targets=tokens, step=0)
    module.chosen = range(100)
    with pytest.raises(RuntimeError, match="out of luck"):
        module.windowed(module.run, tokens[:, :-1], targets=tokens, step=1)
    fresh = Plain()
    assert torch.equal(module.network(tokens[:, :-1]), fresh.network(tokens[:, :-1]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head": "extra"}, "set head= to the module that makes the logits"),
        ({"blocks": "extra"}, "no stack of blocks was found"),
        ({"prefix_tokens": 3}, "behind prefix_tokens=3"),
        ({"prefix_tokens": 0}, "behind prefix_tokens=0"),
    ],
    ids=str,
)
def test_a_wrong_part_is_refused_and_changes_nothing(options, match):
    module, tokens = Windowed(**options), next(iter(batches(count=1)))[0]
    module.extra = torch.nn.Linear(32, 32)
    before = {name: value.clone() for name, value in module.state_dict().items() if not name.startswith("extra")}
    with pytest.raises(MisconfigurationException, match=match):
        module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)
    del module.extra
    assert_as_before(module, before, tokens)


def test_a_network_that_sees_the_future_is_refused_and_left_as_it_was():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    before = copy.deepcopy(module.state_dict())

    def ahead(ids):
        return module.network(ids.flip(1)).flip(1)

    with pytest.raises(MisconfigurationException, match="cannot be windowed"):
        module.windowed(ahead, tokens[:, :-1], targets=tokens, step=0)
    assert_as_before(module, before, tokens)


def test_is_not_for_validation():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    with torch.no_grad(), pytest.raises(ValueError, match="windowed must run with gradients"):
        module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)


def test_targets_of_another_length_are_refused():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    with pytest.raises(ValueError, match=r"targets must be \(B, L\) or \(B, L \+ 1\)"):
        module.windowed(module.network, tokens[:, :-1], targets=tokens[:, :-2], step=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context": "warm"}, "context must be one of 'frozen', 'keys', 'attached', 'dropped', got 'warm'"),
        ({"continuity_weight": -1.0}, "continuity_weight must be a finite number"),
        ({"prefix_tokens": -1}, "prefix_tokens must be a whole number of 0 or more"),
        ({"windows_per_batch": 0}, "windows_per_batch must be a whole number of 1 or more"),
        ({"loss_aware": 1.0}, "options of init_reco must be among continuity_weight, .*, got loss_aware"),
    ],
)
def test_refuses_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        Windowed(**options)
