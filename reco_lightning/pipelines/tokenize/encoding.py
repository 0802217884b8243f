# SPDX-License-Identifier: Apache-2.0
"""Encodes clips through Lightning's predict loop, on any number of devices.

Clips come from a `VideoFolder`; ids go to an `PartialTokens`, a file for each process.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import lightning.pytorch as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from typing_extensions import override

from reco_lightning.data.clips.folder import VideoFolder
from reco_lightning.data.loading.worker_signals import SignalsToParent
from reco_lightning.data.video.clip import VideoError
from reco_lightning.pipelines.tokenize.partial_output import PartialTokens, PartWriter, difference
from reco_lightning.tokenizers.base import VideoTokenizer, to_unit_range

__all__ = [
    "ClipBatch",
    "ClipsToEncode",
    "EncodeModule",
    "PartsCallback",
    "as_it_was",
    "batches_to_do",
    "usual_workers",
]

_MOST_WORKERS = 8


class ClipBatch(TypedDict):
    """Some clips: `video` uint8 (B, T, H, W, 3), `clips` their numbers, `failed` numbers and reasons of others."""

    video: Tensor
    clips: list[int]
    failed: list[tuple[int, str]]


def batches_to_do(done: npt.NDArray[np.bool_], batch_size: int) -> list[int]:
    """Returns the batches of which a clip is not encoded yet; batch k holds clips k * batch_size and on.

    Batches are the same in every run and in every process, whatever was done before, so that a clip is always encoded
    beside the same others: then its ids depend on nothing else, to the last bit.

    Args:
        done: Which clips are encoded, (clips,).
        batch_size: Clips per batch.

    Returns:
        Numbers of the batches, ascending.

    Example:
        >>> batches_to_do(np.array([True, True, True, False, False]), 2)
        [1, 2]
    """
    starts = range(0, len(done), batch_size)
    return [start // batch_size for start in starts if not done[start : start + batch_size].all()]


def usual_workers(devices: int) -> int:
    """Returns how many worker processes read videos for each device: one for each core, where forking is cheap.

    Args:
        devices: Devices of this machine, which share its cores.
    """
    if multiprocessing.get_start_method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // devices))


@contextmanager
def as_it_was(tokenizer: VideoTokenizer) -> Iterator[None]:
    """Puts a tokenizer back on its device, in its modes and with its trainer, whatever happens inside.

    Args:
        tokenizer: One that is no `torch.nn.Module` is left alone.
    """
    if not isinstance(tokenizer, nn.Module):
        yield
        return
    first: Tensor | None = next(itertools.chain(tokenizer.parameters(), tokenizer.buffers()), None)
    device = None if first is None else first.device
    modes = [(module, module.training) for module in tokenizer.modules()]
    trainer = _trainer_of(tokenizer)
    try:
        yield
    finally:
        if device is not None:
            tokenizer.to(device)
        for module, training in modes:
            module.training = training
        if isinstance(tokenizer, L.LightningModule):
            tokenizer.trainer = trainer


class EncodeModule(L.LightningModule):
    """A tokenizer whose `predict_step` encodes.

    Args:
        tokenizer: Any.
    """

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @override
    def predict_step(self, batch: ClipBatch) -> Tensor:
        """Returns the ids (B, t, h, w), or (B, N), of a batch; (0,) of one of which no clip could be read."""
        video = batch["video"]
        return self.tokenizer.encode(to_unit_range(video)) if len(video) else video.new_empty(0, dtype=torch.int64)


class ClipsToEncode(L.LightningDataModule):
    """The batches of clips that are not encoded yet, dealt out to the processes.

    Args:
        folder: The clips.
        work: What is done.
        plan: All that the clips and their ids depend on; it has to be the same for all processes.
        batch_size: Clips per batch.
        num_workers: Worker processes that read videos; 0 reads in the encoding process.
    """

    def __init__(
        self,
        folder: VideoFolder,
        work: PartialTokens,
        *,
        plan: Mapping[str, Any],
        batch_size: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.folder, self.work, self.plan = folder, work, plan
        self.batch_size, self.num_workers = batch_size, num_workers
        self.to_do: list[int] = []

    @override
    def setup(self, stage: str) -> None:
        """Finds out what is to be done: one process looks, as others may look when some clips more are done.

        Raises:
            ValueError: The processes have different plans.
        """
        assert self.trainer is not None
        own = batches_to_do(self.work.read().done, self.batch_size) if self.trainer.is_global_zero else []
        self.to_do, expected = self.trainer.strategy.broadcast((own, self.plan))
        if changed := difference(expected, self.plan):
            raise ValueError(
                f"all processes must have the same tokenizer and videos, but between process 0 and process "
                f"{self.trainer.global_rank} {changed}; let each load the same checkpoint and mount the same folder"
            )

    @override
    def predict_dataloader(self) -> DataLoader[ClipBatch]:
        """This process's share: every n-th batch, so that all reach the end at about the same time."""
        assert self.trainer is not None
        # a process with nothing to do encodes a batch again, as Lightning stops at loaders without one
        share = self.to_do[self.trainer.global_rank :: self.trainer.world_size] or [0]
        return DataLoader(
            _Batches(self.folder, share, self.batch_size),
            batch_size=1,
            collate_fn=_only,
            num_workers=self.num_workers,
            worker_init_fn=SignalsToParent(),
            pin_memory=torch.cuda.is_available(),
        )


class PartsCallback(BasePredictionWriter):
    """Writes the ids that each process encodes to a file of its own, shows progress, and ends the work.

    Args:
        work: Where to.
        paths: The video file of each clip, for warnings.
        finish: Called by one process when all clips of all processes are written; the others wait for it.
        progress: Show a progress bar.
    """

    def __init__(
        self, work: PartialTokens, paths: Sequence[str], finish: Callable[[], None], *, progress: bool = True
    ) -> None:
        super().__init__("batch")
        self.work, self.paths, self.finish, self.progress = work, paths, finish, progress
        self._part: PartWriter | None = None
        self._bar: tqdm[Any] | None = None
        self._named: set[str] = set()

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens this process's file."""
        self._part = self.work.part()
        self._bar = tqdm(
            total=self.work.clips,
            initial=min(self.work.clips, self.work.records()),
            desc="Tokenising",
            unit="clip",
            disable=not (self.progress and trainer.is_global_zero),
            dynamic_ncols=True,
        )

    @override
    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: ClipBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes a batch's ids down, and the reasons why clips could not be read."""
        assert self._part is not None
        assert self._bar is not None
        if batch["clips"]:
            self._part.append(batch["clips"], prediction)
        for clip, reason in batch["failed"]:
            self._part.fail(clip, reason)
            path = self.paths[clip]
            if path not in self._named:
                warnings.warn(f"{path}: {reason}. It was sound when scanned; such clips are left out.", stacklevel=2)
            self._named.add(path)
        if not self._bar.disable:
            self._bar.update(min(self.work.clips, self.work.records()) - self._bar.n)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for all processes; then one of them ends the work."""
        self._close()
        trainer.strategy.barrier("all clips are written")
        if trainer.is_global_zero:
            self.finish()
        trainer.strategy.barrier("the work is ended")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the file; what is in it stays."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._part is not None:
            self._part.close()


class _Batches(Dataset[ClipBatch]):
    """Whole batches as items, so that Lightning and DataLoader cannot put them together in another way."""

    def __init__(self, folder: VideoFolder, numbers: Sequence[int], size: int) -> None:
        self.folder, self.numbers, self.size = folder, numbers, size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> ClipBatch:
        start = self.numbers[index] * self.size
        videos: list[Tensor] = []
        batch: ClipBatch = {"video": torch.empty(0, dtype=torch.uint8), "clips": [], "failed": []}
        for clip in range(start, min(start + self.size, len(self.folder))):
            try:
                videos.append(self.folder.read(clip)["video"])
            except VideoError as error:
                batch["failed"].append((clip, error.reason))
            else:
                batch["clips"].append(clip)
        if videos:
            batch["video"] = torch.stack(videos)
        return batch


def _only(items: list[ClipBatch]) -> ClipBatch:
    return items[0]


def _trainer_of(tokenizer: nn.Module) -> L.Trainer | None:
    try:
        return tokenizer.trainer if isinstance(tokenizer, L.LightningModule) else None
    except RuntimeError:  # it has none
        return None
