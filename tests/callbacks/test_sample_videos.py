# SPDX-License-Identifier: Apache-2.0
"""``SampleVideos`` inside a fit."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning import ReCoCallback, SampleVideos, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.data.video.clip import probe
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers import foreign
from tests.helpers.checkpoints import save

pytestmark = pytest.mark.third_party

GRID = (2, 2, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(VQVAE(codebook_size=16, width=8), tmp_path_factory.mktemp("tokenizer") / "vqvae.ckpt")


class Augmented(torch.utils.data.Dataset):
    """Samples that draw from every random state there is, as augmentation does."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        drawn = int(torch.randint(8, ()) + np.random.randint(8) + random.randrange(8))
        return {"tokens": (torch.arange(8) + drawn + index) % 16, "label": torch.tensor(index % 3)}


class Recorder(pl.Callback):
    """The random states and the modes of the modules before every step."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        modes = tuple(module.training for module in pl_module.modules())
        self.states.append((torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate(), modes))


def fit(tmp_path, *callbacks, logger=None, **options):
    pl.seed_everything(0, verbose=False)
    network = VideoTransformer(vocab_size=16, grid=GRID, dim=32, depth=1, heads=2, dropout=0.1, num_classes=3)
    model = VideoModel(network)
    data = torch.utils.data.DataLoader(Augmented(), batch_size=2, shuffle=True)
    logger = logger or pl.loggers.CSVLogger(tmp_path)
    recorder = Recorder()
    trainer = foreign.trainer(
        *callbacks, recorder, **{"max_epochs": 3, "logger": logger, "log_every_n_steps": 1, **options}
    )
    trainer.fit(model, data)
    return model, recorder.states


def files(folder):
    return [file.name for file in sorted(folder.rglob("*.mp4"))]


@pytest.mark.slow
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(
    ("options", "steps"), [({"every_n_epochs": 2}, [8]), ({"every_n_steps": 3}, [3, 6, 9, 12])], ids=str
)
def test_a_run_with_it_is_bitwise_the_run_without(tmp_path, checkpoint, options, steps, windows):
    def others():
        return [ReCoCallback(WindowSampler(2, 4, window_blocks=1))] if windows else []

    plain, before = fit(tmp_path / "plain", *others())
    model, after = fit(tmp_path / "own", SampleVideos(checkpoint, n=3, label=1, cfg_scale=2.0, **options), *others())
    assert files(tmp_path / "own") == [f"step-{step:08d}.mp4" for step in steps]
    assert len(after) == 12
    assert after == before
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    first = sorted((tmp_path / "own").rglob("*.mp4"))[0]
    assert first.parent.name == "samples"
    assert probe(first).frames == 5


def test_accumulated_batches_are_one_step(tmp_path, checkpoint):
    fit(tmp_path, SampleVideos(checkpoint, every_n_steps=2, n=1), accumulate_grad_batches=2)
    assert files(tmp_path) == ["step-00000002.mp4", "step-00000004.mp4", "step-00000006.mp4"]


def test_a_resumed_run_goes_on_counting(tmp_path, checkpoint):
    callback = SampleVideos(checkpoint, every_n_steps=3, n=1)
    options = {"logger": pl.loggers.CSVLogger(tmp_path, name="", version="")}
    trainer = foreign.trainer(callback, max_epochs=1, **options)
    network = VideoTransformer(vocab_size=16, grid=GRID, dim=32, depth=1, heads=2)
    trainer.fit(VideoModel(network), torch.utils.data.DataLoader(Augmented(), batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert files(tmp_path) == ["step-00000003.mp4"]
    trainer = foreign.trainer(SampleVideos(checkpoint, every_n_steps=3, n=1), max_epochs=2, **options)
    loader = torch.utils.data.DataLoader(Augmented(), batch_size=2)
    trainer.fit(VideoModel(network), loader, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 8
    assert files(tmp_path) == ["step-00000003.mp4", "step-00000006.mp4"]


def test_longer_clips(tmp_path, checkpoint):
    fit(tmp_path, SampleVideos(checkpoint, every_n_steps=12, n=1, length=4))
    assert probe(next(tmp_path.rglob("*.mp4"))).frames == 13


@pytest.mark.slow
def test_tensorboard_and_wandb_show_them(tmp_path, checkpoint, monkeypatch):
    shown = []
    logger = pl.loggers.WandbLogger(offline=True, save_dir=tmp_path / "wandb")
    monkeypatch.setattr(logger, "log_video", lambda key, paths, step: shown.append((key, len(paths), step)))
    monkeypatch.setattr(logger, "log_metrics", lambda *args, **kwargs: None)
    monkeypatch.setattr(logger, "log_hyperparams", lambda *args, **kwargs: None)
    board = pl.loggers.TensorBoardLogger(tmp_path / "board")
    monkeypatch.setattr(
        board.experiment, "add_image", lambda key, strip, step, dataformats: shown.append((key, strip.shape, step))
    )
    fit(tmp_path, SampleVideos(checkpoint, every_n_steps=6, n=2), logger=[board, logger])
    strip = (16, 5 * 32, 3)
    expected = [("samples", strip, 6), ("samples", 1, 6), ("samples", strip, 12), ("samples", 1, 12)]
    assert shown == expected


def test_without_a_tokenizer_it_writes_nothing(tmp_path):
    fit(tmp_path, SampleVideos(every_n_steps=1))
    assert files(tmp_path) == []


def test_refusals(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number of 1 or more, got 0"):
        SampleVideos(every_n_epochs=0)
    with pytest.raises(ValueError, match="every_n_steps must be a whole number of 1 or more or None, got 0"):
        SampleVideos(every_n_steps=0)
    with pytest.raises(ValueError, match="n must be a whole number of 1 or more, got 0"):
        SampleVideos(n=0)
    with pytest.raises(ValueError, match=r"got 'nothing\.ckpt' \(no such file\)"):
        fit(tmp_path, SampleVideos("nothing.ckpt"))
    with pytest.raises(MisconfigurationException, match="generates from a VideoModel, got ShiftedInput"):
        foreign.trainer(SampleVideos(checkpoint)).fit(foreign.ShiftedInput(), foreign.batches())
