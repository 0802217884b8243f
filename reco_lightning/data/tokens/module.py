# SPDX-License-Identifier: Apache-2.0
"""`TokenDataModule`: batches of tokens from token shards, split into training and validation."""

from __future__ import annotations

import random
from typing import Literal

import lightning.pytorch as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from reco_lightning.data.index.ucf101 import group_of
from reco_lightning.data.loading.resumable_loader import ResumableDataLoader
from reco_lightning.data.loading.sample_order import data_ranks
from reco_lightning.data.loading.worker_signals import SignalsToParent
from reco_lightning.data.tokens.compatibility import refuse_mismatch
from reco_lightning.data.tokens.shards import TokenItem, TokenShards
from reco_lightning.support.argument_checks import check_finite, check_flag, check_int, check_path

__all__ = ["Split", "TokenDataModule", "split_by_source", "split_by_time", "split_shards"]

Split = Literal["source", "time"]
Table = npt.NDArray[np.int64]


def split_by_source(table: Table, *, val_fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits clips by file: whole files go to one side, at least one to each.

    With the same files, fraction and seed these are the files that `VideoDataModule` holds out, so that clips which the
    tokenizer never saw validate the model too. Where there is a single file, the split is `split_by_time`.

    Args:
        table: int64 (clips, 6), `TokenShards.table`.
        val_fraction: Share of the files to validate on, 0 to below 1.
        seed: Decides which files.

    Returns:
        Places of the training clips and of the validation clips, both ascending.

    Raises:
        ValueError: `val_fraction` is out of range, or a single file is too short to be split.

    Example:
        >>> table = np.array([[0, 0, 0, 17, 1], [0, 1, 0, 17, 1], [0, 1, 17, 34, 1], [0, 2, 0, 17, 1]])
        >>> split_by_source(table, val_fraction=0.3, seed=0)
        ([0, 3], [1, 2])
    """
    _check_fraction(val_fraction)
    if val_fraction == 0:
        return list(range(len(table))), []
    # in the order of their clips, as VideoDataModule numbers them
    files = list(dict.fromkeys(table[:, 1].tolist()))
    if len(files) == 1:
        return split_by_time(table, val_fraction=val_fraction)
    count = min(max(1, round(val_fraction * len(files))), len(files) - 1)
    held_out = np.isin(table[:, 1], random.Random(seed).sample(files, count))
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


def split_by_time(table: Table, *, val_fraction: float) -> tuple[list[int], list[int]]:
    """Splits every file's clips by time: the last ones validate, and clips that share frames with them are left out.

    Args:
        table: int64 (clips, 6), `TokenShards.table`. Clips of unknown origin count as one file in order.
        val_fraction: Share of each file's clips to validate on, 0 to below 1; a file of one clip is for training.

    Returns:
        Places of the training clips and of the validation clips, both ascending.

    Raises:
        ValueError: `val_fraction` is out of range, or one side is empty.

    Example:
        >>> table = np.array([[0, 0, start, start + 17, 1] for start in range(0, 50, 10)])
        >>> split_by_time(table, val_fraction=0.2)  # clip 3 reaches into clip 4
        ([0, 1, 2], [4])
    """
    _check_fraction(val_fraction)
    if val_fraction == 0:
        return list(range(len(table))), []
    train: list[int] = []
    held_out: list[int] = []
    for source in np.unique(table[:, 1]):
        places = np.flatnonzero(table[:, 1] == source)
        starts, stops = table[places, 2], table[places, 3]
        if source < 0:
            starts = np.arange(len(places))
            stops = starts + 1
        places, starts, stops = (values[np.argsort(starts, kind="stable")] for values in (places, starts, stops))
        count = max(1, round(val_fraction * len(places))) if len(places) > 1 else 0
        border = starts[len(places) - count] if count else stops.max()
        train += places[: len(places) - count][stops[: len(places) - count] <= border].tolist()
        held_out += places[len(places) - count :].tolist()
    if not train or not held_out:
        raise ValueError(
            f"val_fraction must leave clips for training and for validation, got {val_fraction} of {len(table)} clips, "
            f"which leaves {len(train)} and {len(held_out)}; tokenise more or shorter clips, or set val_fraction=0"
        )
    return sorted(train), sorted(held_out)


def split_shards(
    shards: TokenShards, split: Split, *, val_fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Splits the clips of a folder of token shards.

    Videos of UCF101 that were cut from one recording (the `gXX` in their names) count as one file under `source`, as
    in `VideoDataModule`.

    Args:
        shards: The clips.
        split: `source` or `time`.
        val_fraction: As in `split_by_source` and `split_by_time`.
        seed: As in `split_by_source`.

    Returns:
        Places of the training clips and of the validation clips, both ascending.

    Raises:
        ValueError: An argument is out of range, or the clips cannot be split so.
    """
    table = shards.table()
    if split == "time":
        return split_by_time(table, val_fraction=val_fraction)
    if shards.manifest.video.get("layout") == "ucf101":
        groups = [group_of(name) for name in shards.manifest.sources]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        if val_fraction and len(numbers) == 1 < len(groups):
            raise ValueError(
                f"val_fraction must be 0 where all videos are of one group, which cannot be parted ({groups[0]}), got "
                f"{val_fraction}; or use split='time'"
            )
        table[:, 1] = np.array([*(numbers[group] for group in groups), -1])[table[:, 1]]  # -1 stays: not known
    return split_by_source(table, val_fraction=val_fraction, seed=seed)


class TokenDataModule(L.LightningDataModule):
    """Training and validation batches of tokens from a folder of token shards.

    A batch is `{"tokens": int64 (B, N), "label": int64 (B,)}`. The training loader is a `ResumableDataLoader`: a run
    stopped at any step and resumed from its checkpoint sees the batches that the uninterrupted one would have seen.

    Shards that do not fit are refused before the first step: their vocabulary and grid are compared with those of the
    module's `network`, their ids and frame blocks with the `sampler` of a callback (`ReCoCallback`), where there are
    such.

    Args:
        folder: A folder that `reco tokenize` wrote.
        batch_size: Clips per batch and process, B.
        num_workers: Worker processes per loader; 0 reads in the training process, which is fast for tokens.
        val_fraction: Share to validate on; 0 validates on nothing.
        split: `source` validates on whole files that training never sees, `time` on the end of every file.
        shuffle: Training clips in a new order in every epoch.
        seed: Of that order.
        split_seed: Decides which files are for validation; one of its own, so that runs of several seeds compare.
        drop_last: Leave out training clips that do not fill a batch on every process.
        strict_resume: Refuse to resume from a checkpoint with other data, batch size or number of processes; False
            warns, and serves that epoch from its beginning.
        verify: Compare the checksums of all shards first.

    Attributes:
        shards: The whole `TokenShards`, from `setup` on.
        train_set: Its training clips.
        val_set: Its validation clips.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> TokenDataModule("tokens", batch_size=4).batch_size
        4
    """

    shards: TokenShards
    train_set: Subset[TokenItem]
    val_set: Subset[TokenItem]

    def __init__(
        self,
        folder: str,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split: Split = "source",
        shuffle: bool = True,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = True,
        strict_resume: bool = True,
        verify: bool = False,
    ) -> None:
        super().__init__()
        check_path(folder=folder)
        check_int(at_least=1, batch_size=batch_size)
        check_int(at_least=0, num_workers=num_workers)
        check_int(seed=seed, split_seed=split_seed)
        check_finite(val_fraction=val_fraction)
        check_flag(shuffle=shuffle, drop_last=drop_last, strict_resume=strict_resume, verify=verify)
        if split not in ("source", "time"):
            raise ValueError(f"split must be 'source' or 'time', got {split!r}")
        _check_fraction(val_fraction)
        self.folder = folder
        self.batch_size, self.num_workers = batch_size, num_workers
        self.val_fraction, self.split, self.split_seed = val_fraction, split, split_seed
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.strict_resume, self.verify = strict_resume, verify

    @override
    def prepare_data(self) -> None:
        """Compares the checksums, once per machine, if `verify`."""
        if self.verify:
            TokenShards(self.folder).verify()

    @override
    def setup(self, stage: str) -> None:
        """Opens the shards and splits them.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; all see the same split.

        Raises:
            ValueError: There are no shards, or they do not fit the model or, in `fit`, the windows.
        """
        self.shards = TokenShards(self.folder)
        self._refuse_misfit(stage)
        train, held_out = split_shards(self.shards, self.split, val_fraction=self.val_fraction, seed=self.split_seed)
        if shared := len(self.shards) - len(train) - len(held_out):
            rank_zero_info(f"{shared} clips share frames with the validation clips and are left out of the training.")
        self.train_set, self.val_set = Subset(self.shards, train), Subset(self.shards, held_out)

    @override
    def train_dataloader(self) -> ResumableDataLoader[TokenItem]:
        """Returns the training clips.

        Raises:
            ValueError: They do not fill a batch on every process, or do not fit the model or the windows.
        """
        self._refuse_misfit("fit")
        rank, world_size = data_ranks(self.trainer)
        loader = ResumableDataLoader(
            self.train_set,
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            drop_last=self.drop_last,
            epoch_batches=(self.trainer.limit_train_batches if self.trainer else 1.0) or 1.0,
            strict=self.strict_resume,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
        if len(loader) == 0:
            raise ValueError(
                f"batch_size must let the {len(self.train_set)} training clips of {self.folder} fill a batch on each "
                f"of {world_size or 1} process(es), got {self.batch_size}; lower it, or set drop_last=False"
            )
        return loader

    @override
    def val_dataloader(self) -> DataLoader[TokenItem] | list[DataLoader[TokenItem]]:
        """Returns the validation clips in order; no loader with `val_fraction=0`."""
        self._refuse_misfit("validate")  # again: the network may have been made after setup, in configure_model
        return self._in_order(self.val_set) if len(self.val_set) else []

    @override
    def test_dataloader(self) -> DataLoader[TokenItem]:
        """Returns the validation clips, or all clips with `val_fraction=0`: a folder of test tokens."""
        return self._in_order(self.val_set if len(self.val_set) else self.train_set)

    @override
    def predict_dataloader(self) -> DataLoader[TokenItem]:
        """Returns all clips in order."""
        return self._in_order(Subset(self.shards, range(len(self.shards))))

    def _refuse_misfit(self, stage: str) -> None:
        if self.trainer is None:
            return
        network = getattr(self.trainer.lightning_module, "network", None)
        callbacks = getattr(self.trainer, "callbacks", []) if stage == "fit" else []
        windows = [getattr(callback, "sampler", None) for callback in callbacks]
        samplers = [each for each in windows if hasattr(each, "frame_blocks") and hasattr(each, "tokens_per_block")]
        refuse_mismatch(self.shards.manifest, folder=self.folder, network=network, samplers=samplers)

    def _in_order(self, clips: Subset[TokenItem]) -> DataLoader[TokenItem]:
        return DataLoader(
            clips,
            self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=SignalsToParent(),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def _check_fraction(val_fraction: float) -> None:
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
