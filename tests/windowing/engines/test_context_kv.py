# SPDX-License-Identifier: Apache-2.0
"""A window never attends without its context unseen."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.windowing.engines.context_kv import AttentionContextKV, CacheContextKV, ContextCache
from reco_lightning.windowing.settings import ReCoSettings

CONTEXT, WINDOW = 5, 3


def states(rows):
    return torch.randn(1, 2, rows, 4, generator=torch.Generator().manual_seed(rows))


def attend(rows, **kwargs):
    return scaled_dot_product_attention(states(rows), states(rows), states(rows), is_causal=True)


@pytest.mark.parametrize("context_kv", [AttentionContextKV(), CacheContextKV("cache")])
def test_a_window_that_attends_otherwise_than_its_context_is_refused(context_kv):
    kept = ContextCache(CONTEXT)
    kept.pairs.append((states(CONTEXT), states(CONTEXT)))
    with pytest.raises(RuntimeError, match=r"attended 1 times over its context and 0 times over its window"):
        context_kv.run_window(lambda **_: states(WINDOW), kept, WINDOW)


def test_a_window_attends_over_both():
    context_kv, kept = AttentionContextKV(), ContextCache(CONTEXT)
    with torch.no_grad():
        context_kv.run_context(lambda: attend(CONTEXT), kept)
    own = context_kv.run_window(lambda: attend(WINDOW), kept, WINDOW)
    keys = torch.cat([states(CONTEXT), states(WINDOW)], dim=2)
    scores = states(WINDOW) @ keys.mT / 2
    later = torch.ones(WINDOW, CONTEXT + WINDOW, dtype=torch.bool).triu(CONTEXT + 1)
    torch.testing.assert_close(own, scores.masked_fill(later, float("-inf")).softmax(-1) @ keys)


class CuttingBlock(nn.Module):
    """Cuts its mask to the keys that it makes, as transformers does before 5.0."""

    def __init__(self, convert):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.convert = convert

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = mask if mask is None else self.convert(mask[..., : k.shape[-2]])
        y = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return x + self.out(y.transpose(1, 2).flatten(-2))


class MaskedModule(pl.LightningModule):
    """Hides some columns from all rows, or makes its causal mask under a compiler alone, as transformers does."""

    def __init__(self, convert=lambda mask: mask, *, hidden=(), compiled_only=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        self.position = nn.Parameter(torch.randn(12, 16))
        self.blocks = nn.ModuleList(CuttingBlock(convert) for _ in range(2))
        self.hidden, self.compiled_only = list(hidden), compiled_only

    def forward(self, ids):
        x, mask = self.embedding(ids) + self.position[: ids.shape[1]], None
        if not self.compiled_only or torch.compiler.is_compiling():
            mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            mask[..., self.hidden] = False
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(x)

    def training_step(self, batch, batch_idx=0):
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, -logits.shape[1] :].flatten())


IDS = torch.arange(24).view(2, 12) % 16
SETTINGS = ReCoSettings(WindowSampler(3, 4, window_blocks=1), engine="frozen")


def test_a_mask_that_the_block_cuts_is_restored():
    module = MaskedModule(hidden=[1, 2])
    selection = SETTINGS.select(module, lambda: module.training_step(IDS))
    assert selection.error < 1e-5  # states of every window against the plain step's


def test_a_mask_that_the_block_makes_anew_is_refused():
    module = MaskedModule(lambda mask: torch.zeros(mask.shape).masked_fill(~mask, float("-inf")), hidden=[1, 2])
    with pytest.raises(MisconfigurationException, match="attended with one over as many keys as the window has"):
        SETTINGS.select(module, lambda: module.training_step(IDS))


@pytest.mark.slow
def test_a_mask_that_is_made_under_a_compiler_alone_is_restored():
    gradients = []
    for compiled in (False, True):
        module = MaskedModule(compiled_only=True)
        if compiled:
            torch._dynamo.reset()
            module.compile(backend="eager", fullgraph=True)
        callback = ReCoCallback(SETTINGS.sampler, engine="frozen")
        loader = DataLoader(IDS, batch_size=2)
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=1.0)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(accelerator="cpu", max_steps=3, callbacks=[callback], enable_model_summary=False, **quiet).fit(
            module, loader
        )
        gradients.append([value.detach() for value in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
