# SPDX-License-Identifier: Apache-2.0
"""Fits of a tiny text-to-video model in one process or two, from the 7B recipe's own keys.

Run as ``python -m tests.helpers.text_video FOLDER CASE...``; Lightning starts the second process by the same line.
Every process writes what it saw to ``FOLDER/CASE.RANK.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset

import reco_lightning
from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.models.text_video.lightning_module import TextVideoModel
from reco_lightning.models.text_video.network import TextVideoNetwork
from tests.helpers.distributed import BATCH, RANKS, RATE, SEED, STEPS, Recorder

RECIPES = Path(reco_lightning.__file__).parent / "recipes"
TEXT, VIDEO, GRID = 15, 8, (5, 1, 2)
SMALL = {
    "vocab_size": TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CASES = ("fresh", "pretrained", "tied")  # "pretrained" begins from FOLDER/llama


class Model(TextVideoModel):
    """With an optimizer that shows gradients as they are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Plan(pl.Callback):
    """How every parameter lies on this process: whole shape, shape here, and whether in equal shares over the ranks."""

    def __init__(self) -> None:
        self.plan: dict[str, tuple[list[int], list[int], str]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, weight in pl_module.named_parameters():
            if isinstance(weight, DTensor):
                how = f"{weight.placements} on {weight.device_mesh.size()}"
                self.plan[name] = (list(weight.shape), list(weight.to_local().shape), how)


def recipe() -> dict[str, Any]:
    """The model of the 7B recipe, as its file has it."""
    return yaml.safe_load((RECIPES / "model" / "llama-7b.yaml").read_text())["model"]["init_args"]


def model(name: str, folder: Path) -> TextVideoModel:
    """The 7B recipe's model made small; captions are not hidden, since which depends on the rank."""
    arguments = recipe()
    network = arguments.pop("network")["init_args"] | {"vocab_size": VIDEO, "grid": GRID}
    network["architecture"] |= SMALL | {"tie_word_embeddings": name == "tied"}
    if name == "pretrained":
        network |= {"pretrained": str(folder / "llama"), "architecture": None}
    return Model(TextVideoNetwork(**network), **(arguments | {"caption_dropout": 0.0}))


def data(rank: int, ranks: int) -> DataLoader:
    """A rank's share of one stream of samples, captions of 0 to 3 words."""
    draw = torch.Generator().manual_seed(0)
    count = STEPS * BATCH
    captions = torch.randint(TEXT, (count, 3), generator=draw)
    captions[torch.arange(3) < torch.randint(4, (count, 1), generator=draw)] = -1
    tokens = torch.randint(VIDEO, (count, 10), generator=draw)
    samples = [{"caption": c, "tokens": t} for c, t in zip(captions, tokens, strict=True)]
    return DataLoader(Subset(samples, range(rank, count, ranks)), batch_size=BATCH // ranks)


def fit(name: str, folder: Path, strategy: Strategy | str = "auto", ranks: int = 1) -> dict[str, Any]:
    """Runs a case in this process, on its share of the data, and returns what it saw."""
    torch.manual_seed(0)
    module, recorder, plan = model(name, folder), Recorder(), Plan()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=1,
        use_distributed_sampler=False,  # the shares of `data` are those that the test counts on
        callbacks=[ReCoCallback(WindowSampler(GRID[0], 2, seed=SEED)), recorder, plan],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(trainer.global_rank, ranks))
    made = generate_from_text(module, torch.tensor([[-1, 3], [4, 5]]), cfg_scale=2.0)
    return recorder.seen | {"plan": plan.plan, "videos": made}


def main(folder: str, *names: str) -> None:
    """Runs cases one after the other on ``RANKS`` processes."""
    for name in names:
        strategy = ModelParallelStrategy(RANKS, 1)
        seen = fit(name, Path(folder), strategy, RANKS)
        torch.save(seen, Path(folder) / f"{name}.{strategy.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
