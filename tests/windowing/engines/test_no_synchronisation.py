# SPDX-License-Identifier: Apache-2.0
"""A windowed step never waits for its device: it reads no number back from it, and sends it none from Python's lists.

On tensors without data a step that needs a value cannot run at all, so that this holds for a GPU too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.windowing.injection.engine_selection import build_engine
from reco_lightning.windowing.injection.windowed_step import Injection
from tests.helpers import foreign
from tests.helpers.foreign import BLOCKS, PER_BLOCK, TOKENS, VOCAB


class Sent(TorchDispatchMode):
    """Tensors made of Python's numbers, which a device gets by a copy that waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
        return func(*args, **(kwargs or {}))


def build():
    torch.manual_seed(0)
    return foreign.ShiftedInput()


@pytest.mark.slow
@pytest.mark.parametrize("options", foreign.STEP_OPTIONS, ids=str)
def test_a_step_runs_without_any_value(options):
    callback, module = ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK), **options), build()
    ids = next(iter(foreign.batches()))[0]
    selection = callback.settings.select(module, lambda: module.training_step([ids], 0))
    groups = callback.settings.windows_per_batch
    with FakeTensorMode():
        fake, ids = build(), torch.empty(len(ids), TOKENS, dtype=torch.long)
        trace = replace(
            selection.trace, heads=tuple(replace(head, like=torch.empty(())) for head in selection.trace.heads)
        )
        engine = build_engine(
            fake,
            trace,
            selection.engine.name,
            tokens=TOKENS,
            context=callback.settings.context,
            chunked_loss=callback.settings.chunked_loss,
        )
        injection = Injection(engine, trace, callback.settings.continuity, by_group=callback._losses is not None)
        engine.install()
        for first in range(len(callback.settings.sampler.windows) - groups + 1):
            with Sent() as sent:
                result, report = injection.run(
                    callback.settings.sampler.windows[first : first + groups], lambda: fake.training_step([ids], 0)
                )
                result.backward()
                engine.deactivate()
            assert sent.count == 0
        engine.remove()
    assert report.cross_entropy.shape == ()


def test_a_step_that_reads_a_value_would_be_seen():
    class Reading(foreign.ShiftedInput):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (1.0 if loss > 0 else 2.0)

    with FakeTensorMode():
        module, ids = Reading(), torch.zeros(2, TOKENS, dtype=torch.long)
        with pytest.raises(Exception, match=r"data-dependent|aten\._local_scalar_dense"):
            module.training_step([ids], 0)
        with Sent() as sent:
            torch.tensor([1, VOCAB])
        assert sent.count == 1
