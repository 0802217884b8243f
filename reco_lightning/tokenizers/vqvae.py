# SPDX-License-Identifier: Apache-2.0
"""A small causal video tokenizer to train yourself.

Trained once on a folder of videos; then its ids, stored as token shards, are what the video model learns.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from reco_lightning.support.argument_checks import check_finite, check_int
from reco_lightning.tokenizers.base import ClipShape, latent_grid, to_unit_range
from reco_lightning.tokenizers.layers import PATCH, build_decoder, build_encoder

__all__ = ["VQVAE", "gradient_loss", "perplexity", "psnr", "rate_factor"]


def psnr(video: Tensor, target: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each clip, both on the [-1, 1] scale.

    Args:
        video: (B, C, T, H, W); values outside [-1, 1] are clipped, as they would be when shown.
        target: The same shape.

    Returns:
        (B,) in dB, at most 100.

    Example:
        >>> import torch
        >>> psnr(torch.full((1, 3, 1, 2, 2), 0.2), torch.zeros(1, 3, 1, 2, 2))
        tensor([20.])
    """
    error = (video.float().clamp(-1, 1) - target.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp_min(4e-10))


def perplexity(ids: Tensor, codebook_size: int) -> Tensor:
    """Returns how many codes are in use, weighted by how often: exp of the entropy of the ids.

    Args:
        ids: Any shape, 0 to codebook_size - 1.
        codebook_size: V.

    Returns:
        Scalar, 1 (one code) to V (all equally often).

    Example:
        >>> import torch
        >>> perplexity(torch.tensor([0, 1, 2, 3]), codebook_size=8)
        tensor(4.)
    """
    share = torch.bincount(ids.flatten(), minlength=codebook_size).float() / ids.numel()
    return torch.exp(-torch.xlogy(share, share).sum())


def gradient_loss(video: Tensor, target: Tensor) -> Tensor:
    """Returns the mean absolute error of the differences between neighbouring frames, rows and columns.

    Args:
        video: (B, C, T, H, W).
        target: The same shape.

    Returns:
        Scalar; axes of length one add nothing.

    Example:
        >>> import torch
        >>> gradient_loss(torch.zeros(1, 1, 1, 1, 3), torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 1, 3))
        tensor(1.)
    """
    axes = [axis for axis in (2, 3, 4) if video.shape[axis] > 1]
    return sum((F.l1_loss(video.diff(dim=axis), target.diff(dim=axis)) for axis in axes), start=video.new_zeros(()))


def rate_factor(step: int, *, warmup_steps: int, decay_steps: int | None) -> float:
    """Returns the share of the learning rate at a step: linear rise, then constant or linear to zero.

    Args:
        step: Optimizer step, from 0.
        warmup_steps: Steps of the rise; 0 for none.
        decay_steps: Step at which zero is reached; None keeps the rate.

    Returns:
        0 to 1.

    Example:
        >>> [rate_factor(step, warmup_steps=2, decay_steps=4) for step in range(5)]
        [0.5, 0.75, 0.5, 0.25, 0.0]
    """
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if decay_steps is not None:
        factor = min(factor, max(0.0, 1 - step / decay_steps))
    return factor


class VQVAE(L.LightningModule):
    """Causal 3-D VQ-VAE with temporal factor 4: the first frame alone, then four frames at a time; a `VideoTokenizer`.

    Codes are compared by direction (cosine). The codebook is set by k-means on the first training batch and follows the
    features by moving average; codes that fall out of use are replaced by features of the batch. Trains on batches
    {"video": uint8 (B, T, H, W, 3)} and logs `train/loss`, `train/reconstruction`, `train/perplexity`, `val/loss` and
    `val/psnr` (dB). Needs the extra `tokenizers` (or `demo`).

    Args:
        codebook_size: V, number of ids.
        spatial_stride: Pixels per id along each side, 8 or 16.
        width: Channels at the highest resolution, a multiple of 8; 32 trains in a minute or two on a CPU.
        depth: Residual blocks per resolution.
        code_dim: Dimensions of a code.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Steps of linear rise of the learning rate.
        decay_steps: Step at which the rate has fallen to zero, linearly; None keeps it constant. Best set to the
            trainer's max_steps.
        mse_weight: Weight of the mean squared error, added to the mean absolute error.
        gradient_weight: Weight of `gradient_loss`; sharpens edges and motion.
        commitment_weight: Weight of the term that holds features near their codes.
        codebook_decay: Moving-average factor of the codebook.
        dead_code_threshold: A code used less than this often per batch (moving average) is replaced.
        seed: Of k-means and code replacement, which are a function of it and of the step.

    Raises:
        ValueError: An argument is out of range.
        ModuleNotFoundError: vector-quantize-pytorch is not installed.

    Example:
        >>> import torch
        >>> tokenizer = VQVAE(codebook_size=16, width=8)
        >>> ids = tokenizer.encode(torch.zeros(2, 3, 9, 32, 32))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3, 9, 32, 32]))
    """

    def __init__(
        self,
        *,
        codebook_size: int = 1024,
        spatial_stride: int = 8,
        width: int = 32,
        depth: int = 1,
        code_dim: int = 8,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
        decay_steps: int | None = None,
        mse_weight: float = 1.0,
        gradient_weight: float = 0.0,
        commitment_weight: float = 0.25,
        codebook_decay: float = 0.9,
        dead_code_threshold: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_int(spatial_stride=spatial_stride, width=width, seed=seed)
        check_int(at_least=2, codebook_size=codebook_size, code_dim=code_dim)
        check_int(at_least=1, depth=depth)
        check_int(at_least=1, or_none=True, decay_steps=decay_steps)
        check_int(at_least=0, warmup_steps=warmup_steps)
        check_finite(above=0, learning_rate=learning_rate)
        check_finite(codebook_decay=codebook_decay)
        check_finite(
            at_least=0,
            weight_decay=weight_decay,
            mse_weight=mse_weight,
            gradient_weight=gradient_weight,
            commitment_weight=commitment_weight,
            dead_code_threshold=dead_code_threshold,
        )
        if spatial_stride not in (8, 16):
            raise ValueError(f"spatial_stride must be 8 or 16, got {spatial_stride}")
        if width < 8 or width % 8:
            raise ValueError(f"width must be a positive multiple of 8 (normalisation groups), got {width}")
        if not 0 <= codebook_decay < 1:
            raise ValueError(f"codebook_decay must be at least 0 and below 1, got {codebook_decay}")
        self.save_hyperparameters()
        self.trained_on: ClipShape | None = None
        self.codebook_size = codebook_size
        self.spatial_stride = spatial_stride
        self.temporal_stride = PATCH
        self.frame_aligned = True
        self.learning_rate = learning_rate
        sizes = {"spatial_stride": spatial_stride, "width": width, "depth": depth, "code_dim": code_dim}
        self.encoder = build_encoder(**sizes)
        self.decoder = build_decoder(**sizes)
        self.quantizer = self._build_quantizer(synchronised=False)
        # k-means leaves an untrained codebook at zero, where every id would be 0
        self.quantizer.codebook = F.normalize(torch.randn(codebook_size, code_dim), dim=-1)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (t, h, w) of the ids of a clip.

        Args:
            frames: T, 1 + a multiple of 4.
            height: H in pixels, a multiple of spatial_stride.
            width: W in pixels, a multiple of spatial_stride.

        Raises:
            ValueError: One of them does not divide.
        """
        return latent_grid(
            frames, height, width, temporal_stride=self.temporal_stride, spatial_stride=self.spatial_stride
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encodes clips to ids; the same in train and eval mode, and nothing is updated.

        Args:
            video: Floating point (B, 3, T, H, W) in [-1, 1].

        Returns:
            int64 (B, t, h, w), 0 to codebook_size - 1; the ids of block k depend on frames 0 to 4k only.

        Raises:
            ValueError: The shape or dtype does not fit.
        """
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(
                f"video must be floating point of shape (B, 3, T, H, W) in [-1, 1], got {video.dtype} of shape "
                f"{tuple(video.shape)}; to_unit_range makes it from uint8 clips"
            )
        self.grid(*video.shape[2:])
        features = self.encoder(video)  # (B, D, t, h, w)
        # the nearest code by direction; the length of the features changes no order
        return (features.movedim(1, -1).float() @ self.quantizer.codebook.float().T).argmax(dim=-1)

    @torch.no_grad()
    def decode(self, ids: Tensor, *, clamp: bool = False) -> Tensor:
        """Decodes ids to clips; the same in train and eval mode.

        Args:
            ids: Integer (B, t, h, w), 0 to codebook_size - 1; any t, h, w from 1.
            clamp: Clip the result to [-1, 1].

        Returns:
            (B, 3, 1 + 4 (t - 1), h * spatial_stride, w * spatial_stride) on the [-1, 1] scale.

        Raises:
            ValueError: The shape, dtype or range does not fit.
        """
        if ids.ndim != 4 or ids.is_floating_point() or ids.numel() == 0:
            raise ValueError(
                f"ids must be integers of shape (B, t, h, w), got {ids.dtype} of shape {tuple(ids.shape)}; "
                "flat ids (B, N) need .view(B, *grid)"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"ids must be 0 to {self.codebook_size - 1}, got {low} to {high}; were they made by another tokenizer?"
            )
        codes = self.quantizer.codebook[ids.long()].movedim(-1, 1)  # (B, D, t, h, w)
        video = self.decoder(codes.to(self.encoder[0].weight.dtype))
        return video.clamp(-1, 1) if clamp else video

    @override
    def setup(self, stage: str) -> None:
        """In a run of several processes, let the codebook learn from all of them."""
        if stage == "fit" and self.trainer.world_size > 1:
            quantizer = self._build_quantizer(synchronised=True)
            quantizer.load_state_dict(self.quantizer.state_dict())
            self.quantizer = quantizer.to(self.device)

    @override
    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Notes the shape of the clips, which `reco tokenize` cuts alike."""
        _, frames, height, width, _ = batch["video"].shape
        stride = getattr(getattr(self.trainer, "datamodule", None), "stride", 1)
        self.trained_on = ClipShape(frames, (height, width), stride)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the reconstruction and commitment loss of a batch {"video": uint8 (B, T, H, W, 3)}."""
        video = to_unit_range(batch["video"])
        self.grid(*video.shape[2:])
        features = self.encoder(video).movedim(1, -1)  # (B, t, h, w, D)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a resumed run draws what the uninterrupted one would have
            torch.manual_seed(self._step_seed())
            codes, ids, commitment = self.quantizer(features.flatten(1, 3))  # (B, t * h * w, D)
        decoded = self.decoder(codes.view_as(features).movedim(-1, 1))
        reconstruction = self._reconstruction_loss(decoded, video)
        loss = reconstruction + commitment.squeeze()
        self.log_dict(
            {
                "train/loss": loss,
                "train/reconstruction": reconstruction,
                "train/perplexity": perplexity(ids, self.codebook_size),
            },
            prog_bar=True,
            batch_size=len(video),
        )
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Returns the quality of what a model trained on the ids could at best show."""
        video = to_unit_range(batch["video"])
        decoded = self.decode(self.encode(video))
        self.log_dict(
            {"val/loss": self._reconstruction_loss(decoded, video), "val/psnr": psnr(decoded, video).mean()},
            prog_bar=True,
            batch_size=len(video),
            sync_dist=True,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the shape of the clips."""
        if self.trained_on is not None:
            checkpoint["trained_on"] = self.trained_on._asdict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the shape of the clips; checkpoints of version 0.1 do not hold it."""
        if "trained_on" in checkpoint:
            self.trained_on = ClipShape(**checkpoint["trained_on"])

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW with warm-up and, if asked for, linear decay, per step."""
        options: dict[str, Any] = dict(self.hparams)
        optimizer = torch.optim.AdamW(
            [*self.encoder.parameters(), *self.decoder.parameters()],
            lr=self.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=options["weight_decay"],
        )
        schedule = {key: options[key] for key in ("warmup_steps", "decay_steps")}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, **schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _reconstruction_loss(self, video: Tensor, target: Tensor) -> Tensor:
        loss = F.l1_loss(video, target)
        if self.hparams["mse_weight"]:
            loss = loss + self.hparams["mse_weight"] * F.mse_loss(video, target)
        if self.hparams["gradient_weight"]:
            loss = loss + self.hparams["gradient_weight"] * gradient_loss(video, target)
        return loss

    def _step_seed(self) -> int:
        key = (self.hparams["seed"], self.global_step, self.global_rank)
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def _build_quantizer(self, *, synchronised: bool) -> Any:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'VQVAE needs vector-quantize-pytorch: pip install "reco_lightning[tokenizers]"'
            ) from error
        return VectorQuantize(
            dim=self.hparams["code_dim"],
            codebook_size=self.codebook_size,
            use_cosine_sim=True,
            kmeans_init=True,
            decay=self.hparams["codebook_decay"],
            threshold_ema_dead_code=self.hparams["dead_code_threshold"],
            commitment_weight=self.hparams["commitment_weight"],
            sync_codebook=synchronised,
        )
