# SPDX-License-Identifier: Apache-2.0
"""A window never attends without its context unseen."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from reco_lightning.windowing.engines.context_kv import AttentionJoint, CacheJoint, KeptKeys

CONTEXT, WINDOW = 5, 3


def states(rows):
    return torch.randn(1, 2, rows, 4, generator=torch.Generator().manual_seed(rows))


def attend(rows, **kwargs):
    return scaled_dot_product_attention(states(rows), states(rows), states(rows), is_causal=True)


@pytest.mark.parametrize("joint", [AttentionJoint(), CacheJoint("cache")])
def test_a_window_that_attends_otherwise_than_its_context_is_refused(joint):
    kept = KeptKeys(CONTEXT)
    kept.pairs.append((states(CONTEXT), states(CONTEXT)))
    with pytest.raises(RuntimeError, match=r"attended 1 times over its context and 0 times over its window"):
        joint.run_window(lambda **_: states(WINDOW), kept, WINDOW)


def test_a_window_attends_over_both():
    joint, kept = AttentionJoint(), KeptKeys(CONTEXT)
    with torch.no_grad():
        joint.run_context(lambda: attend(CONTEXT), kept)
    own = joint.run_window(lambda: attend(WINDOW), kept, WINDOW)
    keys = torch.cat([states(CONTEXT), states(WINDOW)], dim=2)
    scores = states(WINDOW) @ keys.mT / 2
    later = torch.ones(WINDOW, CONTEXT + WINDOW, dtype=torch.bool).triu(CONTEXT + 1)
    torch.testing.assert_close(own, scores.masked_fill(later, float("-inf")).softmax(-1) @ keys)
