# SPDX-License-Identifier: Apache-2.0
"""Every network of the settings table on the device, against references on the CPU."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from reco_lightning import ReCoCallback
from tests.cuda.steps import STEPS, WEIGHT, assert_close, windowed_gradients
from tests.helpers.networks.common import BATCH, quieten
from tests.helpers.networks.references import reference_gradients
from tests.helpers.settings import SETTINGS, WINDOWS, tried


def over(settings):
    return pytest.mark.parametrize("setting", settings, ids=lambda setting: setting.name)


@over(SETTINGS)
@pytest.mark.parametrize("context", ["frozen", "keys", "attached"])
def test_gradients_equal_the_reference_on_the_cpu(setting, context, device):
    own, engine = windowed_gradients(setting, device, context=context)
    assert engine == ("frozen" if context == "attached" and setting.engine in ("cache", "prefix") else setting.engine)
    ways = {"frozen": setting.reference, "keys": "states", "attached": "whole"}
    reference = replace(setting, reference=ways[context])
    module = quieten(setting.make()).train()
    for step in range(STEPS):
        window = WINDOWS.sample(step)
        expected = reference_gradients(reference, module, setting.draw(0), BATCH, window, WEIGHT, 100 + step)
        assert_close(own[step], expected, 1e-4, text=f"{window}")


REFUSE_SHORTER_INPUT = "encoder", "adaptive", "omni", "hand-written", "videogpt"
"""Networks whose sequence has one length, or whose prefix changes: refused, or (``omni``) not to be compared."""


@over([setting for setting in SETTINGS if setting.name not in REFUSE_SHORTER_INPUT])
def test_a_dropped_context_gives_the_same_on_both_devices(setting, device):
    own, _ = windowed_gradients(setting, device, context="dropped")
    expected, _ = windowed_gradients(setting, torch.device("cpu"), context="dropped")
    for mine, other in zip(own, expected, strict=True):
        assert_close(mine, other, 1e-4)


@over(tried("bf16-mixed"))
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains(setting, precision, device):
    how = {"precision": precision}
    if precision == "16-mixed":  # from torch's own first scale on, three steps would be spent on finding a smaller one
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        how = {"plugins": [MixedPrecision(precision, device=device.type, scaler=scaler)]}
    before, module = setting.make(), setting.make()
    trainer = pl.Trainer(
        accelerator=device.type, devices=1, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[ReCoCallback(WINDOWS, continuity_weight=WEIGHT)], **how,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader([setting.draw(seed) for seed in range(STEPS)], batch_size=None)
    trainer.fit(module, batches, torch.utils.data.DataLoader([setting.draw(9)], batch_size=None))
    changed = [not torch.equal(a, b.cpu()) for a, b in zip(before.parameters(), module.parameters(), strict=True)]
    assert all(value.isfinite().all() for value in module.parameters())
    assert sum(changed) > len(changed) // 2
