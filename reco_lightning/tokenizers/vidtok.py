# SPDX-License-Identifier: Apache-2.0
"""VidTok's discrete video tokenizers (arXiv 2412.13061) as `VideoTokenizer`s, over diffusers' `AutoencoderVidTok`.

8**z_channels ids by finite scalar quantisation; by default 4 frames of 8 x 8 pixels an id.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from reco_lightning.tokenizers.base import latent_grid
from reco_lightning.tokenizers.checks import block_grid, check_ids, check_loaded, check_video
from reco_lightning.tokenizers.frozen import FrozenNetwork

__all__ = ["VidTokTokenizer"]


class VidTokTokenizer(FrozenNetwork):
    """Ids and clips by a VidTok network; frozen, and in evaluation mode whatever its parent is set to.

    A causal network encodes the first frame alone: 1 + k * temporal_stride frames become 1 + k latent frames, and the
    first ones are the same whether the clip goes on or ends there. The other takes multiples of 16 frames, which is
    all that `AutoencoderVidTok` decodes without dropping some.

    Args:
        model: A diffusers `AutoencoderVidTok` with `regularizer="fsq"`.

    Attributes:
        codebook_size: V = 8**z_channels.
        temporal_stride: Frames per latent frame, in a causal network after the first.
        spatial_stride: Pixels per id along each side.
        frame_aligned: True: ids lie in time order.

    Raises:
        ValueError: The network has no ids ("kl").

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderVidTok
        >>> sizes = {"ch": 8, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 2, "codebook_size": 64}
        >>> tokenizer = VidTokTokenizer(AutoencoderVidTok(double_z=False, regularizer="fsq", **sizes))
        >>> ids = tokenizer.encode(torch.zeros(1, 3, 9, 16, 8))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([1, 3, 4, 2]), torch.Size([1, 3, 9, 16, 8]))
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(getattr(model, "config", None), "regularizer"):
            raise ValueError(f"model must be a diffusers AutoencoderVidTok, got a {type(model).__name__}")
        if model.config.regularizer != "fsq":
            raise ValueError(
                f'model must have regularizer "fsq", got {model.config.regularizer!r}, which gives no ids; '
                "take one of VidTok's fsq checkpoints"
            )
        self.model: Any = model
        # not config.codebook_size: any number from 8**z to below 8**(z + 1) passes there
        self.codebook_size = int(model.regularization.codebook_size)
        self.temporal_stride = int(model.temporal_compression_ratio)
        self.spatial_stride = 2 ** len(model.encoder.spatial_ds)
        self.frame_aligned = True
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Loads a folder that `AutoencoderVidTok.save_pretrained` wrote, in float32 on the CPU.

        Args:
            folder: Holds config.json and diffusion_pytorch_model.safetensors.

        Raises:
            ValueError: It holds no such model, one without ids, or weights that do not fit its config.json.
            ModuleNotFoundError: diffusers is not installed.
        """
        try:
            from diffusers import AutoencoderVidTok
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'VidTokTokenizer needs diffusers: pip install "reco_lightning[tokenizers]"'
            ) from error
        path = Path(folder)
        file = path / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if config.get("_class_name") != "AutoencoderVidTok":
            raise ValueError(
                f"folder must hold the config.json of a diffusers AutoencoderVidTok, got {str(path)!r}; "
                "write one with AutoencoderVidTok.save_pretrained"
            )
        try:
            model, found = AutoencoderVidTok.from_pretrained(
                path, output_loading_info=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"folder {str(path)!r} holds an AutoencoderVidTok that does not load: {error}") from error
        check_loaded(found, path)
        return cls(model.float())

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (t, h, w) of the ids of a clip.

        Args:
            frames: T; causal: 1 + a multiple of temporal_stride; otherwise a multiple of 16.
            height: H in pixels, a multiple of spatial_stride.
            width: W in pixels, a multiple of spatial_stride.

        Raises:
            ValueError: One of them does not divide.
        """
        strides = {"temporal_stride": self.temporal_stride, "spatial_stride": self.spatial_stride}
        if self.model.is_causal:
            return latent_grid(frames, height, width, **strides)
        multiple = self.model.num_latent_frames_batch_size * self.temporal_stride
        return block_grid(frames, height, width, frame_multiple=multiple, **strides)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encodes clips to ids.

        Args:
            video: Floating point (B, 3, T, H, W) in [-1, 1].

        Returns:
            int64 (B, t, h, w), 0 to codebook_size - 1.

        Raises:
            ValueError: The shape or dtype does not fit.
        """
        check_video(video)
        self.grid(*video.shape[2:])
        video = video.to(self.model.dtype)
        if self.model.is_causal:  # its forward pads, its encode does not: frames would be lost at the end
            past = video[:, :, :1].expand(-1, -1, self.temporal_stride - 1, -1, -1)
            video = torch.cat([past, video], dim=2)
        ids = self.model.encode(video)[1].long()
        self._forget()
        return ids

    @torch.no_grad()
    def decode(self, ids: Tensor, *, clamp: bool = False) -> Tensor:
        """Decodes ids to clips.

        Args:
            ids: Integer (B, t, h, w), 0 to codebook_size - 1; any h, w from 1, and t as `grid` gives it.
            clamp: Clip the result to [-1, 1].

        Returns:
            (B, 3, T, h * spatial_stride, w * spatial_stride) on the [-1, 1] scale; T = 1 + (t - 1) * temporal_stride
            of a causal network, t * temporal_stride of another.

        Raises:
            ValueError: The shape, dtype or range does not fit.
        """
        check_ids(ids, self.codebook_size)
        frames = ids.shape[1]
        block = 1 if self.model.is_causal else self.model.num_latent_frames_batch_size
        if frames % block:
            raise ValueError(
                f"ids must have a multiple of {block} latent frames, got {frames}; "
                f"the last {frames % block} would be lost: give whole clips"
            )
        # not decode_from_indices: that feeds float32 to a network of another dtype
        codes = self.model.indices_to_latent(ids).to(self.model.dtype)  # (B, C, t, h, w)
        video: Tensor = self.model.decode(codes)
        self._forget()
        return video.clamp(-1, 1) if clamp else video

    def _forget(self) -> None:
        """Lets go of what causal layers keep of their last input, for chunks that are not used here."""
        for module in self.model.modules():
            if hasattr(module, "causal_cache"):
                module.causal_cache = None
