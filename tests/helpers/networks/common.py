# SPDX-License-Identifier: Apache-2.0
"""What the foreign networks share: sizes, batches, and the LightningModule around each."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB, BLOCKS, PER_BLOCK, DIM, DEPTH, HEADS, BATCH, CLASSES = 20, 5, 6, 32, 2, 4, 3, 4
GRID = (BLOCKS, 2, 3)
TOKENS = BLOCKS * PER_BLOCK
RATES = "p", "dropout", "attention_dropout"


def draw_ids(seed: int) -> torch.Tensor:
    """Tokens (B, N)."""
    return torch.randint(VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))


def draw_labeled(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, N) and classes (B,)."""
    return draw_ids(seed), torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))


def draw_grid(seed: int) -> torch.Tensor:
    """Tokens (B, T, H, W)."""
    return draw_ids(seed).view(-1, *GRID)


def draw_named(seed: int) -> dict[str, torch.Tensor]:
    """A dictionary, as token shards give it."""
    ids, labels = draw_labeled(seed)
    return {"tokens": ids, "label": labels}


class TokenModule(pl.LightningModule):
    """A LightningModule that trains and validates by one loss."""

    def loss(self, batch):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch), batch_size=BATCH)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def flat_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class Blocks(nn.Module):
    """A stack of blocks, entered through activation checkpointing where ``checkpointing`` is set."""

    def __init__(self, blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.checkpointing = False

    def forward(self, x, *args):
        for layer in self.layers:
            x = checkpoint(layer, x, *args, use_reentrant=False) if self.checkpointing else layer(x, *args)
            x = x[0] if isinstance(x, tuple) else x
        return x


def switch_checkpointing(module: nn.Module) -> None:
    """Turns the checkpointing of every ``Blocks`` on, or off where it was on."""
    for part in module.modules():
        if isinstance(part, Blocks):
            part.checkpointing = not part.checkpointing


def feed_forward(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM), nn.Dropout(dropout))


def split_heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:2], -1, DIM // HEADS).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def quieten(module):
    """Switches dropout off, so that two ways to compute one thing can be compared."""
    for part in module.modules():
        for name in RATES:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module
