# SPDX-License-Identifier: Apache-2.0
"""Yields batches of a model's own samples in place of data.

Stands in front of `position_loss` (arXiv 2604.07402, Figures 8 to 10).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.sampling.token_sampling import SamplingOptions
from reco_lightning.support.argument_checks import check_int
from reco_lightning.support.lightning_modules import is_lightning_module

__all__ = ["check_batches", "generated_batches", "network_of", "token_layout", "unpack"]


def network_of(model: pl.LightningModule | nn.Module) -> Any:
    """Returns the network of a module that has one as ``network``, or the network itself."""
    network = getattr(model, "network", None) if is_lightning_module(model) else model
    if not isinstance(network, nn.Module):
        raise ValueError(f"model must be a network, or a LightningModule with one as `network`, got {model!r}")
    return network


def check_batches(batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Raises unless the batches can be iterated over.

    Args:
        batches: Anything that can be gone through.

    Raises:
        ValueError: It cannot.

    Example:
        >>> check_batches(3)
        Traceback (most recent call last):
        ValueError: batches must be an iterable of dicts with 'tokens', got 3
    """
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches must be an iterable of dicts with 'tokens', got {batches!r}")


def token_layout(network: Any) -> tuple[int, int, int]:
    """Returns how a network's ids are laid out; ids that lie on no grid of frames are one block.

    Args:
        network: As in ``measure_position_loss``.

    Returns:
        Tokens of a frame block, frame blocks, and ids of a condition in front of them.

    Example:
        >>> from reco_lightning.models.transformer import VideoTransformer
        >>> token_layout(VideoTransformer(vocab_size=32, grid=(5, 2, 2), dim=32, depth=1, heads=2))
        (4, 5, 0)
    """
    front = getattr(network, "condition_tokens", 0)
    blocks = network.grid[0] if len(network.grid) == 3 else 1
    return (network.num_tokens - front) // blocks, blocks, front


def unpack(network: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns the tokens and labels of a batch, on the network's device.

    Args:
        network: As in ``measure_position_loss``.
        batch: As in ``measure_position_loss``.

    Returns:
        Ids, (B, N) int64, and classes, (B,), or None for a network without.

    Raises:
        ValueError: If the batch does not fit the network.
    """
    device = next(network.parameters()).device
    tokens = batch["tokens"].flatten(1).to(device)
    if tokens.shape[1] != network.num_tokens:
        raise ValueError(
            f"batch['tokens'] must hold {network.num_tokens} tokens a sample, the grid {network.grid}; got "
            f"{tokens.shape[1]}"
        )
    return tokens, batch["label"].to(device) if network.num_classes else None


def generated_batches(
    model: pl.LightningModule | nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    given_blocks: int = 0,
    first_index: int = 0,
    **sampling: Any,
) -> Iterator[dict[str, Tensor]]:
    """Replaces the tokens of batches by ones that the model generates, under the same labels or conditions.

    A network without a start token continues from the first true token. With a filter or a temperature below 1 the
    model's loss on its samples falls for that reason alone.

    Args:
        model: As in ``measure_position_loss``.
        batches: As in ``measure_position_loss``.
        given_blocks: Frame blocks from the first on that stay as in the data: 0 generates all, 1 gives the true first
            frame.
        first_index: Number of the first video; with several processes each needs numbers of its own.
        sampling: The fields of `SamplingOptions` by name. A video's number decides its draws: batches may be of any
            size.

    Yields:
        A batch ``{"tokens": (B, N) int64}``, with ``"label"`` where the network has classes.

    Raises:
        ValueError: If ``given_blocks`` is out of its range, or a batch does not fit the network.

    Example:
        >>> from reco_lightning.models.transformer import VideoTransformer
        >>> network = VideoTransformer(vocab_size=32, grid=(2, 2, 2), dim=32, depth=1, heads=2)
        >>> data = [{"tokens": torch.zeros(3, 8, dtype=torch.long)}]
        >>> next(generated_batches(network, data, given_blocks=1))["tokens"][:, :4].sum().item()
        0
    """
    network = network_of(model)
    check_batches(batches)
    options = asdict(SamplingOptions(**sampling))
    tokens_per_block, blocks, front = token_layout(network)
    check_int(given_blocks=given_blocks)
    check_int(at_least=0, first_index=first_index)
    if not 0 <= given_blocks < blocks:
        raise ValueError(
            f"given_blocks must lie from 0 to {blocks - 1} for a network with {blocks} frame blocks, got {given_blocks}"
        )
    given = max(given_blocks * tokens_per_block, 0 if network.prefix or front else 1)
    for batch in batches:
        tokens, labels = unpack(network, batch)
        count = len(tokens)
        made = generate(
            network,
            count,
            condition=tokens[:, :front] if front else labels,
            first_tokens=tokens[:, front : front + given] if given else None,
            indices=range(first_index, first_index + count),
            batch_size=count,
            **options,
        )
        first_index += count
        whole = {"tokens": torch.cat([tokens[:, :front], made], dim=1)}
        yield whole if labels is None else whole | {"label": labels}
