# SPDX-License-Identifier: Apache-2.0
"""``PositionLossProfile`` inside a fit: its figures, and that training does not notice it."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning import VideoModel, VideoTransformer
from reco_lightning.callbacks import position_profile
from reco_lightning.callbacks.position_profile import PositionLossProfile
from reco_lightning.models.larp.network import LARPTransformer
from tests.helpers import foreign

GRID, VOCAB = (2, 2, 2), 16


class Restless(VideoTransformer):
    """Draws random numbers in eval mode as well."""

    def forward(self, *args, **kwargs):
        torch.rand(3)
        np.random.rand(3)
        return super().forward(*args, **kwargs)


class States(pl.Callback):
    """Keeps the random state that every training batch begins with."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append((torch.get_rng_state(), np.random.get_state()[2]))


def loader(count, seed, **options):
    tokens = torch.randint(VOCAB, (count, 8), generator=torch.Generator().manual_seed(seed))
    samples = [{"tokens": row, "label": torch.tensor(number % 2)} for number, row in enumerate(tokens)]
    return torch.utils.data.DataLoader(samples, batch_size=2, **options)


def fit(tmp_path, *callbacks, network=VideoTransformer, logger=None, validation=True, **options):
    torch.manual_seed(0)
    np.random.seed(0)
    settings = {"vocab_size": VOCAB, "grid": GRID, "dim": 32, "depth": 1, "heads": 2, "num_classes": 2, "dropout": 0.2}
    model = VideoModel(network(**settings))
    trainer = foreign.trainer(
        *callbacks,
        max_epochs=4,
        logger=CSVLogger(tmp_path) if logger is None else logger,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(model, loader(8, 1, shuffle=True), loader(6, 2) if validation else None)
    return model, trainer


@pytest.fixture
def drawn(monkeypatch):
    """Curves and arguments of every figure."""
    calls = []
    original = position_profile.position_cross_entropy

    def draw(values, per_block, **options):
        calls.append((values, per_block))
        return original(values, per_block, **options)

    monkeypatch.setattr(position_profile, "position_cross_entropy", draw)
    return calls


@pytest.mark.slow
def test_a_figure_every_few_epochs_whose_mean_is_the_validation_loss(tmp_path, drawn):
    _, trainer = fit(tmp_path, PositionLossProfile(every_n_epochs=2))
    files = sorted(tmp_path.rglob("*.png"))
    assert [file.name for file in files] == ["position-loss-step-00000008.png", "position-loss-step-00000016.png"]
    assert files[0].parent.name == "figures"
    assert files[0].read_bytes()[:4] == b"\x89PNG"
    assert [list(values) for values, _ in drawn] == [["data"], ["data"]]
    values, per_block = drawn[-1]
    assert per_block == 4
    assert values["data"].shape == (8,)
    assert values["data"].mean() == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", [VideoTransformer, Restless])
def test_training_is_bitwise_as_without_it(tmp_path, network):
    without, within = States(), States()
    plain, _ = fit(tmp_path / "plain", without, network=network)
    profile = PositionLossProfile(every_n_epochs=1, generated=3)
    model, _ = fit(tmp_path / "own", within, profile, network=network)
    assert len(list((tmp_path / "own").rglob("*.png"))) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert len(without.seen) == 4
    for (torch_a, numpy_a), (torch_b, numpy_b) in zip(without.seen, within.seen, strict=True):
        assert torch.equal(torch_a, torch_b)
        assert numpy_a == numpy_b


def test_own_samples_stand_beside_the_data(tmp_path, drawn, monkeypatch):
    seen = []
    original = position_profile.generated_batches

    def generate(model, batches, *, given_blocks, **options):
        seen.append((given_blocks, options, [len(batch["tokens"]) for batch in batches]))
        return original(model, batches, given_blocks=given_blocks, **options)

    monkeypatch.setattr(position_profile, "generated_batches", generate)
    fit(tmp_path, PositionLossProfile(every_n_epochs=4, generated=3, seed=9))
    options = {"seed": 9, "first_index": 0}
    assert seen == [(0, options, [2, 1]), (1, options, [2, 1])]
    values = drawn[0][0]
    assert list(values) == ["data", "generated", "generated after a true first frame"]
    assert all(np.isfinite(curve).all() for curve in values.values())


def test_ids_that_lie_on_no_grid_are_one_block(tmp_path, drawn):
    def network(grid, dropout, **options):
        return LARPTransformer(video_tokens=8, token_dropout=dropout, **options)

    fit(tmp_path, PositionLossProfile(every_n_epochs=4, generated=1), network=network)
    values, per_block = drawn[0]
    assert per_block == 8
    assert list(values) == ["data", "generated"]


def test_batches_limits_what_is_measured(tmp_path, drawn):
    model, _ = fit(tmp_path, PositionLossProfile(every_n_epochs=4, batches=1))
    first = next(iter(loader(6, 2)))
    model.eval()
    with torch.no_grad():
        logits = model(first["tokens"], first["label"])
    expected = torch.nn.functional.cross_entropy(logits.mT, first["tokens"], reduction="none").mean(0)
    np.testing.assert_allclose(drawn[0][0]["data"], expected, rtol=1e-5)


def test_precision_is_that_of_the_validation(tmp_path, drawn):
    _, trainer = fit(tmp_path, PositionLossProfile(every_n_epochs=4), precision="bf16-mixed")
    assert drawn[0][0]["data"].mean() == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)


@pytest.mark.slow
def test_loggers_get_the_picture(tmp_path, monkeypatch):
    images, shown = [], []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, *given, **named: images.append((given, named)))
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, *given, **named: None)
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, *given, **named: None)
    tensorboard = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(tensorboard.experiment, "add_image", lambda *given, **named: shown.append((given, named)))
    loggers = [tensorboard, WandbLogger(offline=True, save_dir=tmp_path), CSVLogger(tmp_path)]
    fit(tmp_path, PositionLossProfile(every_n_epochs=4), logger=loggers)
    (path,) = tmp_path.rglob("position-loss*.png")
    assert images == [(("position_loss", [str(path)]), {"step": 16})]
    ((key, pixels, step), named) = shown[0]
    assert (key, step, named, len(shown)) == ("position_loss", 16, {"dataformats": "HWC"}, 1)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 1


def test_without_a_logger_the_file_is_the_record(tmp_path):
    fit(tmp_path, PositionLossProfile(every_n_epochs=4), logger=False)
    assert (tmp_path / "figures" / "position-loss-step-00000016.png").is_file()


@pytest.mark.slow
def test_without_validation_it_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(position_profile, "rank_zero_info", said.append)
    fit(tmp_path, PositionLossProfile(every_n_epochs=1), validation=False)
    assert said == ["PositionLossProfile: no figures, since there are no validation batches"]
    assert not list(tmp_path.rglob("*.png"))
    said.clear()
    fit(tmp_path, PositionLossProfile(every_n_epochs=1))
    assert not said


def test_refusals():
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number of 1 or more, got 0"):
        PositionLossProfile(every_n_epochs=0)
    with pytest.raises(ValueError, match="batches must be a whole number of 1 or more or None, got 0"):
        PositionLossProfile(batches=0)
    with pytest.raises(ValueError, match="generated must be a whole number of 0 or more, got -1"):
        PositionLossProfile(generated=-1)
    with pytest.raises(MisconfigurationException, match="PositionLossProfile measures a VideoModel, got ShiftedInput"):
        foreign.trainer(PositionLossProfile()).fit(foreign.ShiftedInput(), foreign.batches())
