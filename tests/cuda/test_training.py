# SPDX-License-Identifier: Apache-2.0
"""Sampling, and a run that was stopped, on the device."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.models.sampling.generate import generate

GRID, V = (4, 3, 3), 24


def build(**options):
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=V, grid=GRID, dim=64, depth=2, heads=2, **options)
    for parameter in network.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # probabilities far from even
    return network


@torch.no_grad()
def greedy(network, count):
    """The likeliest token after each, by whole forwards on the CPU in float64."""
    ids = torch.zeros(count, 0, dtype=torch.long)
    for _ in range(network.num_tokens):
        ids = torch.cat([ids, network(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_cached_sampling_is_uncached_sampling(compiled, device):
    network = build().eval()
    expected = greedy(build().double().eval(), 2)
    compiler = "aot_eager" if compiled and device.type == "cpu" else compiled
    own = generate(network.to(device), 2, temperature=0.0, compile=compiler)
    assert torch.equal(own.flatten(1).cpu(), expected)


def test_a_prefix_that_is_given_is_run_in_one_piece(device):
    network = build().eval()
    first = greedy(build().double().eval(), 2)
    own = generate(network.to(device), 2, temperature=0.0, first_tokens=first[:, :12].to(device))
    assert torch.equal(own.flatten(1).cpu(), first)


class Save(pl.Callback):
    """Saves after the first epoch's last step, as ``ModelCheckpoint`` does, and ends the fit."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


def fit(device, folder, *callbacks, checkpoint=None):
    """Two epochs of six steps, or as many as the callbacks let it have."""
    torch.manual_seed(0)
    model = VideoModel(build(), learning_rate=1e-3)
    # one batch, again and again: where Lightning goes on in plain data of an epoch is its own affair
    clips = torch.randint(V, (4, 36), generator=torch.Generator().manual_seed(1))
    batches = torch.utils.data.DataLoader([{"tokens": clips}] * 6, batch_size=None)
    trainer = pl.Trainer(
        accelerator=device.type, devices=1, max_steps=12, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ReCoCallback(WindowSampler(4, 9, seed=3)), *callbacks],
    )  # fmt: skip
    trainer.fit(model, batches, ckpt_path=checkpoint)
    return model, trainer


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(device, tmp_path):
    whole, trainer = fit(device, tmp_path)
    assert trainer.global_step == 12
    _, trainer = fit(device, tmp_path, Save(tmp_path / "half.ckpt"))
    assert trainer.global_step == 6
    resumed, _ = fit(device, tmp_path, checkpoint=tmp_path / "half.ckpt")
    for (name, own), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
