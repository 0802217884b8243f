# SPDX-License-Identifier: Apache-2.0
"""A Weights & Biases sweep over the weight of the continuity and the probability of the first window.

    python examples/wandb_sweep.py                         # makes the sweep and runs it; needs `wandb login`
    python examples/wandb_sweep.py --agent TEAM/PROJECT/ID # another machine takes part in it
    WANDB_MODE=offline python examples/wandb_sweep.py      # every setting in turn, without the service

Every trial is a W&B run with its setting as config, and `val/loss` is what the sweep compares. Offline runs form the
group `offline-sweep`; `wandb sync` uploads them later.
"""

from __future__ import annotations

import argparse
import itertools
import os

import lightning.pytorch as pl
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler

BLOCKS, CELLS, COLOURS = 5, 16, 8
PROJECT = "reco-sweep"
SWEEP = {
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {"continuity_weight": {"values": [0.0, 0.1]}, "first_window_prob": {"values": [0.25, 0.5]}},
}


def moving_pictures(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Clips of a random picture that moves by a cell a block, as token ids (BLOCKS * CELLS,)."""
    pictures = torch.randint(COLOURS, (count, CELLS), generator=torch.Generator().manual_seed(seed))
    return [{"tokens": torch.cat([picture.roll(block) for block in range(BLOCKS)])} for picture in pictures]


def trial(steps: int, **start: object) -> tuple[dict[str, float], float]:
    """Trains with the setting of a W&B run; returns it, and the validation loss in nats per token.

    Args:
        steps: Steps of the optimizer.
        **start: Arguments of `wandb.init`. In an agent the service gives the config.
    """
    with wandb.init(project=PROJECT, **start) as run:
        setting = {name: float(run.config[name]) for name in SWEEP["parameters"]}
        pl.seed_everything(0, verbose=False)
        network = VideoTransformer(vocab_size=COLOURS, grid=(BLOCKS, 4, 4), dim=32, depth=2, heads=4)
        model = VideoModel(network, learning_rate=6e-3)
        sampler = WindowSampler(BLOCKS, CELLS, first_window_prob=setting["first_window_prob"])
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[ReCoCallback(sampler, continuity_weight=setting["continuity_weight"])],
            logger=WandbLogger(experiment=run),
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        validation = DataLoader(moving_pictures(64, seed=1), batch_size=64)
        trainer.fit(model, DataLoader(moving_pictures(8 * steps), batch_size=8), validation)
        loss = float(trainer.callback_metrics["val/loss"])
    print(f"{setting}: validation loss {loss:.3f}")
    return setting, loss


def main(steps: int = 200, agent: str | None = None) -> list[tuple[dict[str, float], float]]:
    """Runs the sweep, or takes part in one; returns the setting and the validation loss of each trial of this process.

    Args:
        steps: Steps of the optimizer in each trial.
        agent: The sweep to take part in; None makes one.
    """
    trials: list[tuple[dict[str, float], float]] = []
    if os.environ.get("WANDB_MODE") == "offline":
        choices = [each["values"] for each in SWEEP["parameters"].values()]
        for values in itertools.product(*choices):
            trials.append(
                trial(steps, config=dict(zip(SWEEP["parameters"], values, strict=True)), group="offline-sweep")
            )
    else:
        wandb.agent(agent or wandb.sweep(SWEEP, project=PROJECT), lambda: trials.append(trial(steps)))
    if trials:
        print(f"best: {min(trials, key=lambda each: each[1])[0]}")
    return trials


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--agent", help="TEAM/PROJECT/ID of a sweep to take part in")
    main(agent=parser.parse_args().agent)
