# SPDX-License-Identifier: Apache-2.0
"""Emu3's video tokenizer (arXiv 2409.18869) as a `VideoTokenizer`, over the `Emu3VQVAE` of transformers.

32768 ids; 4 frames of 8 x 8 pixels an id. Clips go in whole blocks of 4 frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from reco_lightning.support.argument_checks import check_finite
from reco_lightning.tokenizers.checks import block_grid, check_ids, check_loaded, check_video
from reco_lightning.tokenizers.frozen import FrozenNetwork

__all__ = ["Emu3Tokenizer"]

# Emu3VQVAE crops a video's ids to image_sizes along (t, h), where it means (h, w): so it is told that nothing is to go.
_UNCROPPED = (2**30, 2**30)


class Emu3Tokenizer(FrozenNetwork):
    """Ids and clips by Emu3's VQ network; frozen, and in evaluation mode whatever its parent is set to.

    Args:
        model: A transformers `Emu3VQVAE`.
        image_mean: What the network was trained to see subtracted from pixels in [0, 1], per channel. The released
            weights have 0.5; the default of transformers' image processor is another.
        image_std: By what they were divided then.

    Attributes:
        codebook_size: V; 32768 in the released weights.
        temporal_stride: Frames per latent frame; 4 in the released weights.
        spatial_stride: Pixels per id along each side; 8 in the released weights.
        frame_aligned: True: ids lie in time order.

    Example:
        >>> import torch
        >>> from transformers import Emu3VQVAE, Emu3VQVAEConfig
        >>> sizes = {"base_channels": 32, "hidden_size": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
        >>> tokenizer = Emu3Tokenizer(Emu3VQVAE(Emu3VQVAEConfig(codebook_size=16, **sizes)))
        >>> ids = tokenizer.encode(torch.zeros(1, 3, 8, 16, 8))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([1, 2, 8, 4]), torch.Size([1, 3, 8, 16, 8]))
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: Any, *, image_mean: float | Sequence[float] = 0.5, image_std: float | Sequence[float] = 0.5
    ) -> None:
        super().__init__()
        if not hasattr(getattr(model, "config", None), "temporal_downsample_factor"):
            raise ValueError(f"model must be a transformers Emu3VQVAE, got a {type(model).__name__}")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            for value in values if isinstance(values, (list, tuple)) else (values,):
                check_finite(**{name: value})
            if isinstance(values, (list, tuple)) and len(values) != 3:
                raise ValueError(f"{name} must be one number or three, got {values!r}")
        if min(image_std if isinstance(image_std, (list, tuple)) else (image_std,)) <= 0:
            raise ValueError(f"image_std must be above 0, got {image_std!r}")
        self.model: Any = model
        self.codebook_size = int(model.config.codebook_size)
        self.temporal_stride = int(model.config.temporal_downsample_factor)
        self.spatial_stride = 2 ** (len(model.config.channel_multiplier) - 1)
        self.frame_aligned = True
        mean, std = (torch.as_tensor(value, dtype=torch.float64) for value in (image_mean, image_std))
        # buffers, so that they move along and count in `fingerprint`: another normalisation makes other ids
        self.register_buffer("scale", (0.5 / std).float().expand(3).reshape(1, 3, 1, 1, 1).clone())
        self.register_buffer("shift", ((0.5 - mean) / std).float().expand(3).reshape(1, 3, 1, 1, 1).clone())
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Loads a folder that `Emu3VQVAE.save_pretrained` wrote, in float32 on the CPU.

        Args:
            folder: Holds config.json and model.safetensors; a preprocessor_config.json, if there, gives image_mean and
                image_std.

        Raises:
            ValueError: It holds no such model, or weights are missing, left over or of other shapes.
            ModuleNotFoundError: transformers is not installed.
        """
        try:
            from transformers import Emu3VQVAE
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('Emu3Tokenizer needs transformers: pip install "reco_lightning[hf]"') from error
        path = Path(folder)
        config = path / "config.json"
        if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "emu3_vqgan":
            raise ValueError(
                f"folder must hold the config.json of a transformers Emu3VQVAE, got {str(path)!r}; "
                "of a whole Emu3 model, write model.model.vqmodel with save_pretrained"
            )
        try:
            loaded: Any = Emu3VQVAE.from_pretrained(path, output_loading_info=True, use_safetensors=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"folder {str(path)!r} holds an Emu3VQVAE that does not load: {error}") from error
        model, found = loaded
        check_loaded(found, path)
        file = path / "preprocessor_config.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(model.float(), **{key: stored[key] for key in ("image_mean", "image_std") if stored.get(key)})

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (t, h, w) of the ids of a clip.

        Args:
            frames: T, a multiple of temporal_stride: other clips would quietly lose their last frames.
            height: H in pixels, a multiple of spatial_stride.
            width: W in pixels, a multiple of spatial_stride.

        Raises:
            ValueError: One of them does not divide.
        """
        return block_grid(
            frames,
            height,
            width,
            frame_multiple=self.temporal_stride,
            temporal_stride=self.temporal_stride,
            spatial_stride=self.spatial_stride,
        )

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
        pixels = (video.to(self.scale) * self.scale + self.shift).transpose(1, 2)  # (B, T, 3, H, W)
        made = self.model.encode(pixels, [_UNCROPPED] * len(video))
        return torch.stack(list(getattr(made, "image_tokens", made)))  # transformers 4 returns the list itself

    @torch.no_grad()
    def decode(self, ids: Tensor, *, clamp: bool = False) -> Tensor:
        """Decodes ids to clips.

        Args:
            ids: Integer (B, t, h, w), 0 to codebook_size - 1; any t, h, w from 1.
            clamp: Clip the result to [-1, 1].

        Returns:
            (B, 3, t * temporal_stride, h * spatial_stride, w * spatial_stride) on the [-1, 1] scale.

        Raises:
            ValueError: The shape, dtype or range does not fit.
        """
        check_ids(ids, self.codebook_size)
        pixels = self.model.decode(ids.long()).transpose(1, 2)  # (B, 3, T, H, W)
        video = (pixels - self.shift) / self.scale
        return video.clamp(-1, 1) if clamp else video
