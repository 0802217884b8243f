# SPDX-License-Identifier: Apache-2.0
"""A DataLoader that resumes in the middle of an epoch.

Lightning stores the state of any train loader that has `state_dict` and `load_state_dict` in its checkpoints and gives
it back on resume; this loader then serves exactly the batches that were left, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from typing_extensions import override

from reco_lightning.data.loading.sample_order import EpochSampler, LoaderState, seed_of
from reco_lightning.data.loading.worker_signals import SignalsToParent, signals_held
from reco_lightning.support.argument_checks import check_finite, check_flag, check_int

__all__ = ["ResumableDataLoader"]

Item = TypeVar("Item")


class ResumableDataLoader(DataLoader[Item]):
    """DataLoader whose place in the stream of batches is part of a Lightning checkpoint.

    The order is a function of the seed and the number of the pass. The processes of a distributed run get equal numbers
    of batches of the same order, and Lightning puts no sampler of its own in place (`use_distributed_sampler=False` is
    not needed). A batch counts as served when it is handed out; what workers have read ahead is served again. Items
    should depend on their index alone: what workers draw at random is not restored. The global random state stays.

    In a loop of your own each iteration is a new pass; `set_epoch` chooses one.

    Args:
        dataset: Map-style.
        batch_size: Items per batch and process.
        shuffle: New order in every pass.
        seed: Of the order.
        drop_last: Leave out what does not fill a batch on every process.
        epoch_batches: The trainer's `limit_train_batches`, a number or a share of the pass. Left out, a run with such a
            limit resumes exactly from the middle of an epoch, but not from the end of one. Changes no length.
        strict: On resume, refuse a state from another dataset length, batch size, seed or number of processes; False
            warns, and serves that epoch from its beginning.
        rank: This process; None asks torch.distributed when needed. See `data_ranks`.
        world_size: Processes; None likewise.
        num_workers: Worker processes; any number, also another one on resume, gives the same batches.
        collate_fn: As in DataLoader.
        pin_memory: As in DataLoader.
        timeout: As in DataLoader, seconds.
        worker_init_fn: As in DataLoader.
        multiprocessing_context: As in DataLoader.
        prefetch_factor: As in DataLoader.
        persistent_workers: As in DataLoader.
        sampler: Only for Lightning, which puts a SequentialSampler here under `overfit_batches`: no shuffling.
        batch_sampler: Only for Lightning; must be None.

    Raises:
        ValueError: An argument is out of range; when iterating, there is no full batch.

    Example:
        >>> loader = ResumableDataLoader(range(6), batch_size=2, shuffle=False)
        >>> batches = iter(loader)
        >>> next(batches), loader.state_dict()["batches"]
        (tensor([0, 1]), 1)
        >>> resumed = ResumableDataLoader(range(6), batch_size=2, shuffle=False)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> list(resumed)
        [tensor([2, 3]), tensor([4, 5])]
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        epoch_batches: int | float = 1.0,
        strict: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Item]], Any] | None = None,
        pin_memory: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        sampler: Sampler[int] | None = None,
        batch_sampler: Sampler[list[int]] | None = None,
    ) -> None:
        check_int(at_least=1, batch_size=batch_size)
        check_int(seed=seed)
        check_int(at_least=0, num_workers=num_workers)
        check_int(or_none=True, rank=rank, world_size=world_size, prefetch_factor=prefetch_factor)
        check_finite(epoch_batches=epoch_batches)
        check_finite(at_least=0, timeout=timeout)
        check_flag(shuffle=shuffle, drop_last=drop_last, strict=strict)
        check_flag(pin_memory=pin_memory, persistent_workers=persistent_workers)
        if not isinstance(dataset, Sized):
            raise ValueError(f"dataset must have a length and items by index, got {dataset!r}")
        if epoch_batches < 1 if isinstance(epoch_batches, int) else not 0 < epoch_batches <= 1:
            raise ValueError(f"epoch_batches must be a number from 1 or a share in (0.0, 1.0], got {epoch_batches}")
        foreign = batch_sampler if batch_sampler is not None else sampler
        if foreign is not None and not isinstance(foreign, (SequentialSampler, EpochSampler)):
            name = "batch_sampler" if batch_sampler is not None else "sampler"
            raise ValueError(
                f"{name} must be None, as ResumableDataLoader makes its own order, got a {type(foreign).__name__}; "
                "use shuffle=False for the dataset's order, or a plain DataLoader (also for trainer.predict)"
            )
        overfit = isinstance(sampler, SequentialSampler)
        shuffle = shuffle and not overfit
        # attributes named as the arguments: Lightning reads them when it makes the loader anew (overfit_batches)
        self.shuffle, self.seed, self.strict, self.epoch_batches = shuffle, seed, strict, epoch_batches
        self.rank, self.world_size = rank, world_size
        self._passes = EpochSampler(
            cast("Sized", dataset),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            epoch_batches=0 if overfit else epoch_batches,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(
            dataset,
            batch_size,
            sampler=self._passes,
            drop_last=drop_last,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, not torch's private iterator class
        # a generator, so that this runs at the first batch: Lightning makes the iterator before it sets the epoch
        total = len(self)
        if total == 0:
            raise ValueError(
                f"batch_size must let {self._passes.length} items fill a batch on each of {self._passes.ranks[1]} "
                f"process(es), got {self.batch_size}; lower it, or set drop_last=False"
            )
        # each iteration has its own place, so that one that was given up does not disturb the next
        place = self._passes.place = replace(self._passes.place)
        stream = place.begin(total)
        while stream:
            number, first = divmod(stream.start, total)
            last = min(total, first + len(stream))
            self._passes.part = (number, first, last)
            # the workers' seed is drawn when they start; a generator that stays could not be sent to spawned processes
            self.generator = torch.Generator().manual_seed(seed_of(self.seed, stream.start))
            start = self.worker_init_fn
            self.worker_init_fn = SignalsToParent(start)  # for now: Lightning fills in its own where it finds none
            with signals_held():
                part = super().__iter__()
            self.generator, self.worker_init_fn = None, start
            for batch in part:
                place.batches += 1
                yield batch
            stream = stream[last - first :]

    def set_epoch(self, epoch: int) -> None:
        """Turns to an epoch, as `LoaderState.announce` says; Lightning calls it through the sampler.

        Args:
            epoch: From 0.
        """
        self._passes.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loader is, and what the order depends on; plain numbers, the same on all ranks."""
        place = self._passes.place
        return {"epoch": place.epoch, "start": place.start, "batches": place.batches, **self._signature()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state: the next iteration serves what was left of its epoch.

        Args:
            state_dict: From `state_dict`.

        Raises:
            ValueError: With `strict`, the state is of another dataset length, batch size, order or number of processes.
        """
        now, epoch = self._signature(), state_dict["epoch"]
        changed = [key for key in now if state_dict.get(key) != now[key]]
        if not changed:
            self._passes.place = LoaderState(
                epoch, state_dict["start"], state_dict["batches"], loaded=True, resumed=True
            )
            return
        difference = ", ".join(f"{key} was {state_dict.get(key)} and is {now[key]}" for key in changed)
        if self.strict:
            raise ValueError(
                f"state_dict must be of a loader like this one to go on where it stopped, but {difference}; restore "
                "the old values, or use strict=False to serve that epoch from its beginning"
            )
        rank_zero_warn(f"The resumed epoch is served from its beginning, as {difference}.")
        self._passes.place = LoaderState(epoch, epoch * len(self))

    def _signature(self) -> dict[str, Any]:
        return {
            "dataset_length": self._passes.length,
            "batch_size": self.batch_size,
            "world_size": self._passes.ranks[1],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }
