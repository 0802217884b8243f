# SPDX-License-Identifier: Apache-2.0
"""Fits that run in one process or in several, and what each process saw of them.

Run as ``python -m tests.helpers.distributed STRATEGY FOLDER CASE...``; Lightning starts the second process by the same
line. Every process writes what it saw to ``FOLDER/CASE.RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset
from transformers import LlamaConfig, LlamaForCausalLM

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from tests.helpers import foreign
from tests.helpers.networks import common, heads

VOCAB, GRID, CLASSES = 24, (5, 2, 3), 3
TOKENS, PER_BLOCK = 30, 6
RANKS, BATCH, STEPS = 2, 4, 4
RATE = 0.1
SEED = 7  # windows from the tokens 12, 18, 0 and 12 on; in two groups 0 and 18, 0 and 18, 0 and 6, 0 and 18


def shard(module: pl.LightningModule, blocks: nn.ModuleList, network: nn.Module) -> None:
    """FSDP2, where the strategy asks for it: every block, then what is left of the network."""
    if module.device_mesh is not None:
        mesh = module.device_mesh["data_parallel"]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)


class Reference(VideoModel):
    """The reference network with classes: rows that only a first window trains."""

    def __init__(self) -> None:
        network = VideoTransformer(vocab_size=VOCAB, grid=GRID, dim=32, depth=3, heads=2, num_classes=CLASSES)
        super().__init__(network, label_dropout=0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Llama(pl.LightningModule):
    """A network of transformers that computes its loss itself (``labels``) or leaves it to the step."""

    def __init__(self, *, labels: bool, checkpointing: bool = False) -> None:
        super().__init__()
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).train()
        self.labels = labels
        if checkpointing:
            getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)()

    def configure_model(self) -> None:
        shard(self, self.model.model.layers, self.model)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        ids = batch["tokens"]
        if self.labels:
            return self.model(input_ids=ids, labels=ids).loss
        return F.cross_entropy(self.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class TooLong(Llama):
    """Gets one block more than the sampler holds, on some ranks."""

    def __init__(self, *, ranks: Collection[int]) -> None:
        super().__init__(labels=True)
        self.ranks = ranks

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        longer = PER_BLOCK if self.global_rank in self.ranks else 0
        return super().training_step({"tokens": F.pad(batch["tokens"], (0, longer))}, batch_idx)


class Prefix(foreign.PrefixAndTokenizer):
    """Rows of a prefix that stands outside the network, so that FSDP2 has to wrap the module and its step."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step([batch["tokens"] % foreign.VOCAB], batch_idx)

    def configure_model(self) -> None:
        shard(self, self.net.h, self)
        if self.device_mesh is not None:
            register_fsdp_forward_method(self, "training_step")


class Tied(heads.FunctionHeadModule):
    """The embedding's weight as the head, inside the network."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch["tokens"] % common.VOCAB)

    def configure_model(self) -> None:
        shard(self, self.network.blocks.layers, self.network)


class WorldModel(heads.WorldModelModule):
    """Three heads behind the network that read some of its rows each, so that FSDP2 has to wrap the module."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch["tokens"] % common.VOCAB)

    def configure_model(self) -> None:
        shard(self, self.network.blocks.layers, self)
        if self.device_mesh is not None:
            register_fsdp_forward_method(self, "training_step")


@dataclass(frozen=True)
class Case:
    """One fit.

    Args:
        module: Makes the LightningModule.
        callback: Further arguments of the callback.
        precision: The trainer's.
        apart: Whether each rank draws windows of its own, which is wrong.
    """

    module: Callable[[], pl.LightningModule]
    callback: dict[str, Any] = field(default_factory=dict)
    precision: Any = "32-true"
    apart: bool = False


CASES = {
    "reference": Case(Reference),
    "reference-windows": Case(Reference, {"windows_per_batch": 2}),
    "llama": Case(partial(Llama, labels=True)),
    "llama-windows": Case(partial(Llama, labels=False), {"windows_per_batch": 2}),
    "llama-checkpointing": Case(partial(Llama, labels=True, checkpointing=True)),
    "prefix": Case(Prefix),
    "prefix-keys": Case(Prefix, {"context": "keys"}),
    "prefix-attached": Case(Prefix, {"context": "attached"}),
    "prefix-dropped": Case(Prefix, {"context": "dropped"}),
    "tied": Case(Tied),
    "world-model": Case(WorldModel),
    "bfloat16": Case(Reference, precision="bf16-true"),
    "apart": Case(Reference, apart=True),
    "refused-by-0": Case(partial(TooLong, ranks=(0,))),
    "refused-by-1": Case(partial(TooLong, ranks=(1,))),
}


class Watched(ReCoCallback):
    """The callback, and how well its proof went."""

    proof: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        select = self.settings.select

        def record(*args: Any, **kwargs: Any) -> Any:
            selection = select(*args, **kwargs)
            self.proof = selection.error
            return selection

        vars(self.settings)["select"] = record


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a weight or gradient, put together from all ranks where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Recorder(pl.Callback):
    """Keeps the window and the gradients of every step and the weights at the end."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"windows": [], "gradients": []}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        trained = [(name, weight) for name, weight in pl_module.named_parameters() if weight.requires_grad]
        gradients = {name: None if weight.grad is None else whole(weight.grad) for name, weight in trained}
        self.seen["gradients"].append(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen["windows"].append(float(trainer.callback_metrics["reco/window_start"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["weights"] = {name: whole(weight) for name, weight in pl_module.named_parameters()}


def data(rank: int, ranks: int) -> DataLoader:
    """A rank's share of one stream of samples: rank r of R takes the samples r, r + R, r + 2 R and so on."""
    ids = torch.randint(VOCAB, (STEPS * BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    samples = [{"tokens": row, "label": torch.tensor(number % CLASSES)} for number, row in enumerate(ids)]
    return DataLoader(Subset(samples, range(rank, len(samples), ranks)), batch_size=BATCH // ranks)


def fit(name: str, strategy: Strategy | str = "auto", ranks: int = 1) -> dict[str, Any]:
    """Runs a case in this process, on its share of the data, and returns what it saw."""
    case = CASES[name]
    rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else 0
    torch.manual_seed(0)
    module, recorder = case.module(), Recorder()
    sampler = WindowSampler(GRID[0], PER_BLOCK, seed=SEED + rank if case.apart else SEED)
    callback = Watched(sampler, **case.callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        precision=case.precision,
        max_epochs=1,
        use_distributed_sampler=False,  # the shares of `data` are those that the test counts on
        callbacks=[callback, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(rank, ranks))
    return recorder.seen | {"proof": callback.proof, "choice": callback.state_dict()["choice"]}


def main(strategy: str, folder: str, *names: str) -> None:
    """Runs cases one after the other on ``RANKS`` processes."""
    for name in names:
        parallel = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(RANKS, 1)
        seen = fit(name, parallel, RANKS)
        torch.save(seen, Path(folder) / f"{name}.{parallel.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
