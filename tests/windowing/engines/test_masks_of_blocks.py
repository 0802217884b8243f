# SPDX-License-Identifier: Apache-2.0
"""Blocks that hold a mask of the whole sequence, or cut one themselves, train as those that attend causally."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning import ReCoCallback, WindowSampler
from tests.callbacks.test_foreign_steps import Module, build
from tests.helpers.foreign import BLOCKS, DIM, PER_BLOCK, TOKENS, batches, trainer

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=3)
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
MASKS = {
    "bool": CAUSAL,
    "four dimensions": CAUSAL[None, None],
    "float": torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL, float("-inf")),
}


class MaskedAttention(nn.Module):
    """Causal attention by a mask, which ``read`` brings into the form that attention wants."""

    def __init__(self, mask, read):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.register_buffer("mask", mask, persistent=False)
        self.read = read

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.read(self.mask, x.shape[1]))
        return self.o(y.transpose(1, 2).flatten(2))


READS = {"whole": lambda mask, rows: mask, "cut by its rows": lambda mask, rows: mask[..., :rows, :rows]}


def masked(mask, read):
    module = build(Module)
    for layer in module.layers:
        own = MaskedAttention(mask, read)
        own.load_state_dict(layer.attention.state_dict())
        layer.attention = own
    return module


@pytest.mark.parametrize("options", [{}, {"windows_per_batch": 2}, {"context": "keys"}], ids=str)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_the_whole_sequence_in_a_buffer(mask, read, options):
    plain, own = build(Module), masked(MASKS[mask].clone(), READS[read])
    callback = ReCoCallback(WINDOWS, engine="frozen", **options)
    trainer(callback).fit(own, batches(count=6))
    trainer(ReCoCallback(WINDOWS, engine="frozen", **options)).fit(plain, batches(count=6))
    for (name, value), other in zip(own.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_block_causal_mask_in_a_buffer_is_served_by_the_fastest_engine():
    """Rows see their whole frame block, as in next-block prediction: the loss is of the block that follows."""
    block = torch.arange(TOKENS) // PER_BLOCK

    class NextBlock(Module):
        def embed(self, ids):
            shifted = F.pad(ids[:, :-PER_BLOCK], (PER_BLOCK, 0), value=0)
            return self.ids(shifted) + self.places.weight

    module = build(NextBlock)
    for layer in module.layers:
        layer.attention = MaskedAttention(block[:, None] >= block, READS["whole"])
    selection = ReCoCallback(WINDOWS).settings.select(module, lambda: module.training_step(next(iter(batches())), 0))
    assert selection.engine.name == "frozen"
    assert selection.error < 1e-5


def test_the_mask_of_a_window_is_its_part_of_the_whole():
    """Compared with attention written out over all rows, of which the window's are taken."""
    torch.manual_seed(0)
    slopes = -(torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs().float() * 0.3  # ALiBi
    module = masked((slopes + MASKS["float"]).clone(), READS["whole"])
    before = copy.deepcopy(module)
    selection = ReCoCallback(WINDOWS).settings.select(module, lambda: module.training_step(next(iter(batches())), 0))
    engine = selection.engine
    assert engine.name == "frozen"
    (ids,) = next(iter(batches()))
    plain = before.head(before.states(ids))
    engine.install()
    try:
        for window in WINDOWS.windows:
            engine.activate([window], inference=True)
            logits = module.head(module.states(ids))
            torch.testing.assert_close(logits[:, window.start : window.stop], plain[:, window.start : window.stop])
    finally:
        engine.remove()
