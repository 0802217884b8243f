# SPDX-License-Identifier: Apache-2.0
"""Modules and trainers of ``pytorch_lightning`` train as those of ``lightning.pytorch`` do, to the same weights."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, ReCoMixin, VideoTransformer, WindowSampler, explain, generate
from reco_lightning.callbacks.stop_on_signal import StopOnSignal
from tests.helpers.foreign import BLOCKS, PER_BLOCK, VOCAB, Network, batches
from tests.helpers.processes import finish, launched

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, seed=3)
PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


@pytest.fixture(autouse=True)
def logger_of_messages(monkeypatch):
    """The other package takes it over when it is imported."""
    monkeypatch.setattr(rank_zero_module, "log", rank_zero_module.log)


def module_of(package, *bases):
    lightning = importlib.import_module(package)

    class Module(*bases, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Network()

        def training_step(self, batch, batch_idx):
            (ids,) = batch
            loss = F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module()


def trainer_of(package, callback, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 2, "accelerator": "cpu"}
    return importlib.import_module(package).Trainer(callbacks=[callback], **quiet | options)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"num_sanity_val_steps": 2, "check_val_every_n_epoch": 1},
    ],
    ids=str,
)
def test_both_packages_train_to_the_same_weights_and_logs(options):
    found = []
    for package in PACKAGES:
        module = module_of(package)
        trainer = trainer_of(package, ReCoCallback(WINDOWS), **options)
        trainer.fit(module, batches(), batches(count=1))
        found.append((weights(module), {name: float(value) for name, value in trainer.callback_metrics.items()}))
    assert found[0][1] == found[1][1]
    assert {"reco/cross_entropy", "train/loss", "val/loss"} <= set(found[0][1])
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())


def test_explain_and_generate_take_both():
    batch = next(iter(batches()))
    own, other = (explain(module_of(package), batch, ReCoCallback(WINDOWS)) for package in PACKAGES)
    assert own == other

    class Video(importlib.import_module("pytorch_lightning").LightningModule):
        def __init__(self):
            super().__init__()
            self.network = VideoTransformer(vocab_size=VOCAB, grid=(2, 1, 2), dim=16, depth=1, heads=2)

    assert generate(Video(), 2).shape == (2, 4)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_mixin_works_in_modules_of_both(package):
    module = module_of(package, ReCoMixin)
    module.init_reco(WINDOWS, network="net")
    (ids,) = next(iter(batches()))
    step = module.windowed(module.net, ids[:, :-1], targets=ids, step=0)
    loss = F.cross_entropy(step.logits, step.targets)
    loss.backward()
    assert loss.isfinite()
    assert len(step.targets) < ids.numel()
    module.remove_reco()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_is_resumed_in_both(package, tmp_path):
    whole, module = module_of(package), module_of(package)
    trainer_of(package, ReCoCallback(WINDOWS)).fit(whole, batches())
    first = trainer_of(package, ReCoCallback(WINDOWS), max_epochs=1)
    first.fit(module, batches())
    first.save_checkpoint(tmp_path / "first.ckpt")
    other = module_of(package)
    trainer_of(package, ReCoCallback(WINDOWS)).fit(other, batches(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(whole).items())


def test_a_signal_ends_a_run_of_either_by_its_own_exception():
    for package in PACKAGES:
        exceptions = importlib.import_module(f"{package}.utilities.exceptions")
        trainer = trainer_of(package, StopOnSignal())
        with pytest.raises(exceptions.SIGTERMException):
            StopOnSignal()._end(trainer, "here")


def test_module_and_trainer_of_two_packages_are_refused_by_lightning():
    for package, other in (PACKAGES, PACKAGES[::-1]):
        with pytest.raises(TypeError, match="LightningModule"):
            trainer_of(package, ReCoCallback(WINDOWS)).fit(module_of(other), batches())


SCRIPT = """
import sys
import torch
sys.path.insert(0, {root!r})
from tests.integration.test_pytorch_lightning import WINDOWS, ReCoCallback, data, module_of, trainer_of, weights
package, path = sys.argv[1:]
module = module_of(package)
options = {{"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}}
trainer = trainer_of(package, ReCoCallback(WINDOWS), max_epochs=1, **options)
trainer.fit(module, data(trainer.global_rank))
if trainer.is_global_zero:
    torch.save(weights(module), path)
"""


def data(rank, ranks=2):
    """The rank's part of every batch of 4."""
    parts = [batch[0].chunk(ranks)[rank] for batch in batches()]
    return DataLoader(torch.utils.data.TensorDataset(torch.cat(parts)), batch_size=len(parts[0]))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_are_one_with_the_joint_batch_in_both(tmp_path):
    root = Path(__file__).parents[2]
    (tmp_path / "run.py").write_text(SCRIPT.format(root=str(root)))
    found = []
    for package in PACKAGES:
        with launched(tmp_path / "run.py", package, tmp_path / f"{package}.pt") as processes:
            text = finish(processes, 300)
        assert [process.returncode for process in processes] == [0, 0], text[-3000:]
        found.append(torch.load(tmp_path / f"{package}.pt"))
    single = module_of(PACKAGES[0])
    trainer_of(PACKAGES[0], ReCoCallback(WINDOWS), max_epochs=1).fit(single, batches())
    for name, value in weights(single).items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], value, atol=1e-5, rtol=1e-4)
