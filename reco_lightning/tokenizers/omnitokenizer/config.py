# SPDX-License-Identifier: Apache-2.0
"""The configuration of an OmniTokenizer, given or inferred from the shapes of its weights (arXiv 2406.09399).

Shapes cannot disagree with the weights, so the options stored beside them are only asked for what shapes do not show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from reco_lightning.support.argument_checks import check_finite, check_flag, check_int

__all__ = ["OmniTokenizerConfig", "config_from_weights"]

_STACKS = {
    "enc_block": "encoder.enc_spatial_transformer",
    "dec_block": "decoder.dec_spatial_transformer",
    "enc_temporal": "encoder.enc_temporal_transformer",
    "dec_temporal": "decoder.dec_temporal_transformer",
}

# What the published code also knows and no release uses: the values that are understood here.
_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "patch_embed": ("linear",),
    "codebook_type": ("vq",),
    "image_channels": (3,),
    "use_external_codebook": (False,),
    "defer_temporal_pool": (False,),
    "defer_spatial_pool": (False,),
    "gen_upscale": (None,),
}


@dataclass(frozen=True)
class OmniTokenizerConfig:
    """Sizes and options of an `OmniTokenizer`; the defaults are those of the released joint image-video checkpoints.

    The released image-only checkpoints have temporal_patch_size 2 and spatial_pos "rel".

    Args:
        n_codes: V, number of ids.
        codebook_dim: Channels of a code.
        embedding_dim: D.
        heads: Attention heads; explicit_attention asks for a power of two.
        dim_head: Channels per head.
        ff_width: Hidden channels of the gated feed-forward layers.
        patch_size: Pixels per id along each side.
        temporal_patch_size: Frames per latent frame after the first.
        twod_window_size: Side of an attention window, in ids.
        enc_block: One letter per layer of the encoder's spatial stack: "t" full attention, "w" window attention.
        dec_block: The same of the decoder.
        temporal_depth: Layers of each temporal stack.
        spatial_pos: Positions in the spatial stacks: "rope", or "rel", which counts with explicit_attention only.
        explicit_attention: Add the "rel" bias in spatial and ALiBi in temporal layers. `imagenet_only.ckpt` was trained
            so; all other files run without, as the published code drops both where fused attention exists.
        causal_in_temporal_transformer: Temporal attention looks back only.
        causal_in_peg: The positional convolution looks back only (over the memory order of its tokens).
        l2_code: Normalise features to unit length before the code is looked up.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> OmniTokenizerConfig(temporal_patch_size=2, spatial_pos="rel").side_multiple
        64
    """

    n_codes: int = 8192
    codebook_dim: int = 8
    embedding_dim: int = 512
    heads: int = 8
    dim_head: int = 64
    ff_width: int = 1365
    patch_size: int = 8
    temporal_patch_size: int = 4
    twod_window_size: int = 8
    enc_block: str = "ttww"
    dec_block: str = "tttt"
    temporal_depth: int = 4
    spatial_pos: str = "rope"
    explicit_attention: bool = False
    causal_in_temporal_transformer: bool = True
    causal_in_peg: bool = True
    l2_code: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            check = {"int": check_int, "float": check_finite, "bool": check_flag}.get(str(field.type))
            if check is not None:
                check(**{field.name: getattr(self, field.name)})
        for name in (
            "n_codes",
            "codebook_dim",
            "embedding_dim",
            "heads",
            "dim_head",
            "ff_width",
            "patch_size",
            "temporal_patch_size",
            "twod_window_size",
        ):
            check_int(at_least=1, **{name: getattr(self, name)})
        check_int(at_least=0, temporal_depth=self.temporal_depth)
        for name in ("enc_block", "dec_block"):
            if not isinstance(getattr(self, name), str) or set(getattr(self, name)) - {"t", "w"}:
                raise ValueError(
                    f'{name} must hold one letter per layer, "t" (full attention) or "w" (window attention), got '
                    f"{getattr(self, name)!r}; pooling (a, m, l) and upsampling (n, r) occur in no released checkpoint"
                )
        if self.spatial_pos not in ("rope", "rel"):
            raise ValueError(f'spatial_pos must be "rope" or "rel", got {self.spatial_pos!r}')
        if self.spatial_pos == "rope" and self.dim_head % 4:
            raise ValueError(f'dim_head must be a multiple of 4 with spatial_pos "rope", got {self.dim_head}')
        if "w" in self.enc_block + self.dec_block and self.embedding_dim % self.heads:
            raise ValueError(
                f"embedding_dim must be a multiple of heads where window attention is used, got {self.embedding_dim} "
                f"and {self.heads}"
            )
        if self.explicit_attention and self.heads & (self.heads - 1):
            raise ValueError(f"heads must be a power of two with explicit_attention, got {self.heads}")

    @property
    def side_multiple(self) -> int:
        """Height and width of a clip are multiples of this many pixels."""
        return self.patch_size * (self.twod_window_size if "w" in self.enc_block + self.dec_block else 1)


def config_from_weights(
    weights: Mapping[str, Tensor], options: Mapping[str, Any] | None = None, *, explicit_attention: bool = False
) -> OmniTokenizerConfig:
    """Reads the layout of an official state dict off its shapes.

    Args:
        weights: The state dict without what only training needs. A key may be missing where others tell the same
            size; that is found when the weights are loaded.
        options: The training options stored beside it, if any. Read are the causal flags, in both spellings
            (`causal_`, and the `casual_` of the released files), l2_code, spatial_pos, the depths, and options that
            no release sets. Absent flags are true, as in all releases.
        explicit_attention: As in `OmniTokenizerConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: A size cannot be told, or an option is set that is not understood.

    Example:
        >>> config_from_weights({})
        Traceback (most recent call last):
            ...
        ValueError: state dict must hold the key codebook.embeddings, without which n_codes cannot be told; ...
    """
    options = dict(options or {})
    for name, allowed in _UNDERSTOOD.items():
        if name in options and options[name] not in allowed:
            raise ValueError(
                f"option {name} must be {allowed[0]!r}, as in all released checkpoints, got {options[name]!r}"
            )
    n_codes = _size(weights, "n_codes", r"codebook\.embeddings")
    first_patch = _size(
        weights,
        "patch_size",
        r"encoder\.to_patch_emb_first_frame\.1\.(weight|bias)",
        r"decoder\.to_pixels_first_frame\.0\.(weight|bias)",
    )
    patch = _size(
        weights,
        "temporal_patch_size",
        r"encoder\.to_patch_emb\.1\.(weight|bias)",
        r"decoder\.to_pixels\.0\.(weight|bias)",
    )
    dim_head = _size(weights, "dim_head", r".*\.layers\.\d+\.1\.[qk]_scale")
    blocks = {name: _letters(weights, stack) for name, stack in _STACKS.items()}
    for name in ("enc_block", "dec_block"):  # a file that lost its last layers is incomplete, not shallow
        stored = options.get(name) or "t" * (options.get("spatial_depth") or 0)
        blocks[name] += stored[len(blocks[name]) :]
    windows = any("w" in blocks[name] for name in ("enc_block", "dec_block"))
    rel = any(re.fullmatch(r".*_spatial_transformer\.layers\.\d+\.1\.spatial_rel_pos_bias\..*", key) for key in weights)
    spatial_pos = "rel" if rel else "rope"
    if options.get("spatial_pos", spatial_pos) != spatial_pos:
        raise ValueError(
            f"option spatial_pos is {options['spatial_pos']!r}, but the weights have "
            f"{'' if rel else 'no '}keys *_spatial_transformer.layers.*.1.spatial_rel_pos_bias.*, which belong to "
            "'rel'; the file's options or weights were changed"
        )
    return OmniTokenizerConfig(
        n_codes=n_codes,
        codebook_dim=_size(weights, "codebook_dim", r"codebook\.embeddings", axis=1),
        embedding_dim=_size(weights, "embedding_dim", r"post_vq_conv\.1\.(weight|bias)"),
        heads=_size(weights, "heads", r".*\.layers\.\d+\.1\.to_q\.weight") // dim_head,
        dim_head=dim_head,
        ff_width=_size(weights, "ff_width", r".*\.layers\.\d+\.3\.4\.weight", axis=1),
        patch_size=math.isqrt(first_patch // 3),
        temporal_patch_size=patch // first_patch,
        twod_window_size=math.isqrt(_size(weights, "twod_window_size", r".*\.1\.relative_position_index"))
        if windows
        else 8,
        enc_block=blocks["enc_block"],
        dec_block=blocks["dec_block"],
        temporal_depth=max(
            len(blocks["enc_temporal"]), len(blocks["dec_temporal"]), options.get("temporal_depth") or 0
        ),
        spatial_pos=spatial_pos,
        explicit_attention=explicit_attention,
        causal_in_temporal_transformer=_flag(options, "causal_in_temporal_transformer"),
        causal_in_peg=_flag(options, "causal_in_peg"),
        l2_code=bool(options.get("l2_code", True)),
    )


def _size(weights: Mapping[str, Tensor], name: str, *patterns: str, axis: int = 0) -> int:
    for pattern in patterns:
        for key, value in weights.items():
            if re.fullmatch(pattern, key) and value.ndim > axis:
                return value.shape[axis]
    key_name = patterns[0]
    for pattern, plain in (("(weight|bias)", "weight"), ("[qk]", "q"), (r"\d+", "*"), (".*", "*"), ("\\", "")):
        key_name = key_name.replace(pattern, plain)
    found = ", ".join(sorted(weights)[:6]) or "nothing"
    raise ValueError(f"state dict must hold the key {key_name}, without which {name} cannot be told; found {found}")


def _letters(weights: Mapping[str, Tensor], stack: str) -> str:
    layers: dict[int, str] = {}
    for key in weights:
        found = re.match(rf"{re.escape(stack)}\.layers\.(\d+)\.(.*)", key)
        if found:
            index = int(found[1])
            window = re.match(r"1\.(relative_position_|qkv\.|proj\.)", found[2])
            layers[index] = "w" if window or layers.get(index) == "w" else "t"
    return "".join(layers.get(index, "t") for index in range(max(layers, default=-1) + 1))


def _flag(options: Mapping[str, Any], name: str) -> bool:
    found = {key: bool(options[key]) for key in (name, name.replace("causal", "casual")) if key in options}
    if len(set(found.values())) > 1:
        raise ValueError(f"options {' and '.join(found)} are two spellings of one and must agree, got {found}")
    return next(iter(found.values()), True)
