# SPDX-License-Identifier: Apache-2.0
"""Reads the videos and captions behind the clips of token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from reco_lightning.data.tokens.shards import ClipSource, TokenShards
from reco_lightning.data.video.clip import VideoInfo, probe, read_clip
from reco_lightning.data.video.frames import is_frame_folder

__all__ = ["RealClips", "clips_of_test"]

_AT_ONCE = 64  # files that a process looks into before the processes tell each other what they found


def clips_of_test(trainer: pl.Trainer) -> Any:
    """Returns the data set that a trainer tests on, from the start of the test on.

    Args:
        trainer: Has one test loader.
    """
    loaders: Any = trainer.test_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    return loader.dataset


class RealClips:
    """Frames and captions of a test set, by the places of the clips in it.

    Args:
        clips: The test set: ``TokenShards``, or a subset of them.
        folder: Folder of the video files; captions need none.
        frames: T, frames of a video from the start of its clip on; ``None`` is what the shards were made of.

    Example:
        >>> import tempfile
        >>> from reco_lightning.data.tokens.shards import TokenShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TokenShardWriter(folder, vocab_size=8, grid=(1, 1, 2)) as writer:
        ...         writer.write([[[[1, 2]]], [[[3, 4]]]], labels=[0, 0], captions=["a cat", "a dog"])
        ...     RealClips(TokenShards(folder)).captions([1])
        ['a dog']
    """

    def __init__(self, clips: Any, folder: str | None = None, *, frames: int | None = None) -> None:
        self.clips, self.folder, self.frames = clips, folder, frames
        self._infos: dict[Path, VideoInfo] = {}  # of the files that were looked into

    def captions(self, places: list[int]) -> list[str]:
        """Captions of clips.

        Args:
            places: Of the clips.

        Raises:
            ValueError: If the test set is not of token shards, or a clip has no caption.
        """
        shards, numbers = self._origin(places)
        captions = [shards.caption(number) for number in numbers]
        if None in captions:
            raise ValueError("clip must be None: these shards have clips without a caption")
        return [str(caption) for caption in captions]

    def read(self, places: list[int]) -> Tensor:
        """Returns the frames of clips, resized and cropped as for the shards.

        Args:
            places: Of the B clips.

        Returns:
            uint8 (B, T, H, W, 3).

        Raises:
            ValueError: If the test set is not of token shards, or the folder lacks a file.
        """
        read = []
        for place in places:
            path, source, how = self._file(place)
            read.append(
                read_clip(
                    path,
                    start=source.start,
                    frames=self.frames or how["frames"],
                    stride=how["stride"],
                    size=tuple(how["size"]),
                    resize=how["resize"],
                    info=self._infos.get(path),
                )
            )
        return torch.from_numpy(np.stack(read))

    def long_enough(self, wanted: int, trainer: pl.Trainer) -> tuple[list[int], int]:
        """Returns the first clips whose videos go on for T frames; each process looks into its share of the files.

        Args:
            wanted: How many clips.
            trainer: Says which process this is, and joins what all of them found; called on all of them.

        Returns:
            Places of the clips, fewer than ``wanted`` where there are no more, and how many clips before the last of
            them are left out, as their videos end too early.

        Raises:
            ValueError: As `read`, or if fewer than 2 clips are left.
        """
        assert self.frames is not None
        rank_zero_info(f"Looking for {wanted} clips whose videos in {self.folder} go on for {self.frames} frames")
        chosen: list[int] = []
        short: list[str] = []
        for begin in range(0, len(self.clips), _AT_ONCE * trainer.world_size):
            part = range(begin, min(begin + _AT_ONCE * trainer.world_size, len(self.clips)))
            found = torch.zeros(len(part), dtype=torch.int64, device=trainer.strategy.root_device)
            for place in part[trainer.global_rank :: trainer.world_size]:
                found[place - begin] = self._frames_of_file(place)
            for place, frames in zip(part, trainer.strategy.reduce(found, reduce_op="sum").tolist(), strict=True):
                path, source, how = self._file(place)
                needed = source.start + (self.frames - 1) * how["stride"] + 1
                if needed <= frames:
                    chosen.append(place)
                else:
                    short.append(
                        f"{path} needs {needed} frames for the clip from frame {source.start} on, and has {frames}"
                    )
                if len(chosen) == wanted:
                    return chosen, len(short)
        if len(chosen) < 2:
            raise ValueError(
                f"length must leave 2 test clips or more whose videos go on for {self.frames} frames, got "
                f"{len(chosen)} of {len(self.clips)}: {short[0]}"
            )
        return chosen, len(short)

    def _frames_of_file(self, place: int) -> int:
        path, *_ = self._file(place)
        if path not in self._infos:
            self._infos[path] = probe(path)
        return self._infos[path].frames

    def _file(self, place: int) -> tuple[Path, ClipSource, dict[str, Any]]:
        """Where a clip comes from, and how it was read for the shards."""
        assert self.folder is not None
        shards, (number,) = self._origin([place])
        source = shards.source(number)
        if source is None:
            raise ValueError("videos must be None: these shards do not say which file their clips come from")
        path = Path(self.folder, source.path)
        if not path.is_file() and not is_frame_folder(path):
            raise ValueError(f"videos must hold {source.path}, which the shards name; got {self.folder!r}")
        return path, source, dict(shards.manifest.video)

    def _origin(self, places: list[int]) -> tuple[TokenShards, list[int]]:
        """The shards behind the clips, and the clips' numbers in them."""
        if isinstance(self.clips, TokenShards):
            return self.clips, places
        if isinstance(getattr(self.clips, "dataset", None), TokenShards):
            return self.clips.dataset, [self.clips.indices[place] for place in places]
        raise ValueError(f"videos and clip need the test clips to be of token shards, got {type(self.clips).__name__}")
