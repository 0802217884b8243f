# SPDX-License-Identifier: Apache-2.0
"""The order of samples over epochs, split among processes, as a function of the seed.

`resumable_loader.py` serves it; this file says which items it holds and where in it a run is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

__all__ = ["EpochSampler", "LoaderState", "data_ranks", "epoch_order", "rank_share", "seed_of"]


def seed_of(*key: int) -> int:
    """Mixes several numbers into one seed, so that neighbouring ones give unrelated draws.

    Args:
        key: Whole numbers of 64 bits.

    Returns:
        0 to 2**63 - 1.

    Example:
        >>> seed_of(0, 1) != seed_of(1, 0)
        True
    """
    return int(
        np.random.SeedSequence([number % 2**64 for number in key]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def epoch_order(length: int, *, seed: int, number: int, shuffle: bool = True) -> torch.Tensor:
    """Returns the order in which a pass visits a dataset: a function of its arguments alone.

    Args:
        length: Items in the dataset.
        seed: Of the run.
        number: Of the pass, from 0; the epoch, in a run whose epochs are whole passes.
        shuffle: False gives 0, 1, 2, ... in every pass.

    Returns:
        int64 (length,), a permutation.

    Example:
        >>> torch.equal(epoch_order(9, seed=0, number=1), epoch_order(9, seed=0, number=1))
        True
        >>> epoch_order(4, seed=0, number=1, shuffle=False).tolist()
        [0, 1, 2, 3]
    """
    if not shuffle:
        return torch.arange(length)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(seed, number)))


def rank_share(order: torch.Tensor, *, rank: int, world_size: int, drop_last: bool) -> torch.Tensor:
    """Returns the part of an order that one process visits; all parts are equally long.

    Args:
        order: (n,).
        rank: 0 to world_size - 1.
        world_size: Processes.
        drop_last: True leaves out the last n mod world_size; False fills up with the first ones.

    Returns:
        (floor or ceil of n / world_size,).

    Example:
        >>> [rank_share(torch.arange(5), rank=r, world_size=2, drop_last=False).tolist() for r in (0, 1)]
        [[0, 2, 4], [1, 3, 0]]
        >>> [rank_share(torch.arange(5), rank=r, world_size=2, drop_last=True).tolist() for r in (0, 1)]
        [[0, 2], [1, 3]]
    """
    places = torch.arange(_quotient(len(order), world_size, drop_last)) * world_size + rank
    return order[places % max(len(order), 1)]


def data_ranks(trainer: L.Trainer | None) -> tuple[int | None, int | None]:
    """Returns which part of the data this process gets, as its trainer's strategy sees it.

    Differs from the process's rank where several processes share one copy of the model (tensor parallelism) and so need
    the same batches.

    Args:
        trainer: A data module's trainer; None outside of one.

    Returns:
        (rank, world_size) for `ResumableDataLoader`, or (None, None): look them up when the first batch is asked for.

    Example:
        >>> data_ranks(None)
        (None, None)
    """
    split = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (split["rank"], split["num_replicas"]) if split else (None, None)


@dataclass
class LoaderState:
    """The position of a loader in the stream of batches, one pass over the data after another.

    Epochs need not be whole passes: Lightning ends one early at `max_steps` or `limit_train_batches`, and the next one
    then goes on where it ended, so that a run stopped by `max_steps` and resumed sees what the uninterrupted one saw.

    Attributes:
        epoch: The last one announced.
        start: Batches in the stream before that epoch.
        batches: Batches served in it.
        loaded: Set from a checkpoint, and nothing served since.
        resumed: Set from a checkpoint at some time.
        announced: An epoch was announced since the last iteration began.
    """

    epoch: int = 0
    start: int = 0
    batches: int = 0
    loaded: bool = False
    resumed: bool = False
    announced: bool = False

    def announce(self, epoch: int, epoch_batches: int) -> None:
        """Turns to an epoch.

        Args:
            epoch: From 0. The present one: its beginning, or, from a checkpoint, what is left of it. The next one: on
                from here. Another one: where it begins in a run that is not interrupted.
            epoch_batches: Batches per epoch in such a run.
        """
        # a resumed Lightning run can announce an epoch, serve nothing of it and announce the one after
        follows = epoch > self.epoch if self.resumed else epoch == self.epoch + 1 and self.batches > 0
        if follows:
            self.start, self.batches = self.start + self.batches, 0
        elif epoch != self.epoch:
            self.start, self.batches = epoch * epoch_batches, 0
        elif not self.loaded:
            self.batches = 0
        self.loaded = self.loaded and epoch == self.epoch
        self.epoch, self.announced = epoch, True

    def begin(self, total: int) -> range:
        """Begins an iteration.

        Args:
            total: Batches per pass.

        Returns:
            The batches of the stream to serve.
        """
        if not self.loaded:
            if not self.announced and self.batches == total:  # a loop of one's own, without set_epoch
                self.start += total
            self.batches = 0
        self.loaded = self.announced = False
        return range(self.start + self.batches, self.start + max(total, self.batches))


class EpochSampler(DistributedSampler[int]):
    """Indices of one process in a part of one pass.

    Being a `DistributedSampler` it is left in place by Lightning, which would otherwise put its own, not resumable one
    there; Lightning also calls its `set_epoch`.

    Args:
        dataset: What is visited; only its length counts.
        batch_size: Indices per batch.
        shuffle: New order in every pass.
        seed: Of the order.
        drop_last: Leave out what does not fill a batch on every process.
        epoch_batches: Batches per epoch, a number or a share of the pass; 0 for epochs that all begin at batch 0.
        rank: This process; None asks torch.distributed each time, so that the sampler may be made before the processes.
        world_size: Processes; None likewise.

    Attributes:
        place: Where the loader is.
        part: What the next iteration visits: number of the pass, first batch, end (not visited; -1: to the end).

    Example:
        >>> sampler = EpochSampler(range(6), batch_size=1, shuffle=False, rank=1, world_size=2)
        >>> sampler.part = (0, 1, 3)
        >>> list(sampler), len(sampler)
        ([3, 5], 3)
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        epoch_batches: int | float = 1.0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(
            cast("Dataset[Any]", dataset), num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank and world_size must be given both or neither, got {rank} and {world_size}")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, below world_size, got {rank}")
        self.batch_size, self.epoch_batches = batch_size, epoch_batches
        self.place = LoaderState()
        self.part = (0, 0, -1)
        self._ranks = None if rank is None or world_size is None else (rank, world_size)

    @property
    def length(self) -> int:
        """Items in the dataset."""
        return len(cast("Sized", self.dataset))

    @property
    def ranks(self) -> tuple[int, int]:
        """(rank, world_size) now."""
        if self._ranks is not None:
            return self._ranks
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def batches(self) -> int:
        """Batches per pass and process."""
        return _quotient(len(self), self.batch_size, self.drop_last)

    @override
    def set_epoch(self, epoch: int) -> None:
        limit = self.epoch_batches  # as in Trainer(limit_train_batches=...)
        self.place.announce(epoch, min(limit, self.batches) if isinstance(limit, int) else int(limit * self.batches))
        if self.epoch_batches == 0:
            self.place.start = 0

    @override
    def __iter__(self) -> Iterator[int]:
        (number, first, last), (rank, world_size) = self.part, self.ranks
        order = epoch_order(self.length, seed=self.seed, number=number, shuffle=self.shuffle)
        share = rank_share(order, rank=rank, world_size=world_size, drop_last=self.drop_last)
        end = last * self.batch_size if last >= 0 else len(share)
        return iter(share[first * self.batch_size : end].tolist())

    @override
    def __len__(self) -> int:
        return _quotient(self.length, self.ranks[1], self.drop_last)


def _quotient(number: int, divisor: int, down: bool) -> int:
    return number // divisor if down else -(-number // divisor)
