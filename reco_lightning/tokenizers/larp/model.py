# SPDX-License-Identifier: Apache-2.0
"""LARP (Wang et al., arXiv 2410.21264): clips to a row of holistic ids, and back, with the released weights.

Inference only. Its ids are made before the video model is trained, and its decoder shows what the model samples.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from reco_lightning.tokenizers.base import ClipShape
from reco_lightning.tokenizers.checks import check_video
from reco_lightning.tokenizers.frozen import FrozenNetwork
from reco_lightning.tokenizers.larp.config import LARPConfig, config_from_json
from reco_lightning.tokenizers.larp.folder import load_weights, read_config, read_weights
from reco_lightning.tokenizers.larp.layers import PatchEmbedding, Trunk, VectorQuantiser
from reco_lightning.tokenizers.larp.tables import DECODER_AXES, ENCODER_AXES, fresh_tables

__all__ = ["LARPTokenizer"]


class LARPTokenizer(FrozenNetwork):
    """Transformer tokenizer of clips: learned queries read the whole clip and become its ids; a `VideoTokenizer`.

    **Ids are holistic.** There is no map from ids to frames or places: each id depends on all frames, and each decoded
    pixel on all ids. Their order is that of the queries, which training shaped to be predictable from left to right; a
    low index does not mean an early frame. What follows for windows over ids:

    - A window of training is a range of ids, in tokens or as a share of N: with `WindowSampler(frame_blocks=4,
      tokens_per_block=256)` a "frame block" is a quarter of the ids, not four of the 16 frames.
    - The frozen context is another part of the same clip's description, not its past; continuity between neighbouring
      rows is continuity in the order of queries, not in time.
    - The first ids alone cannot be decoded into the first frames, and ids of frames that are to condition a model have
      to be made from those frames alone: `encode_first_frames`.
    - Only clips that follow each other, each with its N ids, give blocks of ids that are blocks of time.

    Weights are frozen, and the module stays in evaluation mode whatever is asked of it.

    Args:
        config: Sizes and options; weights are random. None is the layout of the release.

    Attributes:
        codebook_size: V.
        temporal_stride: Frames of a patch; ids have none of their own.
        spatial_stride: Side of a patch in pixels.
        frame_aligned: False; ids are in no order of time.
        causal: False.

    Example:
        >>> sizes = {"encoder_hidden_size": 16, "decoder_hidden_size": 16, "encoder_depth": 1, "decoder_depth": 1}
        >>> heads = {"encoder_num_heads": 2, "decoder_num_heads": 2}
        >>> tokenizer = LARPTokenizer(LARPConfig(input_size=16, bottleneck_token_num=12, **sizes, **heads))
        >>> ids = tokenizer.encode(torch.zeros(2, 3, 16, 16, 16))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([2, 12]), torch.Size([2, 3, 16, 16, 16]))
    """

    encoder_latent_query_embed: Tensor
    decoder_latent_pe: Tensor

    def __init__(self, config: LARPConfig | None = None) -> None:
        super().__init__()
        if config is not None and not isinstance(config, LARPConfig):
            raise ValueError(f"config must be a LARPConfig or None, got a {type(config).__name__}")
        config = config or LARPConfig()
        self.config = config
        self.codebook_size = config.codebook_size
        self.temporal_stride = config.temporal_patch_size
        self.spatial_stride = config.patch_size
        self.frame_aligned = False
        self.causal = False
        self.trained_on = ClipShape(config.frame_num, (config.input_size, config.input_size))
        width, out_width = config.encoder_hidden_size, config.decoder_hidden_size
        for name, table in fresh_tables(config).items():
            self.register_parameter(name, nn.Parameter(table))
        self.x_embedder = PatchEmbedding(width, config.temporal_patch_size, config.patch_size)
        self.encoder = Trunk(width, config.encoder_depth, config.encoder_num_heads)
        self.bottleneck = _Bottleneck(config)
        self.decoder = Trunk(out_width, config.decoder_depth, config.decoder_num_heads)
        self.final_layer = _FinalLayer(out_width, 3 * config.temporal_patch_size * config.patch_size**2)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Loads a folder of the hub, such as a download of `hywang66/LARP-L-long-tokenizer`; no code in it is run.

        Every table is taken from the file, also those that could be computed. The prior that only training needs
        (`prior_model.*`) is left out.

        Args:
            folder: Holds `config.json` and `model.safetensors`.

        Returns:
            The tokenizer, float32, on the CPU.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The options are not those of a LARP tokenizer, or weights are missing, unknown or of another
                shape; all are listed.
            ModuleNotFoundError: safetensors is not installed.
        """
        stored = read_config(folder)
        if {"n_layer", "vocab_size"} <= stored.keys():
            raise ValueError(
                f"folder must hold a LARP tokenizer, got LARP's video model in {os.fspath(folder)!r}; load that with "
                "reco_lightning.models.larp.network.LARPTransformer.from_pretrained"
            )
        config = config_from_json(stored, str(Path(folder) / "config.json"))
        weights = {key: value for key, value in read_weights(folder).items() if not key.startswith("prior_model.")}
        with torch.device("meta"):
            tokenizer = cls(config)
        tokenizer.to_empty(device="cpu")
        load_weights(tokenizer, weights, Path(folder) / "model.safetensors")
        return tokenizer

    def grid(self, frames: int, height: int, width: int) -> tuple[int]:
        """Returns the shape (N,) of the ids of a clip, the same for each number of frames.

        Args:
            frames: T, a multiple of temporal_stride up to the trained number (16 in the release).
            height: H in pixels, the trained size (128 in the release).
            width: W in pixels, the same.

        Raises:
            ValueError: One of them does not fit.
        """
        size, most = self.config.input_size, self.config.frame_num
        for name, value in (("height", height), ("width", width)):
            if value != size:
                raise ValueError(
                    f"{name} must be {size} pixels, got {value}; resize or crop the clips to {size} x {size}"
                )
        if frames < 1 or frames > most or frames % self.temporal_stride:
            raise ValueError(
                f"frames must be a multiple of {self.temporal_stride} up to {most}, got {frames}; split videos into "
                f"clips of {most} frames"
            )
        return (self.config.bottleneck_token_num,)

    @torch.no_grad()
    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Encodes clips to ids.

        Args:
            video: Floating point (B, 3, T, H, W) in [-1, 1]. Fewer frames than the trained number give as many ids.
            generator: Draws ids by their likelihood, as the published sampler for frame prediction does; on the
                clips' device. None takes the likeliest, as training on ids and the published scores do.

        Returns:
            int64 (B, N), 0 to codebook_size - 1; each depends on all frames.

        Raises:
            ValueError: The shape or dtype does not fit, or ids are to be drawn where the model has no distribution.
        """
        check_video(video)
        self.grid(*video.shape[2:])
        if generator is not None and not self.config.stochastic:
            raise ValueError(
                "generator must be None for a tokenizer without stochastic ids (stochastic: false in its config.json)"
            )
        return self.bottleneck(self._features(video), generator)

    def encode_first_frames(self, video: Tensor, frames: int = 5) -> Tensor:
        """Encodes the first frames of clips alone, so that their ids know nothing of the frames after them.

        The last of them is repeated up to the trained length, which is how the frame-prediction model was trained.

        Args:
            video: Floating point (B, 3, T, H, W) in [-1, 1]; frames after the first ones are not looked at.
            frames: How many, from 1 to the trained number, at most T.

        Returns:
            int64 (B, N).

        Raises:
            ValueError: There are fewer frames, or the shape or dtype does not fit.
        """
        check_video(video)
        most = min(self.config.frame_num, video.shape[2])
        if not 1 <= frames <= most:
            raise ValueError(f"frames must be 1 to {most}, got {frames} of a clip of {video.shape[2]}")
        last = video[:, :, frames - 1 : frames].expand(-1, -1, self.config.frame_num - frames, -1, -1)
        return self.encode(torch.cat([video[:, :, :frames], last], dim=2))

    @torch.no_grad()
    def decode(self, ids: Tensor, *, clamp: bool = False, frames: int | None = None) -> Tensor:
        """Decodes ids to clips.

        Args:
            ids: Integer (B, N), 0 to codebook_size - 1; all N, as a part cannot be decoded.
            clamp: Clip the result to [-1, 1].
            frames: T of the clips that were encoded, which ids do not tell; None is the trained number.

        Returns:
            (B, 3, T, H, W) on the [-1, 1] scale, in the dtype of the weights.

        Raises:
            ValueError: The shape, dtype or range does not fit.
        """
        config = self.config
        if frames is None:
            frames = config.frame_num
        self.grid(frames, config.input_size, config.input_size)
        if ids.ndim != 2 or ids.shape[1] != config.bottleneck_token_num or ids.is_floating_point() or not len(ids):
            raise ValueError(
                f"ids must be integers of shape (B, {config.bottleneck_token_num}), got {ids.dtype} of shape "
                f"{tuple(ids.shape)}; fewer ids of a clip cannot be decoded"
            )
        if not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"ids must be 0 to {self.codebook_size - 1}, got {low} to {high}; were they made by another "
                    "tokenizer?"
                )
        video = 2 * self._pixels(ids.long(), frames) - 1
        return video.clamp(-1, 1) if clamp else video

    def _features(self, video: Tensor) -> Tensor:
        """What is quantised, (B, N, C); the network was trained on pixels in [0, 1]."""
        patches = self.x_embedder(((video + 1) / 2).to(self.x_embedder.proj.weight.dtype))
        positions = self._positions("encoder_patch_pe", ENCODER_AXES)
        patches = patches + self._typed(positions[:, : patches.shape[1]], "encoder_patch")
        queries = self._typed(self.encoder_latent_query_embed[None], "encoder_latent_query")
        return self.bottleneck.in_linear(self.encoder(patches, queries))

    def _pixels(self, ids: Tensor, frames: int) -> Tensor:
        """Clips (B, 3, T, H, W), nominally in [0, 1]."""
        config = self.config
        latents = self.bottleneck.out_linear(self.bottleneck.regularizer.lookup(ids))
        latents = latents + self._typed(self.decoder_latent_pe, "decoder_latent")
        queries = self._positions("decoder_patch_query_embed", DECODER_AXES)
        queries = self._typed(queries, "decoder_patch_query")
        _, rows, columns = config.patch_grid
        patches = frames // config.temporal_patch_size * rows * columns
        states = self.final_layer(self.decoder(latents, queries[:, :patches]))
        return rearrange(
            states,
            "b (t h w) (f p q c) -> b c (t f) (h p) (w q)",
            h=rows,
            w=columns,
            f=config.temporal_patch_size,
            p=config.patch_size,
            q=config.patch_size,
        )

    def _positions(self, name: str, axes: tuple[str, str, str]) -> Tensor:
        if hasattr(self, name):
            return self.get_parameter(name)
        rows, columns, time = map(self.get_parameter, axes)
        return (rows + columns + time).flatten(1, 3)

    def _typed(self, table: Tensor, name: str) -> Tensor:
        kind = f"{name}_token_type_embed"
        return table + self.get_parameter(kind) if hasattr(self, kind) else table


class _Bottleneck(nn.Module):
    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        self.in_linear = nn.Linear(config.encoder_hidden_size, config.bottleneck_dim)
        temperature = config.stochastic_temperature if config.stochastic else 1.0
        self.regularizer = VectorQuantiser(config.codebook_size, config.bottleneck_dim, temperature)
        self.out_linear = nn.Linear(config.bottleneck_dim, config.decoder_hidden_size)

    def forward(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.regularizer(features, generator)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))
