# SPDX-License-Identifier: Apache-2.0
"""The LightningModule for text-to-video: plain full-sequence training on batches of captions and video tokens."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.models.text_video.sharded_build import build_sharded, shard
from reco_lightning.models.video_model import adamw_with_warmup
from reco_lightning.support.argument_checks import check_betas, check_finite, check_flag, check_int

__all__ = ["TextVideoModel"]


class TextVideoModel(pl.LightningModule):
    """Trains a network on batches ``{"caption": (B, C) int64, "tokens": (B, N) int64}``; a caption's -1 are padding.

    The loss is over the whole vocabulary, text and video, for the N video tokens alone. C may differ from batch to
    batch. The network is built in ``configure_model``, under ``ModelParallelStrategy`` (FSDP2) in shards.

    Args:
        network: The network, not built, or its ``config`` as a checkpoint stores it.
        learning_rate: Peak learning rate of AdamW, above 0.
        weight_decay: Decay of the weight matrices, 0 or more.
        betas: AdamW's averaging constants.
        warmup_steps: Steps over which the learning rate rises from 0, 0 or more; it is constant afterwards.
        caption_dropout: Share of the training samples whose caption is hidden, [0, 1): what classifier-free guidance
            needs. Which ones depends on the batch's number and the process alone.
        gradient_checkpointing: Whether to keep the layers' inputs alone and run each again in the backward pass.

    Raises:
        ValueError: If an argument is out of its range, or a batch does not fit the network.

    Example:
        >>> llama = {"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32}
        >>> llama |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = TextVideoModel(TextVideoNetwork(vocab_size=6, grid=(2, 1, 2), architecture=llama))
        >>> model.configure_model()
        >>> model.configure_optimizers()["optimizer"].defaults["lr"]
        0.0001
    """

    def __init__(
        self,
        network: TextVideoNetwork | dict[str, Any],
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        caption_dropout: float = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_finite(above=0, learning_rate=learning_rate)
        check_finite(caption_dropout=caption_dropout)
        check_finite(at_least=0, weight_decay=weight_decay)
        check_int(at_least=0, warmup_steps=warmup_steps)
        check_betas(betas=betas)
        check_flag(gradient_checkpointing=gradient_checkpointing)
        if not isinstance(network, (TextVideoNetwork, Mapping)):
            raise ValueError(
                f"network must be a TextVideoNetwork or the arguments of one, got a {type(network).__name__}"
            )
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {caption_dropout}")
        self.save_hyperparameters(ignore=["network"])
        self.network = TextVideoNetwork(**network) if isinstance(network, Mapping) else network
        self.save_hyperparameters({"network": dict(self.network.config)})
        self._batch_number = 0

    @override
    def configure_model(self) -> None:
        """Builds the network; in shards where the strategy has a device mesh (``ModelParallelStrategy``, FSDP2)."""
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        built = self.network.language_model is not None
        if not built and mesh is not None:
            build_sharded(self.network, mesh)
        elif not built:
            self.network.build()
        elif mesh is not None and not isinstance(self.network.language_model, FSDPModule):
            shard(self.network, mesh)
        if self.hparams["gradient_checkpointing"]:
            self.network.checkpoint_activations()

    @override
    def forward(self, captions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits for the tokens of full samples.

        Args:
            captions: Text ids, (B, C) int64; -1 is padding.
            tokens: Video ids, (B, N) int64, counted from 0.

        Returns:
            (B, N, T + V + 1), those of row r for token r; of video id v in column T + v.
        """
        return self.network(captions, tokens[:, :-1])

    @override
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy over the whole video."""
        captions, tokens = self._unpack(batch)
        loss = self._loss(captions.masked_fill(self._hidden(len(captions)).to(captions.device)[:, None], -1), tokens)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    @override
    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy over the whole video, behind its caption."""
        return self._evaluate("val", batch)

    @override
    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy over the whole video, behind its caption."""
        return self._evaluate("test", batch)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Samples videos.

        Args:
            batch: What `CaptionRequests` asks for: ``index`` (B,) of the videos, ``caption`` (B, C) and ``options`` of
                ``generate_from_text``.
            batch_idx: Number of the batch.

        Returns:
            ``index`` (B,) and ``tokens`` (B, N).

        Raises:
            ValueError: If the batch holds no requests.
        """
        if "index" not in batch:
            raise ValueError(
                f"predict samples videos, so a batch must hold 'index', got {sorted(batch)}; "
                "use --data reco_lightning.pipelines.predict.caption_requests.CaptionRequests"
            )
        index = batch["index"]
        options = {name: value for name, value in batch.get("options", {}).items() if name != "context_blocks"}
        tokens = generate_from_text(self, batch["caption"], indices=index.tolist(), batch_size=len(index), **options)
        return {"index": index, "tokens": tokens}

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Notes the batch's number in the run, which decides whose caption is hidden."""
        self._batch_number = self.trainer.fit_loop.epoch_loop.total_batch_idx

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | OptimizerConfig:
        """Returns AdamW; the learning rate rises linearly during the warm-up."""
        return adamw_with_warmup(self)

    def _evaluate(self, stage: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        captions, tokens = self._unpack(batch)
        loss = self._loss(captions, tokens)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(tokens), sync_dist=True)
        return loss

    def _loss(self, captions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = self(captions, tokens)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten() + self.network.text_ids)

    def _hidden(self, count: int) -> torch.Tensor:
        """Whose caption is hidden in this batch, (B,)."""
        seed = random.Random(f"{self._batch_number}:{self.global_rank}").getrandbits(63)
        draws = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        return draws < self.hparams["caption_dropout"]

    def _unpack(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if "caption" not in batch:
            raise ValueError(
                f"a batch must hold 'caption' and 'tokens', got {sorted(batch)}; use --data "
                "reco_lightning.data.tokens.caption_module.CaptionDataModule"
            )
        captions, tokens = batch["caption"], batch["tokens"].flatten(1)
        if tokens.shape[1] != self.network.num_tokens:
            raise ValueError(
                f"batch['tokens'] must hold {self.network.num_tokens} tokens a sample, the grid {self.network.grid}; "
                f"got {tokens.shape[1]}: the shards were made for another grid"
            )
        return captions, tokens


# Checkpoints of version 0.1 name the class by this module, and Lightning looks it up among the imported ones alone.
sys.modules.setdefault("reco_lightning.models.text_video_model", sys.modules[__name__])
