# SPDX-License-Identifier: Apache-2.0
"""Names the layouts of data sets and opens an index for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from reco_lightning.data.index.clip_index import (
    ClipIndex,
    IndexedVideo,
    index_frame_folders,
    index_list,
    index_manifest,
    index_video_folders,
)
from reco_lightning.data.index.errors import layout_error
from reco_lightning.data.index.msrvtt import index_msrvtt
from reco_lightning.data.index.ucf101 import index_ucf101
from reco_lightning.data.video.frame_folders import find_frame_folders, folder_parts
from reco_lightning.data.video.frames import FrameFolder, frame_order, split_zip
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS, find_videos
from reco_lightning.support.argument_checks import check_choice, check_path

__all__ = ["Layout", "check_names", "index_one_class", "open_index"]

Layout = Literal["folders", "frames", "list", "manifest", "ffs", "sky", "taichi", "ucf101", "msrvtt"]

_NEED_INDEX = ("list", "manifest", "msrvtt")
_TAKE_INDEX = (*_NEED_INDEX, "ucf101")
_TAKE_ZIP = ("frames", "list", "manifest", "ffs", "sky", "taichi")
_USUAL = ("train", "val", "test")  # splits to look for where none or another one was asked for
# where a split lies, the first that is there; and where videos lie without one
_SPLITS = {"ffs": ("{}/videos", "{}"), "sky": ("sky_{}", "{}"), "taichi": ("frames/{}", "{}")}
_WHOLE = {"ffs": ("videos", "."), "sky": (".",), "taichi": ("frames", ".")}


def check_names(split: str | None, extensions: Sequence[str]) -> None:
    """Raises unless the split is a name and the extensions are endings.

    Args:
        split: A name, or None.
        extensions: Endings, each with its dot.

    Raises:
        ValueError: One is something else.

    Example:
        >>> check_names("train", [".mp4"])
        >>> check_names(None, ["mp4"])
        Traceback (most recent call last):
        ValueError: extensions must be a list of endings such as ['.mp4', '.mkv'], got ['mp4']
    """
    if split is not None and not isinstance(split, str):
        raise ValueError(f"split must be a name or None, got {split!r}")
    listed = isinstance(extensions, Sequence) and not isinstance(extensions, str)
    if not listed or not all(isinstance(ending, str) and ending.startswith(".") for ending in extensions):
        raise ValueError(f"extensions must be a list of endings such as ['.mp4', '.mkv'], got {extensions!r}")


def open_index(
    root: str | os.PathLike[str],
    *,
    layout: Layout = "folders",
    split: str | None = None,
    index: str | os.PathLike[str] | None = None,
    extensions: Sequence[str] = VIDEO_EXTENSIONS,
) -> ClipIndex:
    """Lists the videos of a data set; none is opened yet.

    Args:
        root: The folder; or a zip file of frames.
        layout: How it lies there. Generic: `folders` of videos by class, `frames` (a folder of pictures for each
            video, also in a zip file), a `list` of paths, a `manifest` of JSON lines. Data sets: `ffs`
            (FaceForensics), `sky` (SkyTimelapse), `taichi` (Taichi-HD), `ucf101`, `msrvtt`.
        split: Part of the data set, as `train`; None takes all. A folder, or what the index says; none for a `list`.
        index: The list, the manifest, UCF101's list or MSR-VTT's annotations.
        extensions: Endings that count as video.

    Returns:
        The videos with what is known of them.

    Raises:
        ValueError: An argument is out of range; or the data set lies in another way: then the message shows what was
            expected, what was found, and which layout it looks like.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "sky_train", "a").mkdir(parents=True)
        ...     Path(root, "sky_train", "a", "a_1.jpg").touch()
        ...     open_index(root, layout="sky", split="train").videos[0].path
        'sky_train/a'
    """
    check_path(root=root)
    check_path(index=index, or_none=True)
    check_names(split, extensions)
    check_choice(get_args(Layout), layout=layout)
    archive = bool(split_zip(os.path.abspath(root))[0])
    if not os.path.isdir(root) and not (archive and layout in _TAKE_ZIP):
        found = "a file" if os.path.exists(root) else "nothing"
        problem = f"root must be a folder of videos, got {os.fspath(root)!r}: there is {found} of that name"
        raise layout_error(layout, root, problem) if archive else ValueError(problem)
    if index is None and layout in _NEED_INDEX:
        raise layout_error(layout, root, f"index must be given for layout={layout!r}, got None")
    if index is not None and layout not in _TAKE_INDEX:
        raise ValueError(f"index must be left out for layout={layout!r}, got {os.fspath(index)!r}")
    if index is not None and not os.path.isfile(index):
        raise ValueError(f"index must be an existing file, got {os.fspath(index)!r} (no such file)")
    if split is not None and layout == "list":
        raise ValueError(f"split must be left out for layout='list', whose index is the split, got {split!r}")
    if layout == "folders":
        return index_video_folders(root, split=split, extensions=extensions)
    if layout == "frames":
        return index_frame_folders(root, split=split)
    if layout == "ucf101":
        return index_ucf101(root, index, split=split, extensions=extensions)
    if index is None:
        return index_one_class(root, layout=layout, split=split, extensions=extensions)
    if layout == "list":
        return index_list(root, index)
    if layout == "manifest":
        return index_manifest(root, index, split=split)
    return index_msrvtt(root, index, split=split, extensions=extensions)


def index_one_class(
    root: str | os.PathLike[str], *, layout: str, split: str | None = None, extensions: Sequence[str] = VIDEO_EXTENSIONS
) -> ClipIndex:
    """Lists the videos of FaceForensics, SkyTimelapse or Taichi-HD: one class.

    FaceForensics may be video files or folders of frames, the others are folders of frames. Those of SkyTimelapse lie
    at any depth, the others side by side.

    Args:
        root: The folder; or a zip file of frames.
        layout: `ffs`, `sky` or `taichi`; says in which folder a split lies.
        split: `train` and so on; None for a root in which the videos themselves lie.
        extensions: Endings that count as video.

    Raises:
        ValueError: There are no such videos, or both kinds.
    """
    names = {
        "videos": find_videos(root, extensions) if layout == "ffs" else [],
        "frames": find_frame_folders(root),
    }
    found = _first_place(root, names, layout, split)
    videos = found["videos"] or found["frames"]
    if not videos:
        kind = "videos or folders of frames" if layout == "ffs" else "folders of frames"
        given = f"split={split!r}" if split else "no split"
        others = [other for other in (*_USUAL, None) if any(_first_place(root, names, layout, other).values())]
        remedy = f"; pass split={others[0]!r}" if others else ""
        problem = f"root must hold {kind}, got {os.fspath(root)!r} and {given}, where none lie{remedy}"
        raise layout_error(layout, root, problem, guess=not others)
    if found["videos"] and found["frames"]:
        both = f"{found['videos'][0]} and {found['frames'][0]}"
        raise layout_error(layout, root, f"root must hold videos or frames, got both, as {both}", guess=False)
    if layout == "sky":
        first = FrameFolder(os.path.join(root, videos[0])).names[0]
        if frame_order(first)[0] < 0:
            problem = f"root must hold frames named as a_frames_00000001.jpg, got {first} in {videos[0]}"
            raise layout_error(layout, root, problem)
    return ClipIndex(tuple(map(IndexedVideo, videos)))


def _first_place(
    root: str | os.PathLike[str], names: dict[str, list[str]], layout: str, split: str | None
) -> dict[str, list[str]]:
    """The names in the first of the folders where a split may lie; empty lists where there are none in any."""
    found: dict[str, list[str]] = {kind: [] for kind in names}
    for place in _WHOLE[layout] if split is None else [pattern.format(split) for pattern in _SPLITS[layout]]:
        found = {kind: [name for name in part if _lies_in(root, name, place, layout)] for kind, part in names.items()}
        if any(found.values()):
            break
    return found


def _lies_in(root: str | os.PathLike[str], name: str, place: str, layout: str) -> bool:
    parts, above = folder_parts(root, name), Path(place).parts
    deep_enough = len(parts) > len(above) if layout == "sky" else len(parts) == len(above) + 1
    return deep_enough and parts[: len(above)] == above
