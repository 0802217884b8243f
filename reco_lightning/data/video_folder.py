# SPDX-License-Identifier: Apache-2.0
"""A folder of videos as a dataset of clips: what the tokenizer is trained on and what `reco tokenize` reads."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from reco_lightning.data.video import Resize, VideoError, VideoInfo, fit_size, read_clip
from reco_lightning.data.video_scan import VIDEO_EXTENSIONS, find_videos, scan_videos

__all__ = ["Clip", "OnError", "VideoFolder", "VideoItem"]

OnError = Literal["skip", "raise"]


class Clip(NamedTuple):
    """Where a clip lies.

    Attributes:
        path: The video file.
        start: Index of its first frame.
        label: Number of the file's class.
    """

    path: str
    start: int
    label: int


class VideoItem(TypedDict):
    """One clip: `video` uint8 (T, H, W, 3), `label` int64 scalar, `index` its place in `VideoFolder.clips`."""

    video: Tensor
    label: Tensor
    index: int


class VideoFolder(Dataset[VideoItem]):
    """Clips of T frames from all videos below a folder, in sorted order.

    The first folder below `root` is the class of a file; files that lie in `root` itself form the class `"."`. On
    creation every file is decoded once, as `probe` describes; files that are broken, cut off, damaged in the middle,
    empty, without a picture or too short are named, all of them in one warning, and left out. Sound files are
    remembered in `video_scan.cache_file(root)` until they change, so that the next start is quick.

    A file that goes bad later (a failing disk, a replaced file) is named in a warning when it is first met, and the
    next clip of another file stands in for its clips, so that a long run goes on.

    Args:
        root: The folder.
        frames: Frames per clip, T.
        stride: Distance between two frames of a clip, in frames of the file.
        size: Side, or (height, width), of the clips in pixels.
        resize: `short_side_crop` scales the frame until it covers `size` and crops the centre; `squash` distorts.
        clip_step: Distance between the starts of two clips of a file, in frames of the file; by default `frames *
            stride`, so that clips lie end to end.
        on_error: `skip` leaves unusable files out, `raise` stops with a `VideoError`.
        extensions: Endings that count as video.
        cache: Remember the scan from one start to the next.

    Attributes:
        classes: Names of the classes, sorted; the label is the place in this list. Folders count whose files are all
            unusable too, so that labels do not depend on damage.
        clips: Every clip.
        skipped: Files left out, each with the reason.
        infos: What `probe` found in every file that is used.

    Raises:
        ValueError: If an argument is out of range, or `root` is no folder or holds no video.
        VideoError: If no file can be used; with `on_error="raise"`, if any cannot.

    Example:
        >>> import tempfile, numpy as np
        >>> from reco_lightning.media import write_video
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cats/a.mp4", "dogs/b.mp4"):
        ...         _ = write_video(Path(root, name), np.zeros((9, 48, 64, 3), np.uint8))
        ...     folder = VideoFolder(root, frames=4, size=32, cache=False)
        ...     len(folder), folder.classes, folder[3]["video"].shape, int(folder[3]["label"])
        (4, ['cats', 'dogs'], torch.Size([4, 32, 32, 3]), 1)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        frames: int = 17,
        stride: int = 1,
        size: int | tuple[int, int] = 256,
        resize: Resize = "short_side_crop",
        clip_step: int | None = None,
        on_error: OnError = "skip",
        extensions: Sequence[str] = VIDEO_EXTENSIONS,
        cache: bool = True,
    ) -> None:
        step = frames * stride if clip_step is None else clip_step
        for name, value in (("frames", frames), ("stride", stride), ("clip_step", step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        fit_size(1, 1, size=size, resize=resize)  # checks both
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {list(get_args(OnError))}, got {on_error!r}")
        if isinstance(extensions, str) or not all(ending.startswith(".") for ending in extensions):
            raise ValueError(f"extensions must be a list of endings such as ['.mp4', '.mkv'], got {extensions!r}")
        if not Path(root).is_dir():
            found = "a file" if Path(root).exists() else "nothing"
            raise ValueError(f"root must be a folder of videos, got {os.fspath(root)!r}: there is {found} of that name")
        names = find_videos(root, extensions)
        if not names:
            raise ValueError(
                f"root must hold videos, got {os.fspath(root)!r} without a file that ends in {', '.join(extensions)}; "
                "pass extensions=[...] for other endings"
            )
        self.root = os.path.abspath(root)
        self.frames, self.stride, self.size, self.resize, self.clip_step = frames, stride, size, resize, step
        self.on_error = on_error
        scan = scan_videos(root, names, cache=cache)
        span = (frames - 1) * stride + 1
        self.infos: dict[str, VideoInfo] = {path: info for path, info in scan.infos.items() if info.frames >= span}
        self.classes = sorted({_class_of(name) for name in names})
        self.skipped = _unusable(scan.infos, scan.skipped, span)
        self.clips: list[Clip] = []
        for path, info in self.infos.items():
            label = self.classes.index(_class_of(os.path.relpath(path, self.root)))
            self.clips += [Clip(path, start, label) for start in range(0, info.frames - span + 1, step)]
        self._failed: set[str] = set()
        if self.skipped and (on_error == "raise" or not self.clips):
            raise VideoError(_report(self.skipped, len(names), self.root))
        if self.skipped:
            rank_zero_warn(_report(self.skipped, len(names), self.root) + "\nThey are left out.", stacklevel=2)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> VideoItem:
        for place in self._stand_ins(index):
            clip = self.clips[place]
            if clip.path in self._failed:
                continue
            try:
                return self.read(place)
            except VideoError as error:
                if self.on_error == "raise":
                    raise
                self._failed.add(clip.path)
                message = f"{error}. It was sound when scanned; from now on other files stand in for it."
                warnings.warn(message, stacklevel=2)  # on every rank: each meets other files
        raise VideoError(self.root, "none of its videos can be read any more; is the disk still there?")

    def read(self, index: int) -> VideoItem:
        """Read a clip, and never another one in its stead.

        Args:
            index: Its place in `clips`.

        Returns:
            The clip.

        Raises:
            VideoError: It cannot be read any more.
        """
        clip = self.clips[index]
        pixels = read_clip(
            clip.path,
            start=clip.start,
            frames=self.frames,
            stride=self.stride,
            size=self.size,
            resize=self.resize,
            info=self.infos[clip.path],
        )
        return {"video": torch.from_numpy(pixels), "label": torch.tensor(clip.label), "index": index}

    def select(self, indices: Sequence[int]) -> VideoFolder:
        """Make a dataset of some of the clips; stand-ins for files that go bad come from these clips alone.

        Args:
            indices: Places in `clips`, in the order wanted.

        Returns:
            A `VideoFolder` with these clips, numbered anew, and the same classes.
        """
        chosen = copy.copy(self)
        chosen.clips = [self.clips[index] for index in indices]
        chosen._failed = set()
        return chosen

    def _stand_ins(self, index: int) -> Iterator[int]:
        """The clip itself, then those after it, round to the one before it."""
        count = len(self.clips)
        if not -count <= index < count:
            raise IndexError(f"index must lie below {count}, the number of clips, got {index}")
        yield from ((index + step) % count for step in range(count))


def _class_of(name: str) -> str:
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else "."


def _unusable(infos: dict[str, VideoInfo], skipped: list[tuple[str, str]], span: int) -> list[tuple[str, str]]:
    short = [
        (path, f"is too short: it holds {info.frames} frames, a clip spans {span}")
        for path, info in infos.items()
        if info.frames < span
    ]
    return sorted([*skipped, *short])


def _report(skipped: list[tuple[str, str]], total: int, root: str) -> str:
    lines = [f"  {os.path.relpath(path, root)}: {reason}" for path, reason in skipped]
    return "\n".join([f"{len(skipped)} of {total} videos in {root} cannot be used:", *lines])
