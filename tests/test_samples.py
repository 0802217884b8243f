# SPDX-License-Identifier: Apache-2.0
"""``SampleVideos`` inside a fit."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning import SampleVideos, VideoModel, VideoTransformer
from reco_lightning.data.video import probe
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers import foreign

GRID = (2, 2, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokenizer") / "vqvae.ckpt")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(VQVAE(codebook_size=16, width=8))
    trainer.save_checkpoint(path)
    return path


def fit(tmp_path, *callbacks):
    torch.manual_seed(0)
    model = VideoModel(VideoTransformer(vocab_size=16, grid=GRID, dim=32, depth=1, heads=2, dropout=0.1))
    data = torch.utils.data.DataLoader([{"tokens": torch.arange(8), "label": torch.tensor(0)}] * 4, batch_size=2)
    logger = pl.loggers.CSVLogger(tmp_path)
    foreign.trainer(*callbacks, max_epochs=4, logger=logger, log_every_n_steps=1).fit(model, data)
    return model, logger


def test_writes_clips_every_few_epochs_and_changes_no_weight(tmp_path, checkpoint):
    plain, _ = fit(tmp_path / "plain")
    model, _ = fit(tmp_path / "own", SampleVideos(checkpoint, every_n_epochs=2, n=3))
    files = sorted((tmp_path / "own").rglob("*.mp4"))
    assert [file.name for file in files] == ["step-00000004.mp4", "step-00000008.mp4"]
    assert files[0].parent.name == "samples"
    assert probe(files[0]).frames == 5
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_without_a_tokenizer_it_writes_nothing(tmp_path):
    fit(tmp_path, SampleVideos())
    assert not list(tmp_path.rglob("*.mp4"))


def test_refusals(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="every_n_epochs must be 1 or more, got 0"):
        SampleVideos(every_n_epochs=0)
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        SampleVideos(n=0)
    with pytest.raises(ValueError, match=r"got 'nothing\.ckpt', which is none"):
        fit(tmp_path, SampleVideos("nothing.ckpt"))
    with pytest.raises(MisconfigurationException, match="generates from a VideoModel, got ShiftedInput"):
        foreign.trainer(SampleVideos(checkpoint)).fit(foreign.ShiftedInput(), foreign.batches())
