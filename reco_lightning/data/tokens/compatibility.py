# SPDX-License-Identifier: Apache-2.0
"""Compares token shards with network and sampler before the first step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from reco_lightning.data.tokens.manifest import Manifest

__all__ = ["mismatches", "refuse_mismatch"]


def mismatches(manifest: Manifest, *, network: Any = None, samplers: Sequence[Any] = ()) -> list[str]:
    """Returns all numbers in which token shards differ from what they are to train.

    Args:
        manifest: Of the shards.
        network: What turns ids into logits; of its `vocab_size`, `grid` and `num_tokens` those are compared that it
            has. Grids of different numbers of axes are compared by the number of ids. Its `condition_tokens`, if any,
            are ids at a sample's beginning that are given and not predicted.
        samplers: Window samplers, with `frame_blocks` and `tokens_per_block`, which count predicted ids. Where ids are
            in order of time, a frame block is one step of the grid's first axis; elsewhere blocks are equal ranges.

    Returns:
        One phrase for each; empty if all fit.

    Example:
        >>> from reco_lightning.windowing.sampler import WindowSampler
        >>> manifest = Manifest(vocab_size=8, grid=(5, 16, 16), dtype="uint16", clips=1)
        >>> mismatches(manifest, samplers=[WindowSampler(5, 64)])
        ['the shards hold 1280 ids a clip, the sampler expects 320 (frame_blocks=5 x tokens_per_block=64)']
    """
    found = []
    vocab_size = getattr(network, "vocab_size", None)
    if vocab_size is not None and vocab_size != manifest.vocab_size:
        found.append(f"the shards have vocab_size {manifest.vocab_size}, the model {vocab_size}")
    grid, tokens = getattr(network, "grid", None), getattr(network, "num_tokens", None)
    if grid is not None and len(grid) == len(manifest.grid):
        if tuple(grid) != manifest.grid:
            found.append(f"the shards have grid {manifest.grid}, the model {tuple(grid)}")
    else:
        tokens = tokens if grid is None else math.prod(grid)
        if tokens is not None and tokens != manifest.tokens:
            found.append(f"the shards hold {manifest.tokens} ids a clip, the model {tokens}")
    predicted = manifest.tokens - getattr(network, "condition_tokens", 0)
    for sampler in samplers:
        blocks, per_block = sampler.frame_blocks, sampler.tokens_per_block
        split = f"frame_blocks={blocks} x tokens_per_block={per_block}"
        if blocks * per_block != predicted:
            given = f" and {manifest.tokens - predicted} of the condition" if predicted != manifest.tokens else ""
            found.append(
                f"the shards hold {predicted} ids a clip{given}, the sampler expects {blocks * per_block} ({split})"
            )
        elif manifest.frame_aligned and blocks != manifest.grid[0]:
            found.append(
                f"the shards have {manifest.grid[0]} frame blocks of {manifest.tokens // manifest.grid[0]} ids, the "
                f"sampler {split}"
            )
    return found


def refuse_mismatch(
    manifest: Manifest, *, folder: str | os.PathLike[str], network: Any = None, samplers: Sequence[Any] = ()
) -> None:
    """Checks that token shards fit what they are to train.

    Args:
        manifest: Of the shards.
        folder: Where they lie, for the message.
        network: As in `mismatches`.
        samplers: As in `mismatches`.

    Raises:
        ValueError: They do not; the message has every number that differs.
    """
    if found := mismatches(manifest, network=network, samplers=samplers):
        raise ValueError(
            f"folder must hold token shards that fit the model and its windows, got {os.fspath(folder)!r}: "
            f"{'; '.join(found)}. Set the model and the sampler to the shards' numbers, or tokenise again"
        )
