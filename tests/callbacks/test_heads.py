# SPDX-License-Identifier: Apache-2.0
"""Several heads and losses, and heads that are no module, beyond the rows of the settings table."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning import ReCoCallback, ReCoMixin, WindowSampler, continuity_loss, explain
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.sampler import Window
from tests.helpers.foreign import trainer
from tests.helpers.networks import heads
from tests.helpers.networks.common import BATCH, BLOCKS, DIM, PER_BLOCK, TOKENS, VOCAB, draw_ids, flat_loss
from tests.helpers.networks.references import cut_attention

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=15)  # from the tokens 12, 18 and 0 on


def build(cls, *args):
    torch.manual_seed(3)
    return cls(*args)


def fit(module, steps=1, **options):
    """One fit; its callback, and the gradients of its last step."""
    found = {}

    def note(optimizer):
        found.update({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    module.on_before_optimizer_step = note
    callback = ReCoCallback(WINDOWS, **options)
    run = trainer(callback, max_epochs=1)
    run.fit(module, torch.utils.data.DataLoader([draw_ids(seed) for seed in range(steps)], batch_size=None))
    return run, found


def reference(module, batch, loss, monkeypatch):
    """Gradients of a loss over the states behind blocks and norm, made in one pass with the context cut off."""
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", cut_attention(12))
        inner = []
        hook = module.network.blocks.register_forward_hook(lambda _, __, output: inner.append(output))
        states = module.network(batch[:, :-1])
        hook.remove()
        value = loss(states[:, 12:24], inner[0][:, 12:24], batch[:, 12:24])
        names, parameters = zip(*module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return value, dict(zip(names, gradients, strict=True))


def compare(own, expected):
    for name, gradient in expected.items():
        gradient = torch.zeros(()) if gradient is None else gradient
        text = f"{name}: {{}}".format
        torch.testing.assert_close(own[name], gradient.expand_as(own[name]), atol=2e-6, rtol=1e-4, msg=text)


def test_continuity_is_added_once_and_the_log_holds_the_sum_and_its_parts(monkeypatch):
    module, batch = build(heads.CodebooksModule), draw_ids(0)

    def loss(states, _, targets):
        parts = [flat_loss(head(states), (targets + i) % VOCAB) for i, head in enumerate(module.heads)]
        return sum(parts) / 3 + 0.5 * continuity_loss(states)

    before = copy.deepcopy(module)
    value, expected = reference(module, batch, loss, monkeypatch)
    run, own = fit(before, continuity_weight=0.5)
    compare(own, expected)
    logged = {name: float(number) for name, number in run.callback_metrics.items()}
    parts = [logged[f"reco/cross_entropy/{index}"] for index in range(3)]
    assert logged["reco/cross_entropy"] == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert logged["reco/cross_entropy"] + 0.5 * logged["reco/continuity"] == pytest.approx(
        float(value.detach()), rel=1e-5
    )


def test_one_cross_entropy_has_no_parts():
    run, _ = fit(build(heads.FunctionHeadModule))
    assert {name for name in run.callback_metrics if name.startswith("reco/cross")} == {"reco/cross_entropy"}


class RewardAtTheEnd(heads.HeadsModule):
    """The second head reads the last row of the video alone."""

    def loss(self, batch):
        x = self.states(batch)
        self.reward = flat_loss(self.heads[1](x[:, -1:]), batch[:, -1:])
        return flat_loss(self.heads[0](x), batch) + 2 * self.reward


def test_a_loss_without_a_row_in_the_window_is_zero_with_a_graph(monkeypatch):
    module, batch = build(RewardAtTheEnd), draw_ids(0)
    _, expected = reference(module, batch, lambda x, _, z: flat_loss(module.heads[0](x), z), monkeypatch)
    _, own = fit(module, continuity_weight=0.0)
    assert float(module.reward.detach()) == 0.0
    assert own.keys() >= {"heads.1.weight", "heads.1.bias"}  # DDP waits for them
    expected.pop("heads.2.weight"), expected.pop("heads.2.bias")
    compare(own, expected)


def test_a_loss_on_rows_of_the_last_window_alone_trains_there(monkeypatch):
    """Weights stay as they are, so that each step's value can be compared with the plain one."""
    module, values = build(RewardAtTheEnd), []
    plain = copy.deepcopy(module)

    def note(trainer, *args):
        values.append(float(module.reward.detach()))

    monkeypatch.setattr(RewardAtTheEnd, "on_train_batch_end", lambda self, *args: note(*args))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit(module, 6, continuity_weight=0.0)
    ends = [WINDOWS.sample(step).stop == TOKENS for step in range(6)]
    assert 0 < sum(ends) < 6
    for step, (value, is_last) in enumerate(zip(values, ends, strict=True)):
        with torch.no_grad():
            plain.loss(draw_ids(step))
        assert value == pytest.approx(float(plain.reward) if is_last else 0.0, abs=1e-5)


@pytest.mark.parametrize("windows_per_batch", [1, 3])
@pytest.mark.parametrize("context", ["frozen", "keys", "attached", "dropped"])
@pytest.mark.parametrize("cls", [heads.StackedModule, heads.WorldModelModule, heads.FactorisedModule])
def test_every_context_and_group_trains(cls, context, windows_per_batch):
    module = build(cls)
    before = copy.deepcopy(module.state_dict())
    run, _ = fit(
        module, 3, context=context, windows_per_batch=windows_per_batch, loss_aware=1.0, continuity_balanced=True
    )
    after = module.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    name = "network.blocks.layers.0.attn.c_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert run.callback_metrics["reco/cross_entropy"] > 0


@pytest.mark.parametrize("cls", [heads.StackedModule, heads.InterleavedModule, heads.WorldModelModule])
def test_three_windows_in_a_batch_are_three_steps_of_a_sample_each(cls):
    windows, batch = [Window(0, 12), Window(6, 18), Window(18, 30)], draw_ids(0)
    gradients = []
    for samples in (slice(0, 3), *(slice(sample, sample + 1) for sample in range(3))):
        module, own = build(cls), batch[samples]
        settings = ReCoCallback(WINDOWS, continuity_weight=0.0, windows_per_batch=3).settings
        selection = settings.select(module, partial(module.training_step, batch, 0))
        injection = Injection(selection.engine, selection.trace, settings.continuity)
        selection.engine.install()
        loss, _ = injection.run(windows[samples] if len(own) == 1 else windows, partial(module.loss, own))
        loss.backward()
        selection.engine.remove()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    joint, *single = gradients
    compare(joint, {name: sum(each[name] for each in single) / 3 for name in joint})


def test_a_tied_head_never_has_the_logits_of_all_rows():
    """The linear case keeps the chunked loss: no tensor of the windowed step has a row of classes for every token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor) and value.shape[-1:] == (VOCAB,) and any(value.stride()):
                    Largest.size = max(Largest.size, value.numel() // VOCAB)
            return out

    class Watched(heads.FunctionHeadModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 0:
                return super().training_step(batch, batch_idx)
            with Largest():
                return super().training_step(batch, batch_idx)

    fit(build(Watched), 2)
    assert 0 < Largest.size <= BATCH * 2 * PER_BLOCK


class Mixed(ReCoMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.network = heads.TiedTrunk()
        self.init_reco(WINDOWS, continuity_weight=0.0)


def test_the_mixin_serves_a_tied_head(monkeypatch):
    module, batch = build(Mixed), draw_ids(0)
    step = module.windowed(module.network, batch[:, :-1], targets=batch, step=0)
    assert step.logits.shape == (BATCH * 2 * PER_BLOCK, VOCAB)
    module.reco_loss(step).backward()
    plain = build(heads.FunctionHeadModule)
    plain.network.load_state_dict(module.network.state_dict())

    def loss(states, _, targets):
        return flat_loss(F.linear(states, plain.network.embedding.weight), targets)

    plain.network.__class__ = heads.Trunk
    _, expected = reference(plain, batch, loss, monkeypatch)
    compare({name: p.grad for name, p in module.named_parameters()}, expected)


def test_explain_counts_all_losses():
    module = build(heads.WorldModelModule)
    found = explain(module, draw_ids(0), ReCoCallback(WINDOWS))
    assert (found.engine, found.head) == ("frozen", "")
    assert "heads that read the states of all rows" in found.report
    assert found.operations < found.plain_operations


class DeepSupervision(heads.FunctionHeadModule):
    """A second loss on the states between two blocks."""

    def __init__(self):
        super().__init__()
        self.early = nn.Linear(DIM, VOCAB)
        self.between = []
        self.network.blocks.layers[0].register_forward_hook(self.keep)

    def keep(self, block, inputs, output):
        self.between = [output]

    def loss(self, batch):
        value = super().loss(batch)
        return value + flat_loss(self.early(self.between[0]), batch)


def test_a_loss_on_states_between_blocks_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match=r"computed of the states inside the blocks .*cross_entropy"):
        fit(build(DeepSupervision))


class Sometimes(heads.FactorisedModule):
    """The second loss is left out after the first batch."""

    def loss(self, batch):
        x = self.states(batch)
        first = flat_loss(self.heads[0](x), batch)
        self.steps = getattr(self, "steps", 0) + 1
        return first if self.trainer.fit_loop.total_batch_idx else first + flat_loss(self.heads[1](x), batch)


class Later(heads.FactorisedModule):
    """The second loss comes with the second batch."""

    def loss(self, batch):
        x = self.states(batch)
        first = flat_loss(self.heads[0](x), batch)
        return first + flat_loss(self.heads[1](x), batch) if self.trainer.fit_loop.total_batch_idx else first


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        (Sometimes, "own call was number 1, 2 on the first batch"),
        (Later, "a second time on the windowed logits"),
    ],
)
def test_losses_that_come_and_go_are_refused(cls, match):
    with pytest.raises((RuntimeError, MisconfigurationException), match=match):
        fit(build(cls), 2)


class Swapped(heads.CodebooksModule):
    """Takes its heads in another order from the second batch on."""

    def loss(self, batch):
        x, pairs = self.states(batch), list(enumerate(self.heads))
        pairs = pairs[::-1] if self.trainer.fit_loop.total_batch_idx else pairs
        return sum(flat_loss(head(x), (batch + i) % VOCAB) for i, head in pairs) / len(pairs)


def test_heads_that_change_places_are_refused():
    with pytest.raises(RuntimeError, match="number 1 of this training step reads the logits of another head"):
        fit(build(Swapped), 2)


class Accuracy(heads.StackedModule):
    """Reads the logits that open heads make of all rows."""

    def loss(self, batch):
        x = self.states(batch)
        logits = torch.stack([head(x) for head in self.heads], dim=1)
        self.log("accuracy", (logits.argmax(-1) == heads.codes(batch).mT).float().mean())
        return F.cross_entropy(logits.movedim(-1, 1), heads.codes(batch).mT)


def test_what_reads_the_logits_of_open_heads_is_left_out_of_the_log():
    with pytest.warns(UserWarning, match="logs 'accuracy', which it computes of the logits by .*argmax"):
        run, _ = fit(build(Accuracy), 2)
    assert "accuracy" not in run.callback_metrics


class OtherLength(heads.WorldModelModule):
    """Has fewer rows from the second batch on."""

    def loss(self, batch):
        if not self.trainer.fit_loop.total_batch_idx:
            return super().loss(batch)
        x = self.states(batch)
        return flat_loss(self.heads[0](x[:, heads.OTHER_ROWS[:-1]]), batch[:, heads.OTHER_ROWS[:-1]])


def test_scattered_rows_are_those_of_the_first_batch():
    with pytest.raises(RuntimeError, match="take no rows out before the loss"):
        fit(build(OtherLength), 2)
