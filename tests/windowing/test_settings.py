# SPDX-License-Identifier: Apache-2.0
"""Every network of the settings table against every promise of the callback, inside real fits."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision

from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.losses.continuity import Continuity
from tests.helpers.distributed import CASES
from tests.helpers.foreign import trainer
from tests.helpers.networks.common import BATCH, BLOCKS, PER_BLOCK, RATES, quieten
from tests.helpers.networks.references import reference_gradients, see_loss
from tests.helpers.settings import CONDITIONS, REFUSALS, SETTINGS, WINDOWS, support_matrix, tried

pytestmark = [
    pytest.mark.slow,
    pytest.mark.third_party,
    # Lightning's word on a frozen tokenizer.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
]

WHOLE = WindowSampler(BLOCKS, PER_BLOCK, window_blocks=BLOCKS)
SINGLE = WindowSampler(BLOCKS, PER_BLOCK, window_blocks=1)
STEPS = 3
WEIGHT = 0.5


def over(settings):
    present = [
        pytest.param(setting, id=setting.name, marks=pytest.mark.skipif(bool(setting.missing), reason=setting.missing))
        for setting in settings
    ]
    return pytest.mark.parametrize("setting", present)


every = over(SETTINGS)


def has_dropout(setting):
    rates = [vars(part).get(name) for part in setting.make().modules() for name in RATES]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def compile_network(setting, module):
    module.get_submodule(setting.compiled).compile(backend="aot_eager")


def patched(module):
    return [name for name, part in module.named_modules() if {"forward", "training_step"} & set(vars(part))]


def evaluate(module, batch):
    """The plain loss in evaluation mode; the module is left as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    with torch.no_grad():
        loss = float(module.loss(batch))
    for part, mode in modes:
        part.training = mode
    return loss


class Probe(pl.Callback):
    """Seeds every step and notes its gradients, and on demand the module before it and what copies in its midst are."""

    def __init__(self, batch, *, modules):
        self.batch, self.modules = batch, modules
        self.before, self.gradients = [], []
        self.plain = self.copied = self.unpickled = self.inside = self.keys = self.copies_patched = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 + batch_idx)
        if self.modules:
            self.before.append(copy.deepcopy(pl_module))
        self.gradients.append({})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients[-1].update(found)
        if self.batch is None or self.copied is not None:
            return
        self.inside, self.keys = patched(pl_module), list(pl_module.state_dict())
        copied, unpickled = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))
        parts = [part for copied_module in (copied, unpickled) for part in copied_module.modules()]
        self.copies_patched = any(isinstance(value, PatchedMethod) for part in parts for value in vars(part).values())
        self.plain, self.copied, self.unpickled = (evaluate(m, self.batch) for m in (self.before[0], copied, unpickled))


@dataclass
class Fit:
    module: pl.LightningModule
    probe: Probe
    callback: ReCoCallback | None
    validation: float


def run(
    setting,
    sampler=None,
    *,
    quiet=True,
    prepare=None,
    choice=None,
    precision="32-true",
    plugins=None,
    modules=False,
    copies=False,
    steps=STEPS,
    **options,
):
    module = quieten(setting.make()) if quiet else setting.make()
    if prepare is not None:
        prepare(module)
    probe = Probe(setting.draw(9) if copies else None, modules=modules)
    callback = None if sampler is None else ReCoCallback(sampler, **({"continuity_weight": WEIGHT} | options))
    if choice is not None:
        callback.load_state_dict({"choice": choice})
    batches = torch.utils.data.DataLoader([setting.draw(seed) for seed in range(steps)], batch_size=None)
    validation = torch.utils.data.DataLoader([setting.draw(9)], batch_size=None)
    how = {"precision": precision} if plugins is None else {"plugins": plugins}
    fit = trainer(*([probe] if callback is None else [probe, callback]), num_sanity_val_steps=0, **how)
    torch.manual_seed(1)
    fit.fit(module, batches, validation)
    return Fit(module, probe, callback, float(fit.callback_metrics["val"]))


@lru_cache(None)
def windowed(setting):
    return run(setting, WINDOWS, modules=True, copies=True)


@lru_cache(None)
def plain(setting):
    return run(setting, quiet=False)


@lru_cache(None)
def reduced(setting):
    """Windows with dropout in bf16-mixed, by a callback that has resumed."""
    return run(setting, WINDOWS, quiet=False, precision="bf16-mixed", choice=windowed(setting).callback._choice)


def assert_weights(own, other, **tolerance):
    for (name, a), b in zip(own.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@every
def test_the_expected_engine_is_chosen_and_a_resumed_run_keeps_it(setting):
    choice = windowed(setting).callback.state_dict()["choice"]
    found = {name: choice[name] for name in ("engine", "blocks", "head", "tail")}
    assert found == {"engine": setting.engine, "blocks": setting.blocks, "head": setting.head, "tail": setting.tail}
    assert reduced(setting).callback.state_dict()["choice"] == choice


@every
def test_window_logits_are_the_plain_forwards_and_losses_average_to_its_loss(setting):
    module, batch = quieten(setting.make()), setting.draw(0)
    selection = ReCoCallback(SINGLE).settings.select(module, lambda: module.training_step(batch, 0))
    injection = Injection(selection.engine, selection.trace, Continuity(0.0))

    def measure(window):
        torch.manual_seed(5)
        if window is None:
            return see_loss(module, batch, BATCH)
        selection.engine.activate([window], inference=True)
        with torch.no_grad():
            _, seen = see_loss(module, batch, BATCH, handlers=selection.engine.handlers)
        torch.manual_seed(5)
        loss, report = injection.run([window], lambda: module.loss(batch))
        selection.engine.deactivate()
        torch.testing.assert_close(report.cross_entropy, loss.detach())
        return report.parts or [report.cross_entropy], seen

    _, full = measure(None)
    selection.engine.install()
    totals, counts = [0.0] * len(full), [0.0] * len(full)
    try:
        for window in SINGLE.windows:
            losses, seen = measure(window)
            for index, (loss, call, plain_call) in enumerate(zip(losses, seen, full, strict=True)):
                rows = plain_call.rows(window)
                outside = torch.ones(call.logits.shape[1], dtype=torch.bool).index_fill(0, rows, False)
                assert call.logits[:, outside].isnan().all()
                torch.testing.assert_close(call.logits[:, rows], plain_call.logits[:, rows], atol=2e-5, rtol=1e-5)
                share = float(plain_call.weights[:, rows].sum())
                totals[index] += share * float(loss)
                counts[index] += share
    finally:
        selection.engine.remove()
    for call, total, count in zip(full, totals, counts, strict=True):
        options = {name: value for name, value in call.options.items() if name != "reduction"}
        # of log-probabilities it is their negative log-likelihood
        expected = F.cross_entropy(call.logits.flatten(0, 1), call.target.flatten(), **options)
        assert total / count == pytest.approx(float(expected.detach()), abs=1e-5)


@every
def test_a_whole_window_without_continuity_is_plain_training(setting):
    whole = run(setting, WHOLE, quiet=False, continuity_weight=0.0, chunked_loss=False)
    assert_weights(whole.module, plain(setting).module, atol=setting.tolerance, rtol=0)
    assert whole.validation == pytest.approx(plain(setting).validation, rel=0, abs=setting.tolerance)


def assert_gradients(setting, fit, step):
    """One step of a fit against the setting's reference."""
    module, batch, window = fit.probe.before[step], setting.draw(step), WINDOWS.sample(step)
    expected = reference_gradients(setting, module, batch, BATCH, window, WEIGHT, 100 + step)
    for name, gradient in expected.items():
        own = fit.probe.gradients[step].get(name, torch.zeros(()).expand_as(gradient))
        text = partial("step {}, {}: {}".format, step, name)
        torch.testing.assert_close(own, gradient, atol=2e-6, rtol=1e-4, msg=text)
    return max(float(gradient.abs().max()) for gradient in expected.values())


@every
def test_gradients_equal_those_with_the_context_cut_off(setting):
    windows = [WINDOWS.sample(step) for step in range(STEPS)]
    assert len(set(windows)) == STEPS
    assert min(windows).start == 0
    assert max(assert_gradients(setting, windowed(setting), step) for step in range(STEPS)) > 1e-3


@over([setting for setting in SETTINGS if setting.keys])
def test_gradients_of_trained_keys_equal_those_with_block_inputs_detached(setting):
    fit = run(setting, WINDOWS, context="keys", modules=True, steps=2)
    detached = replace(setting, reference="states")
    assert max(assert_gradients(detached, fit, step) for step in range(2)) > 1e-3


@every
def test_validation_keys_and_module_are_as_without_the_callback(setting):
    own, other = windowed(setting), plain(setting)
    assert own.validation == pytest.approx(evaluate(own.module, setting.draw(9)), abs=1e-6)
    assert own.probe.keys == list(own.module.state_dict()) == list(other.module.state_dict())
    assert own.probe.inside
    assert patched(own.module) == []
    for a, b in zip(own.module.modules(), other.module.modules(), strict=True):
        assert set(vars(a)) == set(vars(b))
        assert a.training == b.training
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert len(getattr(a, kind)) == len(getattr(b, kind))
    flags = [[p.requires_grad for p in fit.module.parameters()] for fit in (own, other)]
    assert flags[0] == flags[1]


@every
def test_copies_made_during_a_step_are_the_plain_module(setting):
    probe = windowed(setting).probe
    assert not probe.copies_patched
    assert probe.copied == pytest.approx(probe.plain, abs=1e-6)
    assert probe.unpickled == pytest.approx(probe.plain, abs=1e-6)


@over([setting for setting in SETTINGS if setting.missing or has_dropout(setting)])
def test_dropout_acts_in_windows(setting):
    with_dropout = run(setting, WINDOWS, quiet=False)
    assert all(value.isfinite().all() for value in with_dropout.module.parameters())
    gradients = [fit.probe.gradients[-1] for fit in (with_dropout, windowed(setting))]
    assert any(not torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])


@over(tried("bf16-mixed"))
def test_bf16_mixed_trains(setting):
    before, module = setting.make(), reduced(setting).module
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), module.parameters(), strict=True)]
    assert all(value.isfinite().all() for value in module.parameters())
    assert sum(changed) > len(changed) // 2


@over(tried("16-mixed"))
def test_16_mixed_with_a_loss_scaler_trains(setting):
    # Lightning itself has no 16-mixed on a CPU, torch has its two parts
    scaled = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    before, module = setting.make(), run(setting, WINDOWS, plugins=[scaled], steps=2).module
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), module.parameters(), strict=True)]
    assert all(value.isfinite().all() for value in module.parameters())
    assert sum(changed) > len(changed) // 2


@over(tried("checkpointing"))
def test_activation_checkpointing_changes_nothing(setting):
    checkpointed = run(setting, WINDOWS, prepare=setting.checkpoint)
    assert_weights(checkpointed.module, windowed(setting).module, atol=1e-6, rtol=1e-5)


@over(tried("compile"))
def test_a_compiled_network_trains_alike(setting):
    torch._dynamo.reset()
    compiled = run(setting, WINDOWS, prepare=partial(compile_network, setting), steps=1)
    for name, gradient in windowed(setting).probe.gradients[0].items():
        torch.testing.assert_close(compiled.probe.gradients[0][name], gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("condition", ["ddp", "fsdp2"])
def test_what_the_table_calls_distributed_is_a_case_of_its_tests(condition):
    assert tried(condition)
    assert {setting.distributed for setting in tried(condition)} <= set(CASES)


def test_the_matrix_has_a_row_for_every_setting_and_refusal():
    rows = [line.strip("| \n").split(" | ") for line in support_matrix().splitlines()]
    assert {len(row) for row in rows} == {3 + len(CONDITIONS)}
    assert [row[0] for row in rows[2:]] == [entry.shape for entry in (*SETTINGS, *REFUSALS)]
    assert len({(row[0], row[2]) for row in rows}) == len(rows)
    assert {cell for row in rows[2:] for cell in row[3:]} == {"works", "not tried", "-"}
    assert [row[1] for row in rows[2 + len(SETTINGS) :]] == ["refused"] * len(REFUSALS)


def test_the_documentation_holds_the_matrix_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    _, _, rest = page.partition("<!-- matrix -->\n")
    written, _, _ = rest.partition("<!-- end of matrix -->")
    assert written.strip() == support_matrix().strip(), "run: python -m tests.helpers.settings"
