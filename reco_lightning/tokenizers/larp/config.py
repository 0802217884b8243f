# SPDX-License-Identifier: Apache-2.0
"""Sizes and options of a LARP tokenizer (Wang et al., arXiv 2410.21264), and how its `config.json` names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from reco_lightning.support.argument_checks import check_finite, check_flag, check_int

__all__ = ["LARPConfig", "config_from_json"]

_TRUNK = "transformer_encoder_parallel"
_NOTHING = (None, "none", "no", "null", "")

# Read by the published code when it makes or trains a model, and never by one whose weights are there.
_TRAINING = {"prior_model", "encoder_query_gaussian_init", "query_init_std"}


@dataclass(frozen=True)
class LARPConfig:
    """Sizes and options of a LARP tokenizer, under the names of its `config.json`; the defaults are its release's.

    Args:
        input_size: H and W of a clip in pixels; clips are square.
        frame_num: T, frames of a full clip.
        temporal_patch_size: Frames of a patch; 1 embeds each frame by a 2-D convolution.
        patch_size: Side of a patch in pixels.
        bottleneck_token_num: N, ids of a clip.
        encoder_hidden_size: Width of the encoder.
        decoder_hidden_size: Width of the decoder.
        encoder_num_heads: Attention heads of the encoder.
        decoder_num_heads: Attention heads of the decoder.
        encoder_depth: Blocks of the encoder.
        decoder_depth: Blocks of the decoder.
        bottleneck_dim: Dimensions of a code.
        codebook_size: V, number of ids.
        stochastic: Whether it was trained with ids drawn from a distribution.
        stochastic_temperature: Temperature of that distribution; below 0 its inverse is learned.
        learned_encoder_patch_pe: Whether patch positions are sums of three learned tables, one an axis.
        learned_encoder_latent_query_embed: Whether the queries for the ids are learned.
        learned_decoder_latent_pe: Whether the positions of ids are learned.
        learned_decoder_patch_query_embed: Whether the decoder's queries are sums of three learned tables.
        use_encoder_patch_token_type_embed: Whether one more vector is added to all patches.
        use_encoder_latent_query_token_type_embed: Likewise to all queries for ids.
        use_decoder_latent_token_type_embed: Likewise to all ids.
        use_decoder_patch_query_token_type_embed: Likewise to all of the decoder's queries.
        latent_pe_scale_factor: Ratio of the longest to the shortest wave of the fixed positions of ids.

    Raises:
        ValueError: A size is out of range or does not divide.

    Example:
        >>> config = LARPConfig()
        >>> config.patch_grid, config.bottleneck_token_num
        ((4, 16, 16), 1024)
    """

    input_size: int = 128
    frame_num: int = 16
    temporal_patch_size: int = 4
    patch_size: int = 8
    bottleneck_token_num: int = 1024
    encoder_hidden_size: int = 768
    decoder_hidden_size: int = 768
    encoder_num_heads: int = 12
    decoder_num_heads: int = 12
    encoder_depth: int = 12
    decoder_depth: int = 12
    bottleneck_dim: int = 16
    codebook_size: int = 8192
    stochastic: bool = True
    stochastic_temperature: float = 0.03
    learned_encoder_patch_pe: bool = False
    learned_encoder_latent_query_embed: bool = True
    learned_decoder_latent_pe: bool = False
    learned_decoder_patch_query_embed: bool = False
    use_encoder_patch_token_type_embed: bool = False
    use_encoder_latent_query_token_type_embed: bool = False
    use_decoder_latent_token_type_embed: bool = False
    use_decoder_patch_query_token_type_embed: bool = True
    latent_pe_scale_factor: float = 10_000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = {field.name: getattr(self, field.name)}
            if field.type == "int":
                check_int(at_least=1, **value)
            elif field.type == "float":
                check_finite(**value)
            elif field.type == "bool":
                check_flag(**value)
        for name, size, part in (
            ("input_size", self.input_size, self.patch_size),
            ("frame_num", self.frame_num, self.temporal_patch_size),
            ("encoder_hidden_size", self.encoder_hidden_size, self.encoder_num_heads),
            ("decoder_hidden_size", self.decoder_hidden_size, self.decoder_num_heads),
            # a quarter of the width for the sines of the columns of a patch
            ("encoder_hidden_size", self.encoder_hidden_size, 4),
            ("decoder_hidden_size", self.decoder_hidden_size, 4),
        ):
            if size % part:
                raise ValueError(f"{name} must be a multiple of {part}, got {size}")
        if self.stochastic and not self.stochastic_temperature:
            raise ValueError("stochastic_temperature must not be 0; below 0 it is learned")

    @property
    def patch_grid(self) -> tuple[int, int, int]:
        """Patches of a full clip: in time, rows and columns."""
        side = self.input_size // self.patch_size
        return self.frame_num // self.temporal_patch_size, side, side


# The published class's own defaults, where they are not the release's.
_CLASS_DEFAULTS = {"encoder_depth": 6, "decoder_depth": 6, "use_decoder_patch_query_token_type_embed": False}
_QUANTISER_DEFAULTS = {"stochastic": False, "stochastic_temperature": 1.0}


def config_from_json(stored: Mapping[str, Any], source: str = "config.json") -> LARPConfig:
    """Reads the options of a released tokenizer.

    Options that only training reads are left out; the published class's defaults stand for what is missing.

    Args:
        stored: What `config.json` holds.
        source: What to call it in an error.

    Raises:
        ValueError: An option is unknown, or has a value that no layout of LARP has.

    Example:
        >>> vq = {"name": "vq", "args": {"codebook_size": 256, "l2_normalized": True}}
        >>> config = config_from_json({"bottleneck": {"args": {"bottleneck_dim": 16, "regularizer": vq}}})
        >>> config.codebook_size, config.encoder_depth, config.stochastic
        (256, 6, False)
    """
    bottleneck = _part(stored, "bottleneck", source)
    quantiser = _part(bottleneck["args"], "regularizer", source)
    codes = quantiser["args"]
    sizes = {field.name for field in fields(LARPConfig)} - {
        "bottleneck_dim",
        "codebook_size",
        "stochastic",
        "stochastic_temperature",
    }
    patch = stored.get("patch_size", 8)
    temporal_patch = stored.get("temporal_patch_size", 4)
    kind = str(stored.get("transformer_name", _TRUNK))
    fixed = (
        ("bottleneck.name", bottleneck.get("name", "bottleneck"), ("bottleneck",)),
        ("bottleneck.args.norm", bottleneck["args"].get("norm", "none"), _NOTHING),
        ("bottleneck.args.regularizer.name", quantiser.get("name", "vq"), ("vq",)),
        ("bottleneck.args.regularizer.args.l2_normalized", codes.get("l2_normalized", False), (True,)),
        ("in_channels", stored.get("in_channels", 3), (3,)),
        ("decoder_patch_size", stored.get("decoder_patch_size", 8), (patch,)),
        ("decoder_temporal_patch_size", stored.get("decoder_temporal_patch_size", 4), (temporal_patch,)),
        ("transformer_name", kind, (_TRUNK,)),
        ("encoder_name", stored.get("encoder_name"), (*_NOTHING, kind)),
        ("decoder_name", stored.get("decoder_name"), (*_NOTHING, kind)),
    )
    for name, value, allowed in fixed:
        if value not in allowed:
            raise ValueError(f"{source}: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
    known = sizes | _TRAINING | {name for name, _, _ in fixed} | {"bottleneck"}
    if unknown := sorted(stored.keys() - known):
        raise ValueError(
            f"{source} must hold the options of a LARP tokenizer alone, got {', '.join(unknown)} too; "
            "what they change is not known here"
        )
    for part in ("bottleneck_dim", "codebook_size"):
        if part not in {**bottleneck["args"], **codes}:
            raise ValueError(f"{source}: bottleneck must name {part}, got {dict(stored['bottleneck'])}")
    return LARPConfig(
        **_CLASS_DEFAULTS | {name: stored[name] for name in sizes & stored.keys()},
        **{name: codes.get(name, value) for name, value in _QUANTISER_DEFAULTS.items()},
        bottleneck_dim=bottleneck["args"]["bottleneck_dim"],
        codebook_size=codes["codebook_size"],
    )


def _part(stored: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    part = stored.get(name)
    if not isinstance(part, Mapping) or not isinstance(part.get("args"), Mapping):
        raise ValueError(f"{source}: {name} must be an object with 'name' and 'args', got {part!r}")
    return part
