# SPDX-License-Identifier: Apache-2.0
"""The mixin in a LightningModule of one's own: the training step asks for a window and says what becomes of it.

    python examples/own_module.py

A token for the class in front of the video is a prefix of one row. `windowed` gives logits, targets and states of the
window, which the step logs as it likes; `reco_loss` is their cross-entropy plus the continuity of the states.
Validation and sampling run the plain network.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reco_lightning import ReCoMixin, WindowSampler

BLOCKS, CELLS, COLOURS, WIDTH = 5, 16, 8, 32
TOKENS = BLOCKS * CELLS


def moving_pictures(count: int, seed: int = 0) -> TensorDataset:
    """Clips (count, TOKENS) of a random picture that moves by a cell a block, and its palette, (count,) of 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    palette = torch.randint(2, (count,), generator=draw)
    picture = torch.randint(COLOURS // 2, (count, CELLS), generator=draw) + COLOURS // 2 * palette[:, None]
    return TensorDataset(torch.cat([picture.roll(block, 1) for block in range(BLOCKS)], 1), palette)


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


class OwnModule(ReCoMixin, pl.LightningModule):
    """A GPT over video tokens behind a token for the class; `forward` gives the logits (B, TOKENS, COLOURS)."""

    def __init__(self) -> None:
        super().__init__()
        self.palette, self.embedding = nn.Embedding(2, WIDTH), nn.Embedding(COLOURS, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, COLOURS))
        sampler = WindowSampler(frame_blocks=BLOCKS, tokens_per_block=CELLS)
        self.init_reco(sampler, blocks="blocks", head="head", prefix_tokens=1, continuity_weight=0.1)

    def forward(self, tokens: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.palette(palette)[:, None], self.embedding(tokens[:, :-1])], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens, palette = batch
        step = self.windowed(self, tokens, palette, targets=tokens)  # step.logits: (B * W, COLOURS), no other rows
        self.log("train/accuracy", (step.logits.argmax(-1) == step.targets).float().mean())
        return self.reco_loss(step)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        tokens, palette = batch
        losses = F.cross_entropy(self(tokens, palette).transpose(1, 2), tokens, reduction="none")  # (B, TOKENS)
        self.log_dict({"val/loss": losses.mean(), "val/last_block": losses[:, -CELLS:].mean()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=6e-3)


def main(steps: int = 300) -> dict[str, float]:
    """Trains in windows; returns what was logged: validation losses in nats per token, and a window's accuracy."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = OwnModule()
    trainer.fit(module, DataLoader(moving_pictures(8 * steps), batch_size=8))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged |= trainer.validate(module, DataLoader(moving_pictures(64, seed=1), batch_size=64), verbose=False)[0]
    print(f"after {steps} steps: " + ", ".join(f"{name} {value:.3f}" for name, value in logged.items()))
    return logged


if __name__ == "__main__":
    main()
