# SPDX-License-Identifier: Apache-2.0
"""What a windowed step costs against the plain one, counted; ``pytest -s`` prints the table."""

from __future__ import annotations

import pytest
import torch

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler, explain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=512, grid=(5, 8, 8), dim=128, depth=4, heads=4)
    batch = {"tokens": torch.randint(512, (2, 320)), "label": torch.zeros(2, dtype=torch.long)}
    explanation = explain(VideoModel(network), batch, ReCoCallback(WindowSampler(5, 64)))
    print(f"\n{explanation}")
    return explanation


def test_a_balanced_step_needs_at_most_1_over_2_15_of_the_operations(found):
    assert found.operations <= found.plain_operations / 2.15


def test_a_balanced_step_keeps_at_most_048_of_the_bytes(found):
    assert found.saved_bytes <= 0.48 * found.plain_saved_bytes


def test_operations_are_those_counted_by_hand(found):
    # Multiply-adds of a row in all linear layers of 4 blocks of width 128 (feed-forward 384), and in the head.
    linear, head = 4 * (4 * 128**2 + 3 * 128 * 384), 128 * 512
    rows, batch = 320, 2
    attention = 4 * 2 * 128  # of a pair of rows: scores and values, in 4 blocks
    # Forward 1, backward 2: of the weights and of the inputs.
    plain = 2 * 3 * batch * (rows * (linear + head) + rows**2 * attention)
    assert found.plain_operations == plain
    last = found.windows[-1]
    context, window = 192, 128
    once = context * (linear - (128**2 + 3 * 128 * 384)) + context**2 * (attention * 3 // 4)  # last block: to the keys
    trained = window * (linear + head) + window * rows * attention
    assert last.operations == 2 * batch * (once + 3 * trained)
    # what a mask hides: half of the plain step's pairs, but for the rows themselves
    assert found.plain_hidden_operations == 2 * 3 * batch * attention * rows * (rows - 1) // 2
    inside = context * (context - 1) // 2 * (attention * 3 // 4), window * (window - 1) // 2 * attention
    # of the context the last block runs to its attention, which is counted where it is called
    assert last.hidden_operations == 2 * batch * (inside[0] + 3 * inside[1])


def test_the_callback_costs_no_more_operations_than_the_mixin(found):
    from reco_lightning import ReCoMixin
    from reco_lightning.windowing.cost import count_operations

    class Own(ReCoMixin, torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network
            self.init_reco(WindowSampler(5, 64), blocks="network.blocks", head="network.head", prefix_tokens=1)

    torch.manual_seed(0)
    module = Own(VideoTransformer(vocab_size=512, grid=(5, 8, 8), dim=128, depth=4, heads=4))
    tokens = torch.randint(512, (2, 320))
    sampler = WindowSampler(5, 64)

    def loss():
        return module.reco_loss(module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0))

    loss()  # the first call compares with the plain forward
    mixin = count_operations(loss, list(module.parameters()))
    callback = next(cost.operations for cost in found.windows if cost.window == sampler.sample(0))
    assert callback <= 1.03 * mixin
