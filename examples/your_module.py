# SPDX-License-Identifier: Apache-2.0
"""The callback on a module that knows nothing of it: one more entry in the trainer's callbacks.

    python examples/your_module.py

The module has a network of its own (blocks, head, learned positions) and a plain training step. `explain` says what the
callback would use and what a step would cost; then both trainings run on the same moving squares.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, WindowSampler, explain

BLOCKS, ROWS, COLUMNS, VOCAB, WIDTH = 5, 4, 4, 16, 64
TOKENS = BLOCKS * ROWS * COLUMNS


def moving_squares(count: int, seed: int = 0) -> torch.Tensor:
    """Clips of a square that moves over a torus at a constant speed, as token ids (count, TOKENS)."""
    draw = torch.Generator().manual_seed(seed)
    start, speed = (torch.randint(4, (2, count, 1), generator=draw) for _ in range(2))
    colour = torch.randint(1, VOCAB, (count,), generator=draw)
    time = torch.arange(BLOCKS)
    row, column = (start[0] + speed[0] * time) % ROWS, (start[1] + speed[1] * time) % COLUMNS  # (count, BLOCKS)
    clips = torch.zeros(count, BLOCKS, ROWS * COLUMNS, dtype=torch.long)
    clips.scatter_(2, (row * COLUMNS + column)[..., None], colour[:, None, None].expand(-1, BLOCKS, 1))
    return clips.flatten(1)


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class MyModule(pl.LightningModule):
    """A GPT over video tokens, with a plain training step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1]) + self.position[: TOKENS - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.loss(tokens)

    def validation_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def train(steps: int, *callbacks: pl.Callback) -> float:
    """Validation loss after so many steps, in nats per token."""
    pl.seed_everything(0, verbose=False)
    module = MyModule()
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(moving_squares(8 * steps), batch_size=8))
    return trainer.validate(module, DataLoader(moving_squares(64, seed=1), batch_size=64), verbose=False)[0]["val/loss"]


def main(steps: int = 300) -> dict[str, float]:
    """Trains plainly and with the callback; returns both validation losses."""
    sampler = WindowSampler(frame_blocks=BLOCKS, tokens_per_block=ROWS * COLUMNS)
    print(explain(MyModule(), moving_squares(8), ReCoCallback(sampler)))
    losses = {"plain": train(steps), "reco": train(steps, ReCoCallback(sampler))}
    print(f"validation loss after {steps} steps: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return losses


if __name__ == "__main__":
    main()
