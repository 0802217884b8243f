# SPDX-License-Identifier: Apache-2.0
"""The LightningModule around the reference network: plain full-sequence training on token batches."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch.distributed.fsdp import FSDPModule, fully_shard
from typing_extensions import override

from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.support.argument_checks import check_betas, check_finite, check_int
from reco_lightning.support.block_stacks import block_stacks

__all__ = ["VideoModel", "adamw_with_warmup", "weight_decay_groups"]


def weight_decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sorts parameters into groups for AdamW: matrices decay, embeddings, norms and biases do not.

    Args:
        module: The module to train.
        weight_decay: Decay of the matrices, 0 or more.

    Returns:
        Two optimizer groups, in the order of ``named_parameters``.
    """
    tables = {id(p) for m in module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trained if p.ndim < 2 or id(p) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def adamw_with_warmup(module: pl.LightningModule) -> OptimizerLRSchedulerConfig | OptimizerConfig:
    """Builds an AdamW whose learning rate rises linearly during the warm-up and is constant afterwards.

    Args:
        module: The module to train; its ``hparams`` hold ``learning_rate``, ``weight_decay``, ``betas`` and
            ``warmup_steps``.

    Returns:
        What ``configure_optimizers`` returns.
    """
    optimizer = torch.optim.AdamW(
        weight_decay_groups(module, module.hparams["weight_decay"]),
        lr=module.hparams["learning_rate"],
        betas=tuple(module.hparams["betas"]),
    )
    warmup = module.hparams["warmup_steps"]
    if not warmup:
        return {"optimizer": optimizer}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class VideoModel(pl.LightningModule):
    """Trains a reference network, or LARP's, on batches ``{"tokens": (B, N) int64, "label": (B,) int64}``.

    Args:
        network: The network, or its ``config`` as a checkpoint stores it.
        learning_rate: Peak learning rate of AdamW, above 0.
        weight_decay: Decay of the weight matrices, 0 or more.
        betas: AdamW's averaging constants.
        warmup_steps: Steps over which the learning rate rises from 0, 0 or more; it is constant afterwards.
        label_dropout: Share of the training samples whose class is hidden, [0, 1): what classifier-free guidance needs.

    Raises:
        ValueError: If an argument is out of its range, or a batch does not fit the network.

    Example:
        >>> model = VideoModel(VideoTransformer(vocab_size=32, grid=(2, 2, 2), dim=32, depth=1, heads=2))
        >>> model.configure_optimizers()["optimizer"].defaults["lr"]
        0.0001
    """

    def __init__(
        self,
        network: VideoTransformer | LARPTransformer | dict[str, Any],
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_finite(above=0, learning_rate=learning_rate)
        check_finite(label_dropout=label_dropout)
        check_finite(at_least=0, weight_decay=weight_decay)
        check_int(at_least=0, warmup_steps=warmup_steps)
        check_betas(betas=betas)
        if not isinstance(network, (VideoTransformer, LARPTransformer, Mapping)):
            raise ValueError(
                "network must be a VideoTransformer, a LARPTransformer or the arguments of one of them, got a "
                f"{type(network).__name__}"
            )
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {label_dropout}")
        self.save_hyperparameters(ignore=["network"])
        if isinstance(network, Mapping):
            network = LARPTransformer(**network) if "video_tokens" in network else VideoTransformer(**network)
        self.network = network
        self.save_hyperparameters({"network": dict(self.network.config)})
        self._seed: int | None = None

    @override
    def configure_model(self) -> None:
        """Shards blocks and network where the strategy has a device mesh (``ModelParallelStrategy``, FSDP2)."""
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for blocks in block_stacks(self.network).values():
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    @override
    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the logits for the tokens of full samples.

        Args:
            tokens: Token ids, (B, N) int64.
            labels: Classes, (B,) int64, or ``None``.

        Returns:
            Logits (B, N, V), those of row r for token r; (B, N - 1, V) for the tokens from the second on where the
            network has no start token.
        """
        return self.network(tokens[:, :-1], labels)

    @override
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy over the whole sequence."""
        tokens, labels = self._unpack(batch)
        if labels is not None and self.hparams["label_dropout"]:
            hidden = torch.rand(labels.shape, device=labels.device) < self.hparams["label_dropout"]
            labels = labels.masked_fill(hidden, self.network.num_classes)
        logits, targets = self._predict(tokens, labels)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    @override
    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy over the whole sequence."""
        return self._evaluate("val", batch)

    @override
    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy over the whole sequence."""
        return self._evaluate("test", batch)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Samples videos.

        Args:
            batch: What `GenerationRequests` asks for: ``index`` (B,) of the videos, and where wanted
                ``condition``, ``first_tokens`` (B, m) and other ``options`` of ``generate``.
            batch_idx: Number of the batch.

        Returns:
            ``index`` (B,) and ``tokens`` (B, L * h * w).

        Raises:
            ValueError: If the batch holds no requests.
        """
        if "index" not in batch:
            raise ValueError(
                f"predict samples videos, so a batch must hold 'index', got {sorted(batch)}; "
                "use --data reco_lightning.pipelines.predict.requests.GenerationRequests"
            )
        index = batch["index"]
        tokens = generate(
            self,
            len(index),
            indices=index.tolist(),
            condition=batch.get("condition"),
            first_tokens=batch.get("first_tokens"),
            batch_size=len(index),
            **batch.get("options", {}),
        )
        return {"index": index, "tokens": tokens}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the seed of the run's dropout: a resumed run draws what the uninterrupted one would have."""
        checkpoint["dropout_seed"] = self._seed

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the seed of the run's dropout back."""
        self._seed = checkpoint.get("dropout_seed")

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes the dropout of a batch a function of the run's seed, the batch's number and the rank."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(random.Random(f"{self._seed}:{number}:{self.global_rank}").getrandbits(63))

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | OptimizerConfig:
        """Returns AdamW; the learning rate rises linearly during the warm-up."""
        return adamw_with_warmup(self)

    def _evaluate(self, stage: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens, labels = self._unpack(batch)
        logits, targets = self._predict(tokens, labels)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(tokens), sync_dist=True)
        return loss

    def _predict(self, tokens: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self(tokens, labels)
        return logits, tokens[:, -logits.shape[1] :]

    def _unpack(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = batch["tokens"].flatten(1)
        if tokens.shape[1] != self.network.num_tokens:
            raise ValueError(
                f"batch['tokens'] must hold {self.network.num_tokens} tokens a sample, the grid {self.network.grid}; "
                f"got {tokens.shape[1]}: the shards were made for another grid"
            )
        return tokens, batch["label"] if self.network.num_classes else None
