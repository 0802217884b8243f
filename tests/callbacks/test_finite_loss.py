# SPDX-License-Identifier: Apache-2.0
"""A loss that is no number ends the fit with step, window and weights, and is kept out of the checkpoints."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.callbacks.finite_loss import FiniteLoss, first_not_finite
from tests.faults.runs import GRID, VOCAB


class Spoil(pl.Callback):
    """Puts a value into a weight before the batch of a number."""

    def __init__(self, number, value):
        self.number, self.value = number, value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.number:
            pl_module.network.head.weight.data[0, 0] = self.value


def fit(folder, *callbacks, batches=8, **options):
    torch.manual_seed(0)
    model = VideoModel(VideoTransformer(vocab_size=VOCAB, grid=GRID, dim=16, depth=1, heads=2))
    clips = [{"tokens": row, "label": torch.tensor(0)} for row in torch.randint(VOCAB, (2 * batches, 12))]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, torch.utils.data.DataLoader(clips, batch_size=2))
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_message_names_step_window_parameter_and_gradient(tmp_path, value):
    window = WindowSampler(3, 4).sample(5)
    expected = (
        rf"the training loss must be finite, got nan at batch 5 of epoch 0 \(step 6\), tokens {window.start} to "
        rf"{window.stop - 1}; first parameter that is not: network\.\S+; first gradient that is not: network\.\S+\. "
        r"No checkpoint was written since: resume from the last one with a lower learning rate"
    )
    with pytest.raises(FloatingPointError, match=expected):
        fit(tmp_path, ReCoCallback(WindowSampler(3, 4)), Spoil(5, value), FiniteLoss(every_n_batches=1))


def test_no_checkpoint_holds_such_weights(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    with pytest.raises(FloatingPointError, match=r"at batch 4 of epoch 0 \(step 5\); first parameter"):
        fit(tmp_path, Spoil(4, float("nan")), FiniteLoss(), saves)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
        "last.ckpt",
    }
    for path in tmp_path.glob("*.ckpt"):
        assert all(weight.isfinite().all() for weight in torch.load(path, weights_only=True)["state_dict"].values())


def test_losses_are_looked_at_every_few_batches_and_at_the_end(tmp_path, monkeypatch):
    looks, stack = [], torch.stack

    def counted(values, *args, **kwargs):
        looks.append(len(values))
        return stack(values, *args, **kwargs)

    callback = FiniteLoss(every_n_batches=3)
    look = callback._look

    def watched(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "stack", counted)
            look(*args)

    callback._look = watched
    fit(tmp_path, callback)
    assert looks == [3, 3, 2]


def test_a_loss_that_is_no_number_at_the_end_of_an_epoch_is_met(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at batch 7 of epoch 0 \(step 8\)"):
        fit(tmp_path, Spoil(7, float("nan")), FiniteLoss())


def test_first_not_finite():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_not_finite(layers) == (None, None)
    layers[1].weight.data[0, 0] = float("-inf")
    layers[0].bias.grad = torch.tensor([0.0, float("nan")])
    layers[1].bias.grad = torch.tensor([0.0, float("nan")])
    assert first_not_finite(layers) == ("1.weight", "0.bias")


def test_refuses_no_batches():
    with pytest.raises(ValueError, match="every_n_batches must be a whole number of 1 or more, got 0"):
        FiniteLoss(0)
