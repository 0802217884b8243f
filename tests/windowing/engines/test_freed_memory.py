# SPDX-License-Identifier: Apache-2.0
"""A step's tensors end with the step: none waits in a cycle of references for Python's collector."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.experiments.plan.memory_tracker import StepTracker
from reco_lightning.windowing.injection.windowed_step import Injection
from tests.helpers import foreign


def build(recomputes):
    torch.manual_seed(0)
    module = foreign.ShiftedInput()
    if recomputes:
        for layer in module.net.h:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return module


@pytest.mark.parametrize("options", [*foreign.STEP_OPTIONS, {"recomputes": True}], ids=str)
def test_no_tensor_is_left_to_the_collector(options):
    options = dict(options)
    module = build(options.pop("recomputes", False))
    ids = next(iter(foreign.batches()))[0]
    callback = ReCoCallback(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK), **options)

    def step():
        return module.training_step([ids], 0)

    selection = callback.settings.select(module, step)
    injection = Injection(
        selection.engine, selection.trace, callback.settings.continuity, by_group=callback._losses is not None
    )
    windows = callback.settings.sampler.windows[-callback.settings.windows_per_batch :]

    def train():
        injection.run(windows, step)[0].backward()
        selection.engine.deactivate()

    selection.engine.install()
    try:
        train()  # the first step looks more closely, and makes the gradients' memory
        gc.disable()
        with StepTracker() as tracker:
            train()
        left = tracker.live
    finally:
        gc.enable()
        selection.engine.remove()
    assert left <= 64  # the report's numbers
