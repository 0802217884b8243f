# SPDX-License-Identifier: Apache-2.0
"""Positions, queries and type vectors of the LARP tokenizer (Wang et al., arXiv 2410.21264), by their stored names."""

from __future__ import annotations

import torch
from torch import Tensor

from reco_lightning.tokenizers.larp.config import LARPConfig

__all__ = ["DECODER_AXES", "ENCODER_AXES", "fresh_tables", "patch_positions", "sine_table"]

# Learned positions are sums of these, by row, column and time; the release spells one without its "r".
ENCODER_AXES = ("encoder_h_embed", "encode_w_embed", "encoder_t_embed")
DECODER_AXES = ("decoder_h_embed", "decoder_w_embed", "decoder_t_embed")


def sine_table(width: int, length: int, base: float = 10_000.0) -> Tensor:
    """Returns the fixed positions: sines, then cosines of a position in waves of growing length.

    Args:
        width: D, even.
        length: Number of positions.
        base: Ratio of the longest to the shortest wave.

    Returns:
        float32, (length, D).

    Example:
        >>> sine_table(2, 2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])
    """
    waves = base ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def patch_positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """Returns the fixed positions of patches: columns and rows share the width, time is added over all of it.

    Args:
        grid: Patches in time, rows and columns.
        width: D, a multiple of 4.

    Returns:
        float32, (t * h * w, D), columns running fastest.

    Example:
        >>> patch_positions((1, 1, 2), 4)
        tensor([[0.0000, 1.0000, 1.0000, 2.0000],
                [0.8415, 0.5403, 1.0000, 2.0000]])
    """
    time, rows, columns = grid
    place = torch.cat(
        [
            sine_table(width // 2, columns).expand(rows, columns, -1),
            sine_table(width // 2, rows)[:, None].expand(rows, columns, -1),
        ],
        dim=-1,
    )  # (h, w, D)
    return (place + sine_table(width, time)[:, None, None]).flatten(0, 2)


def fresh_tables(config: LARPConfig) -> dict[str, Tensor]:
    """Makes the tables of a tokenizer that is not trained yet; the options say which there are.

    Args:
        config: Sizes and options.

    Returns:
        Tables by the name under which the release stores them.

    Example:
        >>> list(fresh_tables(LARPConfig(use_decoder_patch_query_token_type_embed=False)))
        ['encoder_latent_query_embed', 'decoder_latent_pe', 'encoder_patch_pe', 'decoder_patch_query_embed']
    """
    width, out_width, tokens = config.encoder_hidden_size, config.decoder_hidden_size, config.bottleneck_token_num
    tables = {
        "encoder_latent_query_embed": torch.randn(tokens, width) * 0.02,
        "decoder_latent_pe": sine_table(out_width, tokens, config.latent_pe_scale_factor)[None],
    }
    if config.learned_encoder_patch_pe:
        tables.update(zip(ENCODER_AXES, _axis_tables(config.patch_grid, width), strict=True))
    else:
        tables["encoder_patch_pe"] = patch_positions(config.patch_grid, width)[None]
    if config.learned_decoder_patch_query_embed:
        tables.update(zip(DECODER_AXES, _axis_tables(config.patch_grid, out_width), strict=True))
    else:
        tables["decoder_patch_query_embed"] = patch_positions(config.patch_grid, out_width)[None]
    types = {
        "encoder_patch": (config.use_encoder_patch_token_type_embed, width),
        "encoder_latent_query": (config.use_encoder_latent_query_token_type_embed, width),
        "decoder_latent": (config.use_decoder_latent_token_type_embed, out_width),
        "decoder_patch_query": (config.use_decoder_patch_query_token_type_embed, out_width),
    }
    for name, (used, size) in types.items():
        if used:
            tables[f"{name}_token_type_embed"] = torch.randn(1, 1, size) * 0.02
    return tables


def _axis_tables(grid: tuple[int, int, int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (1, 1, h, 1, D), columns (1, 1, 1, w, D) and time (1, t, 1, 1, D)."""
    time, rows, columns = grid
    return (
        sine_table(width, rows).view(1, 1, rows, 1, width),
        sine_table(width, columns).view(1, 1, 1, columns, width),
        sine_table(width, time).view(1, time, 1, 1, width),
    )
