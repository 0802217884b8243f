# SPDX-License-Identifier: Apache-2.0
"""Finds the network's row of every loss row, where loss rows do not follow one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from reco_lightning.windowing.engines.call_slicing import map_hidden
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.injection.dry_run import DryRun

__all__ = ["find_scattered_rows"]


def find_scattered_rows(
    dry_run: DryRun,
    last_block: nn.Module,
    behind: Sequence[nn.Module],
    numbers: Sequence[int],
    *,
    batch: int,
    rows: int,
) -> list[tuple[int, ...]]:
    """Runs the step with the states of some rows altered, and sees which logits follow: two runs for each bit of a row.

    Args:
        dry_run: Where the step can be run.
        last_block: The last of the blocks.
        behind: Modules that read its states; theirs are altered too, since their weights may be zero.
        numbers: Which calls of ``F.cross_entropy`` are asked about.
        batch: B, the size of the batch.
        rows: T, rows of the network.

    Returns:
        For each call the network's row of each loss row of a sample.

    Raises:
        ValueError: If a loss row comes from no row, from several, or from those of another sample.
    """

    def logits(altered: torch.Tensor) -> list[torch.Tensor]:
        """What the calls are given, (B, L, V) each, where rows (B, T) are altered."""

        def alter(values: torch.Tensor) -> torch.Tensor:
            if values.shape[:-1].numel() != batch * rows:
                return values
            mask = altered.to(values.device).view(*values.shape[:-1], 1)
            return torch.where(mask, 1 - values, values)

        def run_block(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return map_hidden(original(*args, **kwargs), alter)

        def change_output(module: nn.Module, args: Any, output: Any) -> Any:
            return alter(output) if isinstance(output, torch.Tensor) else output

        patch = PatchedMethod(last_block, "forward", run_block)
        hooks = [module.register_forward_hook(change_output) for module in behind]
        patch.install()
        try:
            given = [one for one, _ in dry_run.losses(numbers)]
        finally:
            patch.remove()
            for hook in hooks:
                hook.remove()
        return [one.reshape(batch, -1, one.shape[-1]) if one.ndim == 2 else one.flatten(2).mT for one in given]

    plain = logits(torch.zeros(batch, rows, dtype=torch.bool))

    def changed(altered: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(logits(altered), plain, strict=True)
        return [(other != one).any(dim=-1).cpu() for other, one in pairs]

    number = torch.arange(rows)
    origins = [torch.zeros(one.shape[:2], dtype=torch.long) for one in plain]
    for bit in range(max(1, (rows - 1).bit_length())):
        is_set = (number >> bit & 1).bool().expand(batch, rows)
        for origin, ones, zeros in zip(origins, changed(is_set), changed(~is_set), strict=True):
            if bool((ones == zeros).any()):
                raise ValueError(
                    "a row of the loss depends on several rows of the network, or on none (pooling or normalisation "
                    "over rows, a shift behind the blocks); windows need each from one row"
                )
            origin += ones.long() << bit
    first = changed((torch.arange(batch) == 0)[:, None].expand(batch, rows))
    own = all(bool(one[0].all()) and not bool(one[1:].any()) for one in first)
    if not own or any(bool((origin != origin[0]).any()) for origin in origins):
        raise ValueError(
            "loss rows and rows of the network are not in one order: the rows of a sample must stand together, and in "
            "each sample alike"
        )
    return [tuple(origin[0].tolist()) for origin in origins]
