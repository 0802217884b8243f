# SPDX-License-Identifier: Apache-2.0
"""The dry run runs a training step and leaves no trace of it."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import CatMetric, MeanMetric

from reco_lightning.windowing.injection.dry_run import DryRun, InertOptimizer, StepEndedError


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.9)
        self.calls = 0
        self.lookup = None

    def forward(self, x):
        self.calls += 1
        self.lookup = torch.arange(3)
        self.fresh = "value"
        return self.layer(self.dropout(self.norm(x)))


class Module(pl.LightningModule):
    """Changes whatever a training step can change; ``step`` is what each test does besides."""

    def __init__(self, step=None, *, automatic=True):
        super().__init__()
        self.network = Network()
        self.teacher = nn.Linear(4, 3).requires_grad_(False)
        self.automatic_optimization = automatic
        self.step = step or (lambda module: None)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("empty", None)
        self.counter, self.name, self.note, self.kept = 0, "a", None, torch.zeros(1)
        self.history, self.table, self.seen, self.recent = [1], {"a": 1}, {1}, deque([1], maxlen=2)
        self.generators = torch.Generator().manual_seed(0), random.Random(0), np.random.default_rng(0)
        self.source, self.stdlib, self.numpy = self.generators

    def training_step(self, batch, batch_idx):
        x = batch + torch.randn(6, 4) * random.random() * np.random.rand()
        self.step(self)
        loss = F.cross_entropy(self.network(x), torch.zeros(6, dtype=torch.long))
        self.log("loss", loss)
        self.log_dict({"other": loss})
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def end(*args, **kwargs):
    raise StepEndedError


def dry_run(module, *, quiet=()):
    return DryRun(module, lambda: module.training_step(torch.ones(6, 4), 0), evaluated=list(quiet))


def snapshot(module):
    plain = {}
    for name, part in module.named_modules():
        skip = ("_parameters", "_buffers", "_modules", "generators", "source", "stdlib", "numpy")
        plain[name] = {key: copy.deepcopy(value) for key, value in vars(part).items() if key not in skip}
    return {
        "attributes": plain,
        "state": copy.deepcopy(module.state_dict()),
        "flags": [parameter.requires_grad for parameter in module.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "sources": (module.source.get_state(), module.stdlib.getstate(), module.numpy.bit_generator.state),
    }


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0) if isinstance(one, torch.Tensor) else None
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif not isinstance(one, torch.Tensor) and not callable(one):
        assert one == other or one is other


def disturb(module):
    module.scale.mul_(3)
    module.network.norm.running_mean = torch.full((4,), 9.0)
    module.empty = torch.ones(1)
    module.register_buffer("another", torch.ones(1), persistent=False)
    module.counter += 1
    module.name, module.note, module.kept, module.new = "b", torch.ones(1), 0.5, [1]
    module.history.append(2)
    module.table["b"] = 2
    module.seen.clear()
    module.recent.extend([2, 3])
    module.network.layer.requires_grad_(False)
    module.teacher.requires_grad_(True)
    module.network.eval()
    torch.rand(3, generator=module.source)
    module.stdlib.random()
    module.numpy.random()


@pytest.mark.parametrize("handler", [end, F.cross_entropy], ids=["ended", "whole"])
def test_a_run_leaves_no_trace(handler):
    module = Module(disturb)
    buffer = module.scale
    module.network.dropout.eval()
    before = snapshot(module)
    ended = dry_run(module, quiet=[module.network.norm]).run(handler)
    assert (ended is None) == (handler is end)
    assert_same(before, snapshot(module))
    assert module.scale is buffer
    assert module.empty is None
    assert not hasattr(module, "another")
    assert not hasattr(module.network, "fresh")


def test_an_exception_of_the_users_passes_through_and_leaves_no_trace():
    def fail(module):
        disturb(module)
        raise KeyError("mine")

    module = Module(fail)
    before = snapshot(module)
    with pytest.raises(KeyError, match="mine"):
        dry_run(module).run(end)
    assert_same(before, snapshot(module))


def test_no_except_of_the_users_holds_the_end_up():
    module = Module()

    def step():
        try:
            module.training_step(torch.ones(6, 4), 0)
        except Exception:
            pytest.fail("caught")

    assert DryRun(module, step, evaluated=[]).run(end) is None


@pytest.mark.parametrize("existing", [False, True])
def test_gradients_are_put_back(existing):
    def step(module):
        module.network.layer(torch.ones(1, 4)).sum().backward()

    module = Module(step)
    if existing:
        module.network.layer(torch.ones(1, 4)).sum().backward()
    before = snapshot(module)
    dry_run(module).run(end)
    assert (module.network.layer.weight.grad is not None) == existing
    assert_same(before, snapshot(module))


def test_two_runs_are_equal_and_without_dropout():
    module = Module()
    logits = []

    def keep(*args, **kwargs):
        logits.append(args[0])
        raise StepEndedError

    stage = dry_run(module, quiet=[module.network.norm])
    stage.run(keep)
    stage.run(keep)
    assert torch.equal(*logits)
    mean = module.network.norm.running_mean  # in evaluation mode: not those of the batch
    x = torch.ones(6, 4)
    with torch.random.fork_rng():
        state, other = random.getstate(), np.random.get_state()
        x = x + torch.randn(6, 4) * random.random() * np.random.rand()
        random.setstate(state)
        np.random.set_state(other)
    expected = module.network.layer((x - mean) / (1 + module.network.norm.eps) ** 0.5)
    torch.testing.assert_close(logits[0], expected)


def test_attention_has_no_dropout():
    q = torch.randn(1, 2, 5, 4)
    seen = []

    def step(module):
        seen.append(F.scaled_dot_product_attention(q, q, q, dropout_p=0.9, is_causal=True))
        seen.append(F.scaled_dot_product_attention(q, q, q, None, 0.9, True))
        multi = nn.MultiheadAttention(4, 1, dropout=0.9, batch_first=True)
        seen.append(multi(q[0], q[0], q[0], need_weights=False)[0])
        seen.append(multi.eval()(q[0], q[0], q[0], need_weights=False)[0])

    dry_run(Module(step)).run(end)
    plain = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(seen[0], plain)
    torch.testing.assert_close(seen[1], plain)
    torch.testing.assert_close(seen[2], seen[3])


def test_logging_and_warnings_are_muted():
    def step(module):
        module.log("early", 1.0)  # without a trainer this is an error outside
        warnings.warn("once", stacklevel=1)

    module = Module(step)
    dry_run(module).run(F.cross_entropy)
    assert "log" not in vars(module)
    own = vars(module)["log"] = lambda *args, **kwargs: None
    dry_run(module).run(F.cross_entropy)
    assert vars(module)["log"] is own


def manual(module):
    optimizer = module.optimizers()
    scheduler = module.lr_schedulers()
    for group in optimizer.param_groups:
        module.rates.append(group["lr"])
        group["lr"] = 7.0
    with optimizer.toggle_model():
        module.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        module.manual_backward(module.network.layer.weight.sum())
        module.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        optimizer.step(closure=lambda: module.closures.append(1))
        module.untoggle_optimizer(optimizer)
    if scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize("attached", [False, True])
def test_manual_optimisation_is_inert(attached):
    module = Module(manual, automatic=False)
    rates, closures = [], []
    object.__setattr__(module, "rates", _Box(rates))
    object.__setattr__(module, "closures", _Box(closures))
    optimizer = module.configure_optimizers()
    if attached:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        configs = [SimpleNamespace(scheduler=scheduler)]
        module._trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=configs)
    else:
        module.configure_optimizers = lambda: optimizer
    rate = optimizer.param_groups[0]["lr"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert dry_run(module).run(end) is None
    assert rates == [rate]
    assert closures == [1]
    assert optimizer.param_groups[0]["lr"] == rate
    assert_same(before, dict(module.state_dict()))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert "optimizers" not in vars(module)


class _Box:
    """Takes notes that the dry run does not know how to take back."""

    def __init__(self, notes):
        self.append = notes.append


def optimizer_of(module, cls=torch.optim.SGD):
    return cls(module.parameters(), lr=0.1)


def schedule(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


FORMS = {
    "one": (lambda m: optimizer_of(m), 1, 0),
    "dict": (lambda m: {"optimizer": (o := optimizer_of(m)), "lr_scheduler": schedule(o)}, 1, 1),
    "two": (lambda m: [optimizer_of(m), optimizer_of(m)], 2, 0),
    "lists": (lambda m: ([o := optimizer_of(m)], [schedule(o)]), 1, 1),
    "two lists": (lambda m: ([o := optimizer_of(m), optimizer_of(m)], [schedule(o), schedule(o)]), 2, 2),
    "dicts": (lambda m: ({"optimizer": optimizer_of(m)}, {"optimizer": optimizer_of(m)}), 2, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_there_are_as_many_stand_ins_as_optimizers_and_schedulers(form):
    configure, optimizers, schedulers = FORMS[form]
    seen = {}

    def step(module):
        seen["optimizers"], seen["schedulers"] = module.optimizers(), module.lr_schedulers()

    module = Module(step, automatic=False)
    module.configure_optimizers = lambda: configure(module)
    dry_run(module).run(end)
    for name, number in (("optimizers", optimizers), ("schedulers", schedulers)):
        found = seen[name]
        assert (0 if found is None else len(found) if isinstance(found, list) else 1) == number
        assert not isinstance(found, list) or number > 1


def test_an_inert_optimizer_shows_values_and_does_nothing():
    layer = nn.Linear(2, 2)
    inert = InertOptimizer(optimizer_of(layer))
    assert inert.defaults["lr"] == 0.1
    assert inert.param_groups[0]["params"][0] is layer.weight
    assert inert.zero_grad(set_to_none=True) is None
    assert inert.add_param_group({}) is None
    assert inert.whatever() is None
    assert InertOptimizer().param_groups == []


def test_a_step_that_changes_weights_is_an_error_that_names_them():
    def step(module):
        disturb(module)
        with torch.no_grad():
            module.teacher.weight.mul_(0.9)

    module = Module(step)
    before = snapshot(module)
    with pytest.raises(
        RuntimeError, match=r"changes weights before its cross-entropy: teacher\.weight; change them in on_"
    ):
        dry_run(module).run(end)
    after = snapshot(module)
    for kept in (before, after):
        kept["state"].pop("teacher.weight")
    assert_same(before, after)  # all else is put back even so


def test_metrics_of_the_module_count_no_dry_run():
    def step(module):
        module.network.mean.update(torch.ones(3))
        module.network.largest(torch.tensor([4.0, 2.0]))

    module = Module(step)
    module.network.mean, module.network.largest = MeanMetric(), CatMetric()
    module.network.mean.update(torch.tensor(3.0))
    dry_run(module).run(F.cross_entropy)
    assert module.network.mean.compute() == 3
    assert module.network.mean.weight == 1
    assert module.network.largest.update_count == 0
    assert module.network.largest.value == []
