# SPDX-License-Identifier: Apache-2.0
"""`VideoFolder`: a dataset of clips cut from the videos of a data set."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypedDict, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from reco_lightning.data.index.clip_index import IndexedVideo
from reco_lightning.data.index.layouts import Layout, open_index
from reco_lightning.data.video.clip import OnDamage, Resize, VideoError, VideoInfo, fit_size, read_clip
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS, scan_videos
from reco_lightning.support.argument_checks import check_choice, check_flag, check_int

__all__ = ["Clip", "OnError", "VideoFolder", "VideoItem"]

OnError = Literal["skip", "raise"]


class Clip(NamedTuple):
    """The place of a clip in its file.

    Attributes:
        path: The video file, or the folder of its frames.
        start: Index of its first frame.
        label: Number of the file's class.
        caption: Its text; None where there is none.
    """

    path: str
    start: int
    label: int
    caption: str | None = None


class VideoItem(TypedDict):
    """One clip: `video` uint8 (T, H, W, 3), `label` int64 scalar, `index` its place in `VideoFolder.clips`."""

    video: Tensor
    label: Tensor
    index: int


class VideoFolder(Dataset[VideoItem]):
    """Clips of T frames from all videos below a folder, in sorted order; or from a data set in another layout.

    The first folder below `root` is the class of a file; files that lie in `root` itself form the class `"."`. Other
    layouts say in their own ways what the videos, classes and captions are: see `open_index`. There a video may also be
    a folder of frames, and its k-th clip has the k-th of its captions, after the last the first again.

    On creation every file is decoded once, as `probe` describes; files that are broken, cut off, damaged in the middle,
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
        on_damage: `skip` counts a video that is damaged anywhere as unusable; `keep` uses the clips in front of and
            behind the damage.
        extensions: Endings that count as video.
        cache: Remember the scan from one start to the next.
        layout: How the data set lies in `root`; see `open_index`, also for the next two.
        split: Part of the data set, as `train`.
        index: File that lists the videos, where the layout needs one.

    Attributes:
        classes: Names of the classes; the label is the place in this list. Those of class folders are
            sorted, and folders count whose files are all unusable too, so that labels do not depend on damage.
        groups: Videos that a split must not part, each with the name of its group; a video not in it is its own.
        clips: Every clip.
        skipped: Files left out, each with the reason.
        infos: What `probe` found in every file that is used.

    Raises:
        ValueError: If an argument is out of range, or `root` is no folder, holds no video or has another layout.
        VideoError: If no file can be used; with `on_error="raise"`, if any cannot.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> from reco_lightning.support.media import write_video
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cats/a.mp4", "dogs/b.mp4"):
        ...         _ = write_video(pathlib.Path(root, name), np.zeros((9, 48, 64, 3), np.uint8))
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
        on_damage: OnDamage = "skip",
        extensions: Sequence[str] = VIDEO_EXTENSIONS,
        cache: bool = True,
        layout: Layout = "folders",
        split: str | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        check_int(at_least=1, frames=frames, stride=stride)
        check_int(at_least=1, or_none=True, clip_step=clip_step)
        check_flag(cache=cache)
        step = frames * stride if clip_step is None else clip_step
        fit_size(1, 1, size=size, resize=resize)  # checks both
        check_choice(get_args(OnError), on_error=on_error)
        check_choice(get_args(OnDamage), on_damage=on_damage)
        listed = open_index(root, layout=layout, split=split, index=index, extensions=extensions)
        self.root = os.path.abspath(root)
        self.frames, self.stride, self.size, self.resize, self.clip_step = frames, stride, size, resize, step
        self.on_error = on_error
        names = list(dict.fromkeys(video.path for video in listed.videos))
        scan = scan_videos(root, names, cache=cache, on_damage=on_damage)
        span = (frames - 1) * stride + 1
        self.classes = list(listed.classes)
        self.groups = {self._path(name): group for name, group in listed.groups.items()}
        self.skipped = list(scan.skipped)
        self.clips: list[Clip] = []
        for video in listed.videos:
            path = self._path(video.path)
            if path not in scan.infos:
                continue
            starts, problem = _starts(video, scan.infos[path], span=span, step=step)
            if problem:
                self.skipped.append((path, problem))
            texts = video.captions or (None,)
            self.clips += [Clip(path, at, video.label, texts[k % len(texts)]) for k, at in enumerate(starts)]
        self.skipped.sort()
        used = {clip.path for clip in self.clips}
        self.infos: dict[str, VideoInfo] = {path: info for path, info in scan.infos.items() if path in used}
        self._failed: set[str] = set()
        if self.skipped and (on_error == "raise" or not self.clips):
            raise VideoError(_report(self.skipped, len(listed.videos), self.root))
        if self.skipped:
            rank_zero_warn(_report(self.skipped, len(listed.videos), self.root) + "\nThey are left out.", stacklevel=2)
        if damaged := [path for path, info in self.infos.items() if info.damage]:
            rank_zero_warn(self._report_damage(damaged), stacklevel=2)

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
        """Reads this clip, and never another one in its place.

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
        """Makes a dataset of some of the clips; stand-ins for files that go bad come from these clips alone.

        Args:
            indices: Places in `clips`, in the order wanted.

        Returns:
            A `VideoFolder` with these clips, numbered anew, and the same classes.
        """
        chosen = copy.copy(self)
        chosen.clips = [self.clips[index] for index in indices]
        chosen._failed = set()
        return chosen

    def _report_damage(self, damaged: list[str]) -> str:
        clips = Counter(clip.path for clip in self.clips)
        lines = [
            f"  {os.path.relpath(path, self.root)}: {self.infos[path].damage}; "
            f"{clips[path]} clip(s) of {len(self.infos[path].runs)} sound part(s)"
            for path in damaged
        ]
        head = (
            f"{len(damaged)} video(s) in {self.root} are damaged; the clips in front of and behind the damage are used:"
        )
        return "\n".join([head, *lines])

    def _path(self, name: str) -> str:
        return os.path.normpath(os.path.join(self.root, name))

    def _stand_ins(self, index: int) -> Iterator[int]:
        """The clip itself, then those after it, round to the one before it."""
        count = len(self.clips)
        if not -count <= index < count:
            raise IndexError(f"index must lie below {count}, the number of clips, got {index}")
        yield from ((index + step) % count for step in range(count))


def _starts(video: IndexedVideo, info: VideoInfo, *, span: int, step: int) -> tuple[list[int], str]:
    """First frames of the clips of a video, and why there are none."""
    first, stop, within = 0, info.frames, ""
    if video.start is not None or video.end is not None:
        if not info.fps:
            return [], "has no frame rate, so that start and end in seconds mean nothing"
        since, until = video.start or 0.0, math.inf if video.end is None else video.end
        first = math.ceil(since * info.fps - 1e-6)  # the first frame at or after that second
        stop = min(stop, math.ceil(min(until * info.fps, stop) - 1e-6))
        within = f" from second {since:g} to {'the end' if video.end is None else f'{until:g}'}"
    parts = [(max(first, begin), min(stop, end)) for begin, end in info.parts()]
    starts = [start for begin, end in parts for start in range(begin, end - span + 1, step)]
    if starts:
        return starts, ""
    longest = max(0, *(end - begin for begin, end in parts))
    damage = f" without damage ({info.damage})" if info.damage else ""
    return [], f"is too short: it holds {longest} frames{within}{damage}, a clip spans {span}"


def _report(skipped: list[tuple[str, str]], total: int, root: str) -> str:
    lines = [f"  {os.path.relpath(path, root)}: {reason}" for path, reason in skipped]
    return "\n".join([f"{len(skipped)} of {total} videos in {root} cannot be used:", *lines])
