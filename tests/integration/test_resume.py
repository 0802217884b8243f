# SPDX-License-Identifier: Apache-2.0
"""A run stopped at any step and resumed gives bitwise the weights of the uninterrupted one."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.writer import ClipSource, TokenShardWriter

GRID = (5, 2, 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.random.default_rng(0).integers(0, 32, (28, *GRID))
    with TokenShardWriter(folder, vocab_size=32, grid=GRID) as writer:
        for start in range(0, 28, 7):
            sources = [ClipSource("clip.mp4", i * 17, i * 17 + 17) for i in range(start, start + 7)]
            writer.write(ids[start : start + 7], sources=sources)
    return folder


class Save(pl.Callback):
    """Saves where asked, from within the loop as ``ModelCheckpoint`` does."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(shards, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(7)
    network = VideoTransformer(vocab_size=32, grid=GRID, dim=32, depth=2, heads=2, dropout=options.pop("dropout", 0.0))
    sampler = WindowSampler(5, 4, **options.pop("windows", {}))
    model = VideoModel(network, learning_rate=1e-2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ReCoCallback(sampler, **options), *callbacks],
    )
    data = TokenDataModule(str(shards), batch_size=6, val_fraction=0.15)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture(scope="module")
def uninterrupted(shards):
    return fit(shards)


@pytest.mark.parametrize("step", range(1, 12))
def test_stopped_and_resumed_equals_uninterrupted(shards, uninterrupted, step, tmp_path):
    whole, trainer = uninterrupted
    assert trainer.global_step >= 12
    path = str(tmp_path / "stopped.ckpt")
    fit(shards, Save(step, path))
    resumed, again = fit(shards, ckpt_path=path)
    assert again.global_step == trainer.global_step
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 7])
def test_dropout_goes_on_where_it_stopped(shards, step, tmp_path):
    whole, _ = fit(shards, dropout=0.3)
    path = str(tmp_path / "stopped.ckpt")
    fit(shards, Save(step, path), dropout=0.3)
    resumed, _ = fit(shards, ckpt_path=path, dropout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_everything_beyond_the_paper_goes_on_where_it_stopped(shards, step, tmp_path, monkeypatch):
    monkeypatch.setattr("reco_lightning.windowing.running_losses._EVERY", 4)
    options = {
        "windows": {"schedule": {0.4: 3}},
        "loss_aware": 2.0,
        "windows_per_batch": 2,
        "attached_blocks": 1,
        "attached_share": 0.5,
        "continuity_schedule": "cosine",
    }
    whole, _ = fit(shards, **copy.deepcopy(options))
    path = str(tmp_path / "stopped.ckpt")
    fit(shards, Save(step, path), **copy.deepcopy(options))
    resumed, _ = fit(shards, ckpt_path=path, **copy.deepcopy(options))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_comparison_can_fail(shards, uninterrupted):
    other, _ = fit(shards, continuity_weight=0.2)
    assert not all(torch.equal(a, b) for a, b in zip(uninterrupted[0].parameters(), other.parameters(), strict=True))


def test_the_checkpoint_names_the_choice_and_holds_plain_data(shards, tmp_path):
    path = str(tmp_path / "stopped.ckpt")
    fit(shards, Save(2, path))
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if "ReCoCallback" in key]
    assert state["choice"] == {"engine": "frozen", "blocks": "network.blocks", "head": "network.head", "tail": 0}
    assert VideoModel.load_from_checkpoint(path, weights_only=True).network.grid == GRID
