# SPDX-License-Identifier: Apache-2.0
"""What cannot be windowed is refused on the first batch, with the reason, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from reco_lightning import ReCoCallback, WindowSampler
from tests.helpers.foreign import trainer
from tests.helpers.settings import REFUSALS

pytestmark = pytest.mark.third_party


def installed(module):
    parts = module.named_modules() if isinstance(module, torch.nn.Module) else [("", module)]
    return [name for name, part in parts if {"forward", "training_step"} & set(vars(part))]


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(one, id=one.name, marks=pytest.mark.skipif(bool(one.missing), reason=one.missing))
        for one in REFUSALS
    ],
)
def test_is_refused_with_its_own_reason_before_any_weight_changes(refusal):
    torch.manual_seed(3)
    module = refusal.build()
    before = copy.deepcopy(getattr(module, "state_dict", dict)())
    batches = torch.utils.data.DataLoader([refusal.draw(seed) for seed in range(2)], batch_size=None)
    with pytest.raises(refusal.error, match=f"(?s){refusal.match}"):
        trainer(ReCoCallback(refusal.sampler)).fit(module, batches)
    assert all(torch.equal(before[key], value) for key, value in getattr(module, "state_dict", dict)().items())
    assert installed(module) == []


def test_a_window_longer_than_the_video_is_refused_where_it_is_made():
    with pytest.raises(ValueError, match="window_blocks must be a whole number from 1 to frame_blocks=5, got 6"):
        WindowSampler(5, 6, window_blocks=6)
