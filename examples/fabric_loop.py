# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own on Lightning's Fabric: the mixin without a trainer, with the number of the step given.

    python examples/fabric_loop.py
    python examples/fabric_loop.py --devices 2 --precision bf16-mixed

Fabric wraps the module for precision and strategy, and only what runs inside `forward` is wrapped: so `forward` is the
loss of a window. The window depends on the step alone, so all processes draw the same one.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from reco_lightning import ReCoMixin, VideoTransformer, WindowSampler

BLOCKS, CELLS, COLOURS = 5, 16, 8


def moving_pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Clips of a random picture that moves by a cell a block, as token ids (count, BLOCKS * CELLS)."""
    pictures = torch.randint(COLOURS, (count, CELLS), generator=torch.Generator().manual_seed(seed))
    return torch.cat([pictures.roll(block, 1) for block in range(BLOCKS)], 1)


class WindowLoss(ReCoMixin, nn.Module):
    """A network, and as `forward` its loss on the window of a step; on all tokens where no gradient is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.network = VideoTransformer(vocab_size=COLOURS, grid=(BLOCKS, 4, 4), dim=32, depth=2, heads=4)
        self.init_reco(WindowSampler(BLOCKS, CELLS), blocks="network.blocks", head="network.head", prefix_tokens=1)

    def forward(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.cross_entropy(self.network(tokens[:, :-1]).transpose(1, 2), tokens)
        return self.reco_loss(self.windowed(self.network, tokens[:, :-1], targets=tokens, step=step))


def main(steps: int = 300, **options) -> float:
    """Trains, and returns the validation loss in nats per token.

    Args:
        steps: Steps of the optimizer.
        **options: Arguments of Fabric.
    """
    fabric = Fabric(accelerator="cpu", **options)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    module = WindowLoss()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=6e-3))
    batches = DataLoader(moving_pictures(8 * steps), batch_size=8 // fabric.world_size)
    for step, tokens in enumerate(fabric.setup_dataloaders(batches)):
        fabric.backward(model(tokens, step))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        loss = float(model(moving_pictures(64, seed=1), steps))
    fabric.print(f"validation loss after {steps} steps: {loss:.3f}")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    main(**vars(parser.parse_args()))
