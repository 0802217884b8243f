# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss makes the logits, a few rows at a time, against the same steps with all logits of the windows."""

from __future__ import annotations

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reco_lightning.windowing.losses.cross_entropy
from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.losses.chunked_cross_entropy import linear_cross_entropy
from tests.helpers import foreign
from tests.helpers.foreign import BLOCKS, MODULES, PER_BLOCK, TOKENS, VOCAB, batches, trainer

CHUNK = 7 * VOCAB  # rows of a chunk, which is no divisor of a window's
LAST = {"window_blocks": 3, "stride_blocks": 2, "first_window_prob": 1e-9}  # one window: one graph to compile


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Makes chunks small, and counts the losses that are made so."""
    calls = []

    def small(*args, **kwargs):
        calls.append(1)
        return linear_cross_entropy(*args, **kwargs, chunk_elements=CHUNK)

    monkeypatch.setattr(reco_lightning.windowing.losses.cross_entropy, "linear_cross_entropy", small)
    return calls


def build(cls, **options):
    torch.manual_seed(3)
    return cls(**options)


def sampler(**options):
    return WindowSampler(BLOCKS, PER_BLOCK, **options)


def weights_after(module, callback, **options):
    trainer(callback, **options).fit(module, batches())
    return dict(module.named_parameters())


def assert_same_training(module, callback, chunks, *, used=True, atol=2e-6, **options):
    """A fit with the chunked loss ends as one with all logits, and the loss was chunked where it should be."""
    other = copy.deepcopy(module)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    own = weights_after(module, callback(chunked_loss=True), **options)
    assert bool(chunks) == used
    chunks.clear()
    expected = weights_after(other, callback(chunked_loss=False), **options)
    assert not chunks
    assert any(not torch.equal(before[name], value) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(
            own[name], value, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


class Own(foreign.Base):
    """The usual step, with options of the cross-entropy."""

    def __init__(self, loss=None, **options):
        super().__init__(**options)
        self.loss = loss or {}

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        loss = F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), **self.loss)
        return loss.mean() if loss.ndim else loss / (ids[:, 1:].numel() if self.loss.get("reduction") == "sum" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("context", ["frozen", "keys", "attached", "dropped"])
def test_every_context(context, groups, chunks):
    callback = partial(ReCoCallback, sampler(), context=context, windows_per_batch=groups)
    assert_same_training(build(Own), callback, chunks)


@pytest.mark.parametrize("engine", ["frozen", "prefix", "masked"])
def test_every_engine(engine, chunks):
    assert_same_training(build(Own), partial(ReCoCallback, sampler(), engine=engine), chunks)


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("blocks", [2, BLOCKS])
def test_every_form_of_step(cls, blocks, chunks):
    # those that copy the logits, smooth the loss or leave it unreduced need all of them
    used = cls in (foreign.LossInside, foreign.PrefixAndTokenizer, foreign.ManualOptimisation)
    used = used or (cls is foreign.ShiftedInput)
    callback = partial(ReCoCallback, sampler(window_blocks=blocks))
    assert_same_training(build(cls), callback, chunks, used=used)


@pytest.mark.parametrize(
    ("loss", "used"),
    [
        ({"reduction": "sum"}, True),
        ({"reduction": "none"}, False),
        ({"ignore_index": 3}, True),
        ({"ignore_index": 3, "reduction": "sum"}, True),
        ({"label_smoothing": 0.1}, False),
        ({"label_smoothing": 0.0, "weight": None}, True),
        ({"weight": torch.linspace(0.5, 2, VOCAB)}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [2, BLOCKS])
def test_every_option_of_the_loss(loss, used, blocks, chunks):
    callback = partial(ReCoCallback, sampler(window_blocks=blocks))
    assert_same_training(build(Own, loss=loss), callback, chunks, used=used)


def test_a_whole_window_is_plain_training(chunks):
    plain, windowed = build(Own), build(Own)
    trainer().fit(plain, batches())
    callback = ReCoCallback(sampler(window_blocks=BLOCKS), continuity_weight=0.0)
    trainer(callback).fit(windowed, batches())
    assert chunks
    for (name, value), own in zip(plain.named_parameters(), windowed.parameters(), strict=True):
        torch.testing.assert_close(own, value, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [{"continuity_balanced": True}, {"loss_aware": 1.0}], ids=str)
def test_options_beyond_the_paper(options, chunks):
    assert_same_training(build(Own), partial(ReCoCallback, sampler(), windows_per_batch=2, **options), chunks)


def test_losses_of_groups(chunks, monkeypatch):
    """Those that draw the next windows: of each group's window alone."""
    found = {}
    run = Injection.run

    def watched(injection, *args, **kwargs):
        result, report = run(injection, *args, **kwargs)
        found.setdefault(injection.engine.heads[0].deferred, []).append(report.losses)
        return result, report

    monkeypatch.setattr(Injection, "run", watched)
    for chunked in (True, False):
        callback = ReCoCallback(sampler(), windows_per_batch=2, loss_aware=1.0, chunked_loss=chunked)
        trainer(callback).fit(build(Own), batches())
    for own, expected in zip(found[True], found[False], strict=True):
        assert [window for window, _ in own] == [window for window, _ in expected]
        assert [float(loss) for _, loss in own] == pytest.approx([float(loss) for _, loss in expected], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision, chunks):
    atol = {"bf16-mixed": 2e-3, "bf16-true": 2e-2, "64-true": 1e-9}[precision]
    assert_same_training(build(Own), partial(ReCoCallback, sampler()), chunks, atol=atol, precision=precision)


class Scaled(nn.Linear):
    """A head that is more than a linear layer."""

    def forward(self, states):
        return super().forward(states) * 2


def watched_head():
    head = nn.Linear(foreign.DIM, VOCAB, bias=False)
    head.register_forward_hook(lambda *_: None)
    return head


def own_forward():
    head = nn.Linear(foreign.DIM, VOCAB)
    forward = head.forward
    head.forward = lambda states: forward(states) * 2
    return head


@pytest.mark.parametrize(
    ("head", "used"),
    [
        (lambda: nn.Linear(foreign.DIM, VOCAB), True),
        (lambda: nn.Linear(foreign.DIM, VOCAB).requires_grad_(False), True),
        (lambda: Scaled(foreign.DIM, VOCAB), False),
        (watched_head, False),
        (own_forward, False),
    ],
    ids=["bias", "not-trained", "another-class", "hooked", "own-forward"],
)
def test_heads(head, used, chunks):
    module, other = build(Own), build(Own)
    for each in (module, other):
        torch.manual_seed(4)
        each.net.lm_head = head()
    own = weights_after(module, ReCoCallback(sampler()))
    assert bool(chunks) == used
    expected = weights_after(other, ReCoCallback(sampler(), chunked_loss=False))
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, atol=2e-6, rtol=1e-4)


def test_a_head_that_shares_the_embeddings_weight(chunks):
    module = build(Own)
    module.net.lm_head.weight = module.net.wte.weight
    assert_same_training(module, partial(ReCoCallback, sampler()), chunks)


def test_logits_that_are_changed_in_place_are_all_made(chunks):
    class Cooled(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            logits = self.net(ids[:, :-1])
            logits /= 2
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    assert_same_training(build(Cooled), partial(ReCoCallback, sampler()), chunks, used=False)


COPIES = {
    "float": lambda logits: logits.float(),
    "to": lambda logits: logits.to(torch.float32),
    "type": lambda logits: logits.type(torch.float32),
    "like": lambda logits: logits.to(torch.zeros(1)),
    "clone": lambda logits: logits.clone(),
    "twice": lambda logits: logits.float().double()[..., :].contiguous(),
}


class Copying(Own):
    """transformers' form: logits of all rows in float32, shifted by a copy."""

    copy = staticmethod(lambda logits: logits.float())

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        logits = self.copy(self.net(ids))
        shifted = logits[..., :-1, :].contiguous()
        return F.cross_entropy(shifted.view(-1, VOCAB), ids[:, 1:].reshape(-1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("copy_", COPIES.values(), ids=COPIES)
def test_copies_of_the_logits_are_never_made(copy_, precision, chunks):
    class Module(Copying):
        copy = staticmethod(copy_)

    atol = 2e-6 if precision == "32-true" else 2e-3
    assert_same_training(build(Module), partial(ReCoCallback, sampler()), chunks, atol=atol, precision=precision)


@pytest.mark.parametrize(
    "change",
    [lambda logits: logits * 1.0, lambda logits: logits.float() / 1.0, lambda logits: logits.clone().mul_(1.0)],
    ids=["times", "over", "in-place"],
)
def test_a_change_that_changes_nothing_yet_is_no_copy(change, chunks):
    class Module(Copying):
        copy = staticmethod(change)

    assert_same_training(build(Module), partial(ReCoCallback, sampler()), chunks, used=False)


def test_tensors_of_the_steps_own_are_copied_as_ever(chunks):
    class Masked(Copying):
        def training_step(self, batch, batch_idx):
            mask = torch.ones(1, 1).expand(2, 3).float().contiguous().clone()
            mask[:, 0] = 0
            assert mask.sum() == 4
            return super().training_step(batch, batch_idx)

    assert_same_training(build(Masked), partial(ReCoCallback, sampler()), chunks)


@pytest.mark.slow
def test_a_compiled_loss_makes_all_logits(chunks):
    module = build(Copying)
    module.net = torch.compile(module.net, backend="eager")
    assert_same_training(module, partial(ReCoCallback, sampler(**LAST)), chunks, used=False)


@pytest.mark.parametrize("scale", [None, 2.0**12], ids=["plain", "scaled"])
def test_gradient_scaling(scale, chunks):
    """As a scaler of half precision has it: the loss times a number, gradients divided by it."""

    class Times(Own):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (scale or 1.0)

        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale or 1.0

    assert_same_training(build(Times), partial(ReCoCallback, sampler()), chunks)


class Largest(TorchDispatchMode):
    """The most elements of a result whose last dimension is the vocabulary."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (VOCAB,) and any(leaf.stride()):
                if leaf.shape == (foreign.DIM, VOCAB):  # the head's weight, transposed
                    continue
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("blocks", [2, BLOCKS])
@pytest.mark.parametrize("cls", [Own, Copying])
def test_logits_of_a_window_never_exist(cls, blocks, chunked):
    module, ids = build(cls), next(iter(batches()))[0]
    callback = ReCoCallback(sampler(window_blocks=blocks), chunked_loss=chunked)

    def step():
        return module.training_step([ids], 0)

    selection = callback.settings.select(module, step)
    injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
    selection.engine.install()
    try:
        with Largest() as seen:
            injection.run([callback.settings.sampler.windows[-1]], step)[0].backward()
    finally:
        selection.engine.remove()
    window = len(ids) * min(blocks * PER_BLOCK, TOKENS - (cls is Own)) * VOCAB
    assert seen.elements == (CHUNK if chunked else window)


@pytest.mark.slow
def test_a_compiled_network(chunks):
    module = build(Own)
    compiled = copy.deepcopy(module)
    compiled.net = torch.compile(compiled.net, backend="eager")
    own = weights_after(compiled, ReCoCallback(sampler(**LAST)))
    assert chunks
    expected = weights_after(module, ReCoCallback(sampler(**LAST), chunked_loss=False))
    for value, other in zip(own.values(), expected.values(), strict=True):
        torch.testing.assert_close(value, other, atol=2e-6, rtol=1e-4)


def test_the_module_needs_no_logits_elsewhere(chunks):
    """What a step computes from the logits besides is NaN, as it was: a wrong use cannot pass unseen."""
    seen = []

    class Measured(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            logits = self.net(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            seen.append(logits.detach().mean().item())
            return loss

    pl.seed_everything(0)
    weights_after(build(Measured), ReCoCallback(sampler()))
    assert chunks
    assert all(value != value for value in seen[-2:])


class Later(Own):
    """A step that is another from the second batch on."""

    def change(self, logits, ids):
        return logits, ids

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        logits, ids = self.net(ids[:, :-1]), ids[:, 1:]
        if self.trainer.global_step:
            logits, ids = self.change(logits, ids)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def test_a_step_that_takes_other_rows_later_is_refused():
    def change(module, logits, ids):
        return logits[:, :-3], ids[:, :-3]

    module = build(type("Module", (Later,), {"change": change}))
    with pytest.raises(RuntimeError, match=r"given 29 of 29 rows .* and 26 of 29 now"):
        weights_after(module, ReCoCallback(sampler()))


@pytest.mark.parametrize("chunked", [True, False])
def test_another_loss_of_the_logits_is_refused(chunked):
    class Penalised(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            logits = self.net(ids[:, :-1])
            penalty = logits.logsumexp(dim=-1).square().mean()
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + penalty

    module = build(Penalised)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"besides the cross-entropy of the head .*logsumexp, square"):
        weights_after(module, ReCoCallback(sampler(), chunked_loss=chunked))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_head_with_other_weights_for_one_call(chunks):
    """``functional_call`` puts the module's own weights back before the loss is met."""

    class Halved(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            weights = {name: value * 0.5 for name, value in self.net.named_parameters()}
            logits = torch.func.functional_call(self.net, weights, (ids[:, :-1],))
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    assert_same_training(build(Halved), partial(ReCoCallback, sampler()), chunks)


@pytest.mark.parametrize("head_under_autocast", [True, False])
def test_the_head_multiplies_in_the_type_of_its_own_call(head_under_autocast, chunks, monkeypatch):
    """Not in that of autocast where the loss is computed."""

    class Module(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            with torch.autocast("cpu", torch.bfloat16, enabled=head_under_autocast):
                logits = self.net(ids[:, :-1])
            with torch.autocast("cpu", torch.bfloat16, enabled=not head_under_autocast):
                return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    seen = set()
    small = reco_lightning.windowing.losses.cross_entropy.linear_cross_entropy

    def watched(states, weight, *args, **kwargs):
        seen.update((states.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return small(states, weight, *args, **kwargs)

    monkeypatch.setattr(reco_lightning.windowing.losses.cross_entropy, "linear_cross_entropy", watched)
    assert_same_training(build(Module), partial(ReCoCallback, sampler()), chunks, atol=2e-3)
    assert seen == {torch.bfloat16 if head_under_autocast else torch.float32, False}


@pytest.mark.parametrize("chunked", [True, False])
def test_a_balanced_term_on_a_whole_window(chunked):
    module = build(Own)
    before = copy.deepcopy(module.state_dict())
    callback = ReCoCallback(sampler(window_blocks=BLOCKS), continuity_balanced=True, chunked_loss=chunked)
    assert any(not torch.equal(value, before[name]) for name, value in weights_after(module, callback).items())


def test_a_copy_that_is_none_in_the_plain_step_is_none_of_a_placeholder(chunks):
    class Whole(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            logits = self.net(ids[:, :-1]).contiguous()
            return F.cross_entropy(logits.view(-1, VOCAB), ids[:, 1:].flatten())

    assert_same_training(build(Whole), partial(ReCoCallback, sampler()), chunks)


def test_copies_are_made_before_the_loss_where_all_logits_are(chunks):
    """In the type that the caller asked for."""
    seen = []

    class Module(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            logits = self.net(ids[:, :-1]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
            seen.append(loss.dtype)
            return loss

    weights_after(build(Module), ReCoCallback(sampler(), continuity_weight=0.0), precision="bf16-true")
    assert not chunks
    assert set(seen) == {torch.float32}


def test_a_loss_under_checkpoint_is_refused():
    class Module(Own):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            states = self.net.wte(ids[:, :-1])
            for layer in self.net.h:
                states = layer(states)

            def loss(states):
                return F.cross_entropy(self.net.lm_head(states).flatten(0, 1), ids[:, 1:].flatten())

            return torch.utils.checkpoint.checkpoint(loss, states, use_reentrant=False)

    with pytest.raises(MisconfigurationException, match=r"cross_entropy runs under torch\.utils"):
        weights_after(build(Module), ReCoCallback(sampler()))
