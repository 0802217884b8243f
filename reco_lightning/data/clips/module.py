# SPDX-License-Identifier: Apache-2.0
"""`VideoDataModule`: batches of clips, split into training and validation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from reco_lightning.data.clips.folder import Clip, OnError, VideoFolder, VideoItem
from reco_lightning.data.index.layouts import Layout, check_names
from reco_lightning.data.loading.resumable_loader import ResumableDataLoader
from reco_lightning.data.loading.worker_signals import SignalsToParent
from reco_lightning.data.video.clip import OnDamage, Resize, fit_size
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS
from reco_lightning.support.argument_checks import (
    check_choice,
    check_finite,
    check_flag,
    check_int,
    check_path,
)

__all__ = ["VideoDataModule", "split_clips"]

StartMethod = Literal["fork", "spawn", "forkserver"]


def split_clips(
    clips: Sequence[Clip],
    *,
    val_fraction: float,
    span: int,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> tuple[list[int], list[int]]:
    """Splits clips so that no frame is seen in training and validated on.

    Whole files, or groups of files, go to one side, drawn by `seed`; at least one to each. Where there is a single
    file, its end is the validation part, and clips that reach into it are dropped.

    Args:
        clips: Clips in order, those of a file together.
        val_fraction: Share of the files (of the clips where there is one file) to validate on, 0 to below 1.
        span: Frames of the file that a clip covers from its first to its last.
        seed: Decides which files.
        groups: Files that have to stay together, each with its group's name; the others are a group each.

    Returns:
        Places of the training clips and of the validation clips, both ascending.

    Raises:
        ValueError: If `val_fraction` is out of range, a single file is too short to be split, or all files are one
            group.

    Example:
        >>> clips = [Clip(path, start, 0) for path in ("a", "b", "c") for start in (0, 17)]
        >>> split_clips(clips, val_fraction=0.3, span=17, seed=0)
        ([0, 1, 4, 5], [2, 3])
    """
    _check_fraction(val_fraction)
    places = range(len(clips))
    if val_fraction == 0:
        return list(places), []
    names = [(groups or {}).get(clip.path, clip.path) for clip in clips]
    files = list(dict.fromkeys(names))
    if len(files) > 1:
        count = min(max(1, round(val_fraction * len(files))), len(files) - 1)
        held_out = set(random.Random(seed).sample(files, count))
        train = [place for place in places if names[place] not in held_out]
        return train, [place for place in places if names[place] in held_out]
    if len({clip.path for clip in clips}) > 1:
        raise ValueError(
            f"val_fraction must be 0 where all files are of one group, which cannot be parted ({files[0]}), got "
            f"{val_fraction}"
        )
    count = max(1, round(val_fraction * len(clips)))
    in_time = sorted(places, key=lambda place: clips[place].start)  # a manifest may name its parts in any order
    held_out_places = in_time[-count:]
    border = clips[held_out_places[0]].start
    train = sorted(place for place in in_time[:-count] if clips[place].start + span <= border)
    if not train:
        raise ValueError(
            f"val_fraction must leave a training clip, got {val_fraction} of the {len(clips)} clips of the only file, "
            f"{clips[0].path}; add files, shorten `frames`, or set val_fraction=0"
        )
    return train, sorted(held_out_places)


class VideoDataModule(L.LightningDataModule):
    """Training and validation batches of clips from a folder of videos.

    A batch is `{"video": uint8 (B, T, H, W, 3), "label": int64 (B,), "index": int64 (B,)}`. Validation is on files that
    training never sees (`split_clips`). The order of training clips is a function of `seed` and the epoch.

    Args:
        root: The folder; see `VideoFolder` for the arguments up to `cache`.
        frames: Frames per clip, T.
        stride: Distance between two frames of a clip, in frames of the file.
        size: Side, or (height, width), of the clips in pixels.
        resize: `short_side_crop` or `squash`.
        clip_step: Distance between the starts of two clips of a file; by default they lie end to end.
        on_error: `skip` leaves unusable files out, `raise` stops.
        on_damage: `skip` leaves damaged files out, `keep` uses their sound parts.
        extensions: Endings that count as video.
        cache: Remember the scan of the files from one start to the next.
        batch_size: Clips per batch, B.
        num_workers: Worker processes per loader; 0 reads in the training process.
        start_method: How workers are started; None takes the platform's default.
        val_fraction: Share of the files to validate on, at least one; 0 validates on nothing.
        seed: Decides which files, and the order of the training clips.
        layout: How the data set lies in `root`; see `open_index`, also for the next two.
        split: Part of the data set, as `train`.
        index: File that lists the videos, where the layout needs one.

    Attributes:
        folder: The whole `VideoFolder`, from `setup` on.
        train_set: Its training clips.
        val_set: Its validation clips.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> VideoDataModule("clips", frames=17, size=128, batch_size=4).batch_size
        4
    """

    folder: VideoFolder | None = None
    train_set: VideoFolder
    val_set: VideoFolder

    def __init__(
        self,
        root: str,
        *,
        frames: int = 17,
        stride: int = 1,
        size: int | tuple[int, int] = 256,
        resize: Resize = "short_side_crop",
        clip_step: int | None = None,
        on_error: OnError = "skip",
        on_damage: OnDamage = "skip",
        extensions: Sequence[str] = VIDEO_EXTENSIONS,
        cache: bool = True,
        batch_size: int = 8,
        num_workers: int = 0,
        start_method: StartMethod | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        layout: Layout = "folders",
        split: str | None = None,
        index: str | None = None,
    ) -> None:
        super().__init__()
        check_path(root=root)
        check_path(index=index, or_none=True)
        check_int(at_least=1, frames=frames, stride=stride, batch_size=batch_size)
        check_int(at_least=1, or_none=True, clip_step=clip_step)
        check_int(at_least=0, num_workers=num_workers)
        check_int(seed=seed)
        check_flag(cache=cache)
        check_names(split, extensions)
        fit_size(1, 1, size=size, resize=resize)  # checks both
        check_choice(get_args(OnError), on_error=on_error)
        check_choice(get_args(OnDamage), on_damage=on_damage)
        check_choice(get_args(Layout), layout=layout)
        check_choice((*get_args(StartMethod), None), start_method=start_method)
        _check_fraction(val_fraction)
        self.root = root
        self.frames, self.stride, self.size, self.resize, self.clip_step = frames, stride, size, resize, clip_step
        self.on_error, self.on_damage, self.extensions, self.cache = on_error, on_damage, extensions, cache
        self.batch_size, self.num_workers, self.start_method = batch_size, num_workers, start_method
        self.val_fraction, self.seed = val_fraction, seed
        self.layout, self.split, self.index = layout, split, index

    @override
    def prepare_data(self) -> None:
        """Scans the folder once per machine, so that other ranks find the answer in the cache."""
        self.folder = self._open_folder()

    @override
    def setup(self, stage: str) -> None:
        """Opens the folder and splits it.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; all see the same split.
        """
        if self.folder is None:
            self.folder = self._open_folder()
        train, held_out = split_clips(
            self.folder.clips,
            val_fraction=self.val_fraction,
            span=(self.frames - 1) * self.stride + 1,
            seed=self.seed,
            groups=self.folder.groups,
        )
        self.train_set, self.val_set = self.folder.select(train), self.folder.select(held_out)

    @override
    def train_dataloader(self) -> DataLoader[VideoItem]:
        """Returns the training clips, shuffled anew every epoch; a resumed run goes on in the middle of one."""
        return ResumableDataLoader(
            self.train_set,
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=self.start_method if self.num_workers else None,
        )

    @override
    def val_dataloader(self) -> DataLoader[VideoItem] | list[DataLoader[VideoItem]]:
        """Returns the validation clips in order; no loader with `val_fraction=0`."""
        return self._loader(self.val_set) if len(self.val_set) else []

    @override
    def predict_dataloader(self) -> DataLoader[VideoItem]:
        """Returns all clips in order."""
        assert self.folder is not None  # setup ran
        return self._loader(self.folder)

    def _open_folder(self) -> VideoFolder:
        return VideoFolder(
            self.root,
            frames=self.frames,
            stride=self.stride,
            size=self.size,
            resize=self.resize,
            clip_step=self.clip_step,
            on_error=self.on_error,
            on_damage=self.on_damage,
            extensions=self.extensions,
            cache=self.cache,
            layout=self.layout,
            split=self.split,
            index=self.index,
        )

    def _loader(self, clips: VideoFolder) -> DataLoader[VideoItem]:
        return DataLoader(
            clips,
            self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=SignalsToParent(),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=self.start_method if self.num_workers else None,
        )


def _check_fraction(val_fraction: float) -> None:
    check_finite(val_fraction=val_fraction)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
