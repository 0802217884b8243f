# SPDX-License-Identifier: Apache-2.0
"""OmniTokenizer (Wang et al., arXiv 2406.09399) with its released weights: clips and images to a grid of ids, and back.

Inference only. Its ids are made before the video model is trained, and its decoder shows what the model samples.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from typing_extensions import Self

from reco_lightning.tokenizers.base import ClipShape, latent_grid
from reco_lightning.tokenizers.checks import check_ids, check_video
from reco_lightning.tokenizers.frozen import FrozenNetwork
from reco_lightning.tokenizers.omnitokenizer.checkpoint import load_weights, read_checkpoint, used_weights
from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig, config_from_weights
from reco_lightning.tokenizers.omnitokenizer.layers import Stack

__all__ = ["OmniTokenizer", "nearest_code"]


def nearest_code(features: Tensor, codes: Tensor) -> Tensor:
    """Returns the id of the code at the least Euclidean distance, in float32; the first of equals.

    Codes need not be of unit length, so the nearest is not always the one of the same direction.

    Args:
        features: (..., C).
        codes: (V, C).

    Returns:
        int64 (...), 0 to V - 1.

    Example:
        >>> import torch
        >>> nearest_code(torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0], [0.5, 0.5]])).tolist()
        [1]
    """
    with torch.autocast(features.device.type, enabled=False):
        codes = codes.float()
        lengths = codes.square().sum(dim=-1)
        rows = features.float().flatten(0, -2)
        # in parts: all distances of a 17 x 256 x 256 clip at once would take 160 MiB
        ids = [torch.addmm(lengths, part, codes.T, alpha=-2).argmin(dim=-1) for part in rows.split(4096)]
    return torch.cat(ids).view(features.shape[:-1])


class OmniTokenizer(FrozenNetwork):
    """Transformer tokenizer of images and videos: the first frame, then several frames at a time; a `VideoTokenizer`.

    An image is a clip of one frame. Weights are frozen, and the module stays in evaluation mode.

    **The ids are not temporally causal**, though frames lie in time order: every id depends on all frames of its clip,
    and so does every decoded frame on all ids. The ids of a clip's first frames therefore tell of the frames after
    them. Frames that a model is given as a condition are to be encoded alone, with `encode_first_frames`; clips are to
    be encoded and decoded whole, at the trained length of 17 frames.

    Args:
        config: Sizes and options; weights are random. None is the layout of the released joint checkpoints.

    Attributes:
        codebook_size: V.
        temporal_stride: Frames per latent frame after the first.
        spatial_stride: Pixels per id along each side.
        frame_aligned: True; ids lie on a (t, h, w) grid in time order.
        causal: False; see above.

    Example:
        >>> import torch
        >>> small = {"embedding_dim": 16, "heads": 2, "dim_head": 8, "ff_width": 16, "twod_window_size": 2}
        >>> tokenizer = OmniTokenizer(OmniTokenizerConfig(n_codes=32, **small))
        >>> ids = tokenizer.encode(torch.zeros(2, 3, 9, 32, 32))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3, 9, 32, 32]))
    """

    trained_on: ClipShape | None = None

    def __init__(self, config: OmniTokenizerConfig | None = None) -> None:
        super().__init__()
        if config is not None and not isinstance(config, OmniTokenizerConfig):
            raise ValueError(f"config must be an OmniTokenizerConfig or None, got a {type(config).__name__}")
        config = config or OmniTokenizerConfig()
        self.config = config
        self.codebook_size = config.n_codes
        self.temporal_stride = config.temporal_patch_size
        self.spatial_stride = config.patch_size
        self.frame_aligned = True
        self.causal = False
        self.encoder = _Encoder(config)
        self.pre_vq_conv = nn.Sequential(nn.Identity(), nn.Linear(config.embedding_dim, config.codebook_dim))
        self.codebook = _Codebook(config)
        self.post_vq_conv = nn.Sequential(nn.Identity(), nn.Linear(config.codebook_dim, config.embedding_dim))
        self.decoder = _Decoder(config)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, explicit_attention: bool | None = None) -> Self:
        """Loads a VQ checkpoint of the release, joint or image-only; no code in the file is run.

        Sizes are read from the shapes of the weights. Networks that only training needs are left out by name.

        Args:
            path: The `.ckpt` file, or its state dict alone, saved with torch or as `.safetensors`.
            explicit_attention: As in `OmniTokenizerConfig`. None is True for a file named `imagenet_only`, the only
                one trained so, and False for all others.

        Returns:
            The tokenizer, float32, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is a VAE or a language model of the release, cannot be read, or has missing or
                unknown keys, which are listed.
        """
        weights, options = read_checkpoint(path)
        name = os.path.basename(os.fspath(path))
        if explicit_attention is None:
            explicit_attention = os.path.splitext(name)[0] == "imagenet_only"
        weights = used_weights(weights)
        config = config_from_weights(weights, options, explicit_attention=explicit_attention)
        with torch.device("meta"):
            tokenizer = cls(config)
        tokenizer.to_empty(device="cpu")
        load_weights(tokenizer, weights, name)
        side, frames = options.get("resolution"), options.get("sequence_length")
        if isinstance(side, int) and isinstance(frames, int):
            tokenizer.trained_on = ClipShape(frames, (side, side))
        return tokenizer

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (t, h, w) of the ids of a clip.

        Args:
            frames: T, 1 + a multiple of temporal_stride.
            height: H in pixels, a multiple of patch and window side (64 in the released checkpoints).
            width: W, equal to the height.

        Raises:
            ValueError: One of them does not fit.
        """
        cells = self.config.side_multiple // self.spatial_stride
        t, rows, columns = latent_grid(
            frames, height, width, temporal_stride=self.temporal_stride, spatial_stride=self.config.side_multiple
        )
        if height != width:
            raise ValueError(
                f"height and width must be equal, got {height} and {width}; OmniTokenizer knows square clips only: "
                f"resize or crop them to {min(height, width)} x {min(height, width)}"
            )
        return t, rows * cells, columns * cells

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encodes clips to ids.

        Args:
            video: Floating point (B, 3, T, H, W) in [-1, 1]; T = 1 is an image.

        Returns:
            int64 (B, t, h, w), 0 to codebook_size - 1; each depends on all T frames.

        Raises:
            ValueError: The shape or dtype does not fit.
        """
        check_video(video)
        self.grid(*video.shape[2:])
        dtype = self.codebook.embeddings.dtype
        features = self.pre_vq_conv(self.encoder(video.to(dtype) / 2))  # (B, t, h, w, C); trained on [-0.5, 0.5]
        if self.config.l2_code:
            features = F.normalize(features.float(), dim=-1)
        return nearest_code(features, self.codebook.embeddings)

    def encode_first_frames(self, video: Tensor, frames: int) -> Tensor:
        """Encodes the first frames of clips alone, so that their ids know nothing of the frames after them.

        The ids that condition a model have to be made so; those of the whole clip, cut to the same length, differ.

        Args:
            video: Floating point (B, 3, T, H, W) in [-1, 1]; frames after the first ones are not looked at.
            frames: How many, 1 + a multiple of temporal_stride, at most T.

        Returns:
            int64 (B, 1 + (frames - 1) / temporal_stride, h, w).

        Raises:
            ValueError: There are fewer frames, or the number, shape or dtype does not fit.
        """
        check_video(video)
        if not 1 <= frames <= video.shape[2]:
            raise ValueError(f"frames must be 1 to {video.shape[2]}, the length of the clips, got {frames}")
        return self.encode(video[:, :, :frames])

    @torch.no_grad()
    def decode(self, ids: Tensor, *, clamp: bool = False) -> Tensor:
        """Decodes ids to clips.

        Args:
            ids: Integer (B, t, h, w), 0 to codebook_size - 1, h = w.
            clamp: Clip the result to [-1, 1].

        Returns:
            (B, 3, 1 + temporal_stride (t - 1), h * spatial_stride, w * spatial_stride) on the [-1, 1] scale, in the
            dtype of the weights.

        Raises:
            ValueError: The shape, dtype or range does not fit.
        """
        check_ids(ids, self.codebook_size)
        t, h, w = ids.shape[1:]
        self.grid(1 + (t - 1) * self.temporal_stride, h * self.spatial_stride, w * self.spatial_stride)
        video = 2 * self.decoder(self.post_vq_conv(self.codebook.embeddings[ids.long()]))
        return video.clamp(-1, 1) if clamp else video


class _Codebook(nn.Module):
    embeddings: Tensor

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.register_buffer("embeddings", F.normalize(torch.randn(config.n_codes, config.codebook_dim), dim=-1))


def _patch_embedding(config: OmniTokenizerConfig, frames: int) -> nn.Sequential:
    pixels = 3 * frames * config.patch_size**2
    return nn.Sequential(
        Rearrange("b c (t f) (h p) (w q) -> b t h w (c f p q)", f=frames, p=config.patch_size, q=config.patch_size),
        nn.LayerNorm(pixels),
        nn.Linear(pixels, config.embedding_dim),
        nn.LayerNorm(config.embedding_dim),
    )


def _to_pixels(config: OmniTokenizerConfig, frames: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.embedding_dim, 3 * frames * config.patch_size**2),
        Rearrange("b t h w (c f p q) -> b c (t f) (h p) (w q)", f=frames, p=config.patch_size, q=config.patch_size),
    )


class _Encoder(nn.Module):
    """Clips (B, 3, T, H, W) in [-0.5, 0.5] to features (B, t, h, w, D)."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.to_patch_emb_first_frame = _patch_embedding(config, 1)
        self.to_patch_emb = _patch_embedding(config, config.temporal_patch_size)
        self.enc_spatial_transformer = Stack(config, config.enc_block, spatial=True)
        self.enc_temporal_transformer = Stack(config, "t" * config.temporal_depth, spatial=False)

    def forward(self, video: Tensor) -> Tensor:
        x = self.to_patch_emb_first_frame(video[:, :, :1])
        if video.shape[2] > 1:
            x = torch.cat([x, self.to_patch_emb(video[:, :, 1:])], dim=1)
        return self.enc_temporal_transformer(self.enc_spatial_transformer(x))


class _Decoder(nn.Module):
    """Features (B, t, h, w, D) to clips (B, 3, T, H, W), nominally in [-0.5, 0.5]."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.dec_temporal_transformer = Stack(config, "t" * config.temporal_depth, spatial=False)
        self.dec_spatial_transformer = Stack(config, config.dec_block, spatial=True)
        self.to_pixels_first_frame = _to_pixels(config, 1)
        self.to_pixels = _to_pixels(config, config.temporal_patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dec_spatial_transformer(self.dec_temporal_transformer(x))
        video = self.to_pixels_first_frame(x[:, :1])
        if x.shape[1] > 1:
            video = torch.cat([video, self.to_pixels(x[:, 1:])], dim=2)
        return video
