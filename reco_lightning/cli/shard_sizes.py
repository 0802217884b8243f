# SPDX-License-Identifier: Apache-2.0
"""Sets the sizes of network and sampler to those of the token shards.

Used by `reco_lightning.cli.lightning` where a config sets `sizes_from_shards`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from reco_lightning.data.tokens.manifest import MANIFEST, Manifest, read_manifest

__all__ = ["infer_sizes", "sizes_of"]


def sizes_of(manifest: Manifest, *, frame_blocks: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the sizes of a network and of a window sampler that fit token shards.

    Args:
        manifest: Of the shards.
        frame_blocks: Equal ranges into which ids without an order of time are split for windows; fewer where that
            does not divide them. 1 or more.

    Returns:
        `vocab_size` and `grid` (three numbers) of the network; `frame_blocks` and `tokens_per_block` of the sampler.

    Example:
        >>> manifest = Manifest(vocab_size=8192, grid=(5, 32, 32), dtype="uint16", clips=1)
        >>> sizes_of(manifest, frame_blocks=4)
        ({'vocab_size': 8192, 'grid': [5, 32, 32]}, {'frame_blocks': 5, 'tokens_per_block': 1024})
    """
    tokens, blocks = math.prod(manifest.grid), manifest.grid[0]
    if not manifest.frame_aligned:
        blocks = max(number for number in range(1, frame_blocks + 1) if tokens % number == 0)
    grid = list(manifest.grid) if len(manifest.grid) == 3 else [blocks, 1, tokens // blocks]
    return (
        {"vocab_size": manifest.vocab_size, "grid": grid},
        {"frame_blocks": blocks, "tokens_per_block": tokens // blocks},
    )


def infer_sizes(arguments: Any) -> dict[str, tuple[Any, Any]]:
    """Sets the sizes in the parsed arguments of a run to those of the shards in `data.folder`, if these are there.

    Args:
        arguments: jsonargparse's namespace of a subcommand, changed in place. Of the model those of `vocab_size` and
            `grid` are set that its `network` takes; of the callbacks the `sampler` with `frame_blocks`.

    Returns:
        What was changed: dotted key to (before, after).

    Raises:
        ValueError: The manifest is damaged.
    """
    folder = arguments.get("data.init_args.folder")
    if not isinstance(folder, str) or not Path(folder, MANIFEST).is_file():
        return {}
    manifest = read_manifest(folder)
    callbacks = arguments.get("trainer.callbacks") or []
    places = {"model.network": arguments.get("model.init_args.network.init_args")}
    for number, callback in enumerate(callbacks if isinstance(callbacks, list) else [callbacks]):
        places[f"trainer.callbacks[{number}].sampler"] = callback.get("init_args.sampler.init_args")
    split = next((place["frame_blocks"] for place in places.values() if place and "frame_blocks" in place), 1)
    network, sampler = sizes_of(manifest, frame_blocks=split)
    changed = {}
    for name, place in places.items():
        for key, value in (network if name == "model.network" else sampler).items():
            if place is None or key not in place:
                continue
            before = list(place[key]) if isinstance(place[key], tuple) else place[key]
            if before != value:
                changed[f"{name}.{key}"] = (before, value)
                place[key] = value
    return changed
