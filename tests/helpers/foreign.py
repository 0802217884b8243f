# SPDX-License-Identifier: Apache-2.0
"""LightningModules that know nothing of windows, as users write them, each with its loss written in its own way.

``cut`` in the network writes attention out and cuts the gradients of the first rows' keys and values.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

VOCAB, BLOCKS, PER_BLOCK, DIM = 20, 5, 6, 32
TOKENS = BLOCKS * PER_BLOCK

STEP_OPTIONS = (
    {},
    {"context": "keys"},
    {"context": "attached"},
    {"context": "dropped"},
    {"engine": "prefix"},
    {"engine": "masked"},
    {"windows_per_batch": 2},
    {"chunked_loss": False},
    {"continuity_balanced": True},
    {"loss_aware": 1.0},
)
"""Options of the callback that make a step another one."""


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.cut: int | None = None

    def forward(self, x):
        batch, rows, _ = x.shape
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.cut is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            context = torch.arange(rows) < self.cut
            frozen = ~context[:, None] & context[None, :]
            scores = torch.where(frozen, q @ k.detach().mT, q @ k.mT) / (DIM // 2) ** 0.5
            weights = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf")).softmax(-1)
            y = (weights * frozen) @ v.detach() + (weights * ~frozen) @ v
        return self.o(y.transpose(1, 2).reshape(batch, rows, DIM))


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = SelfAttention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM), nn.Dropout(dropout))

    def forward(self, x, scale=None):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x)) * (1 if scale is None else scale)


class Network(nn.Module):
    """A GPT with learned positions; ``loss_inside`` computes the loss in its forward."""

    def __init__(self, *, sequential=False, dropout=0.0, zero_head=False, vocab=VOCAB, depth=3):
        super().__init__()
        self.wte = nn.Embedding(vocab, DIM)
        self.wpe = nn.Parameter(torch.randn(1, TOKENS + 8, DIM) * 0.2)
        layers = [Layer(dropout) for _ in range(depth)]
        self.h = nn.Sequential(*layers) if sequential else nn.ModuleList(layers)
        self.ln_f = nn.LayerNorm(DIM)
        self.lm_head = nn.Linear(DIM, vocab, bias=False)
        if zero_head:
            nn.init.zeros_(self.lm_head.weight)

    def forward(self, ids, prefix=None, targets=None):
        x = self.wte(ids)
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        x = x + self.wpe[:, : x.shape[1]]
        if isinstance(self.h, nn.Sequential):
            x = self.h(x)
        else:
            scale = torch.full((len(x), 1, 1), 0.9, device=x.device)
            for layer in self.h:
                x = layer(x, scale)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)

    def set_cut(self, cut):
        for layer in self.h:
            layer.attention.cut = cut


class Base(pl.LightningModule):
    prefix = 0

    def __init__(self, **options):
        super().__init__()
        self.net = Network(**options)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ShiftedInput(Base):
    """No prefix; tokens in the batch, the last one not fed; (B * L, V)."""

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        logits = self.net(ids[:, :-1])
        return F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


class FullInput(Base):
    """No prefix; all tokens fed, the last row of logits thrown away; a nn.CrossEntropyLoss with label smoothing."""

    def __init__(self, **options):
        super().__init__(**options)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        return self.criterion(self.net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class LossInside(Base):
    """nanoGPT's form: the network computes the loss, the last target is ignored."""

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -1)], dim=1)
        return self.net(ids, targets=targets)[1]


class PrefixAndTokenizer(Base):
    """A prefix of three rows; tokens made in the step by a frozen tokenizer with blocks of its own; (B, V, T, H, W)."""

    prefix = 3

    def __init__(self, **options):
        super().__init__(**options)
        self.prompt = nn.Parameter(torch.randn(1, 3, DIM) * 0.2)
        self.tokenizer = nn.Sequential(*[Layer(0.0) for _ in range(2)]).requires_grad_(False)

    @torch.no_grad()
    def encode(self, ids):
        return (ids + self.tokenizer(torch.zeros(1, 2, DIM)).sum().sign().long() * 0) % VOCAB

    def training_step(self, batch, batch_idx):
        ids = self.encode(batch[0])
        logits = self.net(ids[:, :-1], prefix=self.prompt.expand(len(ids), -1, -1))[:, 2:]
        grid = logits.transpose(1, 2).view(len(ids), VOCAB, BLOCKS, 2, 3)
        return F.cross_entropy(grid, ids.view(-1, BLOCKS, 2, 3))


class ManualOptimisation(Base):
    """Manual optimisation with two optimizers; the step returns nothing."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.other = nn.Linear(2, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.1)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(self.other(torch.ones(1, 2)).square().sum())
        second.step()
        ids = batch[0]
        loss = F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        first.zero_grad()
        self.manual_backward(loss)
        first.step()


class UnreducedLoss(Base):
    """``reduction="none"`` followed by a mean, after an unrelated cross-entropy of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.other = nn.Linear(2, 3)

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        other = F.cross_entropy(self.other(torch.ones(2, 2)), torch.tensor([0, 1]))
        losses = F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).mean() + other * 0


class EncoderLayers(pl.LightningModule):
    """``nn.TransformerEncoder`` with a causal mask and a start token."""

    prefix = 1

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + 1, DIM)
        self.position = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.2)
        layer = nn.TransformerEncoderLayer(DIM, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.out = nn.Linear(DIM, VOCAB)

    def forward(self, ids):
        start = torch.full((len(ids), 1), VOCAB)
        x = self.embedding(torch.cat([start, ids], dim=1)) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.encoder(x, mask=mask))

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


MODULES = (ShiftedInput, FullInput, LossInside, PrefixAndTokenizer, ManualOptimisation, UnreducedLoss)


def batches(count: int = 3, size: int = 4, seed: int = 0) -> torch.utils.data.DataLoader:
    ids = torch.randint(VOCAB, (count * size, TOKENS), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=size)


def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **(defaults | options),
    )
