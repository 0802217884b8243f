# SPDX-License-Identifier: Apache-2.0
"""Indexes the videos of a data set with labels, captions and splits, without opening a video.

Between a data set on disk and `VideoFolder`, which cuts the videos into clips. `layouts.py` chooses the source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reco_lightning.data.index.errors import layout_error
from reco_lightning.data.index.text_lines import read_lines
from reco_lightning.data.video.frame_folders import LABELS, find_frame_folders, folder_parts, read_frame_labels
from reco_lightning.data.video.frames import is_frame_folder
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS, find_videos

__all__ = [
    "ClipIndex",
    "IndexedVideo",
    "class_places",
    "index_frame_folders",
    "index_list",
    "index_manifest",
    "index_video_folders",
    "refuse_missing",
    "relative_path",
]

_MOST_CLASSES = 1_000_000  # every number up to the highest is a class
_ENTRY = '{"path": "a.mp4", "label": "cats", "caption": "A cat.", "split": "train", "start": 0.0, "end": 4.5}'


class IndexedVideo(NamedTuple):
    """A video, or a part of one.

    Attributes:
        path: Relative to the root: a file, a folder of frames, or one in a zip file, as `frames.zip/first`.
        label: Place in `ClipIndex.classes`.
        captions: Texts; the k-th clip of the video gets the k-th, and after the last the first again.
        start: Second from which on it counts; None for the beginning.
        end: Second at which it ends, that frame left out; None for the end.
    """

    path: str
    label: int = 0
    captions: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class ClipIndex:
    """The contents of a data set: videos, classes and groups.

    Attributes:
        videos: In the order in which clips are counted.
        classes: Names of the classes; `(".",)` where there are no labels.
        groups: Videos by path that must not be parted by a split into training and validation, each with the name of
            its group; the others are a group each.
    """

    videos: tuple[IndexedVideo, ...]
    classes: tuple[str, ...] = (".",)
    groups: dict[str, str] = field(default_factory=dict)


def index_video_folders(
    root: str | os.PathLike[str], *, split: str | None = None, extensions: Sequence[str] = VIDEO_EXTENSIONS
) -> ClipIndex:
    """Lists videos in class folders (source 1): the first folder below the root is the class of a video file.

    Args:
        root: The folder; files that lie in it form the class `"."`.
        split: Folder below it whose videos are wanted; then the class is the folder below that. The classes are those
            of all such folders, so that labels are the same in all splits.
        extensions: Endings that count as video.

    Raises:
        ValueError: There are no such videos.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cats/a.mp4", "dogs/b.mp4"):
        ...         Path(root, name).parent.mkdir()
        ...         Path(root, name).touch()
        ...     index_video_folders(root)
        ClipIndex(videos=(IndexedVideo(path='cats/a.mp4', label=0, ...), IndexedVideo(path='dogs/b.mp4', label=1, ...)),
                  classes=('cats', 'dogs'), groups={})
    """
    names = find_videos(root, extensions)
    if not names:
        raise layout_error(
            "folders",
            root,
            f"root must hold videos, got {os.fspath(root)!r} without a file that ends in {', '.join(extensions)}; "
            "pass extensions=[...] for other endings",
        )
    return _by_folder(root, {name: Path(name).parts for name in names}, layout="folders", split=split)


def index_frame_folders(root: str | os.PathLike[str], *, split: str | None = None) -> ClipIndex:
    """Lists frame folders (source 2): a folder that holds pictures is a video; zip files count as folders.

    The class of a video is the first folder below the root (or `split`), unless that is the video itself; a zip file
    counts as a folder of its name. A `dataset.json`, as StyleGAN-V writes it, takes precedence: numbers are labels as
    they stand, names are sorted.

    Args:
        root: A folder or a zip file.
        split: Folder below it whose videos are wanted, as in `index_video_folders`.

    Raises:
        ValueError: There are no such videos, or `dataset.json` is wrong or leaves some of them out.
    """
    names = find_frame_folders(root)
    if not names:
        raise layout_error(
            "frames", root, f"root must hold folders of pictures, got {os.fspath(root)!r} without a picture in it"
        )
    index = _by_folder(root, {name: folder_parts(root, name) for name in names}, layout="frames", split=split)
    labels = read_frame_labels(root)
    if not labels:
        return index
    if unlabelled := [video.path for video in index.videos if video.path not in labels]:
        raise ValueError(f"{LABELS} in {os.fspath(root)} must give every video a label, got none for {unlabelled[0]!r}")
    classes, places = class_places(labels.values(), source=f"{LABELS} in {os.fspath(root)}")
    videos = (video._replace(label=places[labels[video.path]]) for video in index.videos)
    return ClipIndex(tuple(videos), classes)


def index_list(root: str | os.PathLike[str], index: str | os.PathLike[str]) -> ClipIndex:
    """Lists the videos of a list file (source 3): one path a line; the class of a video is the folder that it lies in.

    Args:
        root: The folder, or zip file, that the paths are relative to.
        index: The UTF-8 file; empty lines are passed over. Paths of video files or of folders of frames.

    Raises:
        ValueError: The list is empty, names a video twice, or names none that is there.
    """
    paths = [relative_path(line.strip(), root) for line in read_lines(index, argument="index") if line.strip()]
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"index must name every video once, got {path!r} twice in {os.fspath(index)}")
        seen.add(path)
    refuse_missing(paths, root, layout="list", index=index)
    names = [os.path.basename(os.path.dirname(path)) or "." for path in paths]
    classes, places = class_places(names, source=os.fspath(index))
    return ClipIndex(tuple(IndexedVideo(path, places[name]) for path, name in zip(paths, names, strict=True)), classes)


def index_manifest(
    root: str | os.PathLike[str], index: str | os.PathLike[str], *, split: str | None = None
) -> ClipIndex:
    r"""Lists the videos of a manifest (source 4): JSON lines `{"path", "label", "caption", "split", "start", "end"}`.

    All keys but `path` may be left out, and others are left alone. `label` is a name or a number, which counts from 0,
    on all lines or on none; the classes are those of the whole file, so that labels are the same in all splits.
    `caption` is a text or a list of texts. `start` and `end` are seconds; a video may have several lines, each for
    another part of it.

    Args:
        root: The folder, or zip file, that the paths are relative to.
        index: The UTF-8 file; empty lines are passed over.
        split: Take lines with this split only.

    Raises:
        ValueError: A line is no such object, or no line is left, or names a video that is there. The message names
            the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "a.mp4").touch()
        ...     manifest = Path(root, "manifest.jsonl")
        ...     _ = manifest.write_text('{"path": "a.mp4", "caption": "A cat."}\n')
        ...     index_manifest(root, manifest).videos[0].captions
        ('A cat.',)
    """
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(read_lines(index, argument="index"), start=1):
        if line.strip():
            entries.append(_entry(line, f"{os.fspath(index)}, line {number}"))
    labels = [entry["label"] for entry in entries if entry["label"] is not None]
    if labels and len(labels) < len(entries):
        raise ValueError(f"label must be on all lines of {os.fspath(index)} or on none, got it on {len(labels)}")
    if split is not None:
        splits = sorted({entry["split"] for entry in entries if entry["split"] is not None})
        entries = [entry for entry in entries if entry["split"] == split]
        if not entries:
            raise ValueError(f"split must be one of {splits}, which {os.fspath(index)} has, got {split!r}")
    refuse_missing([relative_path(entry["path"], root) for entry in entries], root, layout="manifest", index=index)
    classes, places = class_places(labels, source=os.fspath(index))
    videos = [
        IndexedVideo(
            relative_path(entry["path"], root),
            places[entry["label"]] if labels else 0,
            tuple(entry["caption"]),
            entry["start"],
            entry["end"],
        )
        for entry in entries
    ]
    return ClipIndex(tuple(videos), classes)


def refuse_missing(
    paths: Sequence[str], root: str | os.PathLike[str], *, layout: str, index: str | os.PathLike[str]
) -> None:
    """Checks that an index names videos that are there; it is enough that one is, the others are named after the scan.

    Args:
        paths: Relative to `root`.
        root: A folder or a zip file.
        layout: For the message.
        index: The file that names them.

    Raises:
        ValueError: There are no paths, or none of them is there.
    """
    if not paths:
        raise ValueError(f"index must name videos, got {os.fspath(index)!r} (it names none)")
    places = (os.path.join(root, path) for path in paths)
    if any(os.path.exists(place) or is_frame_folder(place) for place in places):
        return
    raise layout_error(
        layout,
        root,
        f"index must name videos relative to root, got {os.fspath(index)!r} with {paths[0]!r}, which is not in "
        f"{os.fspath(root)!r}, nor is any other",
    )


def class_places(labels: Iterable[int | str], *, source: str) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Returns the classes of labels: names are sorted, numbers stand for themselves.

    Args:
        labels: One for each video, all names or all numbers.
        source: Where they come from, for the message.

    Returns:
        Names of the classes, `(".",)` without labels; and the place of each label in them.

    Raises:
        ValueError: There are names and numbers, or a number below 0 or above a million.

    Example:
        >>> class_places(["dogs", "cats"], source="")
        (('cats', 'dogs'), {'cats': 0, 'dogs': 1})
        >>> class_places([2, 0], source="")
        (('0', '1', '2'), {0: 0, 2: 2})
    """
    found = set(labels)
    names = sorted(label for label in found if isinstance(label, str))
    numbers = sorted(label for label in found if not isinstance(label, str))
    if (names and numbers) or (numbers and numbers[0] < 0):
        wrong = f"{names[0]!r} and {numbers[0]}" if names else f"{numbers[0]}"
        raise ValueError(f"labels must be all names or all numbers from 0 in {source}, got {wrong}")
    if numbers and numbers[-1] >= _MOST_CLASSES:
        raise ValueError(f"labels must be below {_MOST_CLASSES} in {source}, got {numbers[-1]}; give names instead")
    if numbers:
        return tuple(map(str, range(numbers[-1] + 1))), {number: number for number in numbers}
    return tuple(names) or (".",), {name: place for place, name in enumerate(names)}


def relative_path(path: str, root: str | os.PathLike[str]) -> str:
    """Returns a path from an index, in one spelling and relative to the root.

    Args:
        path: Relative to the root, or absolute.
        root: The folder or zip file.

    Example:
        >>> relative_path("./cats//a.mp4", "videos"), relative_path("/videos/a.mp4", "/videos")
        ('cats/a.mp4', 'a.mp4')
    """
    return os.path.relpath(path, os.path.abspath(root)) if os.path.isabs(path) else os.path.normpath(path)


def _by_folder(
    root: str | os.PathLike[str], parts: dict[str, tuple[str, ...]], *, layout: str, split: str | None
) -> ClipIndex:
    """Classes from the folders that videos lie in; `parts` are the components of each path."""
    wanted = list(parts)
    if split is not None:
        wanted = [name for name in wanted if len(parts[name]) > 1 and parts[name][0] == split]
        parts = {name: folders for name, folders in parts.items() if len(folders) > 1}
        if not wanted:
            tops = sorted({folders[0] for folders in parts.values()})
            raise layout_error(layout, root, f"split must be a folder below root, one of {tops}, got {split!r}")
        parts = {name: folders[1:] for name, folders in parts.items()}
    class_of = {name: folders[0] if len(folders) > 1 else "." for name, folders in parts.items()}
    classes = sorted(set(class_of.values()))
    places = {name: place for place, name in enumerate(classes)}
    return ClipIndex(tuple(IndexedVideo(name, places[class_of[name]]) for name in wanted), tuple(classes))


def _entry(line: str, place: str) -> dict[str, Any]:
    """A line of a manifest with all keys; `caption` as a list."""
    try:
        found = json.loads(line)
        entry = {key: found.get(key) for key in ("path", "label", "caption", "split", "start", "end")}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"index must hold lines such as {_ENTRY}, got {line.strip()[:80]!r} ({place})") from error
    texts = entry["caption"]
    entry["caption"] = [] if texts is None else [texts] if isinstance(texts, str) else texts
    begin, end = 0.0 if entry["start"] is None else entry["start"], entry["end"]
    sound = {
        "path": isinstance(entry["path"], str) and entry["path"] != "",
        "label": entry["label"] is None or _is_number(entry["label"], int) or isinstance(entry["label"], str),
        "caption": isinstance(entry["caption"], list) and all(isinstance(text, str) for text in entry["caption"]),
        "split": entry["split"] is None or isinstance(entry["split"], str),
        "start": _is_number(begin) and 0 <= begin < float("inf"),
        "end": end is None or (_is_number(end) and _is_number(begin) and end > begin),
    }
    for key, fine in sound.items():
        if not fine:
            raise ValueError(f"index must hold lines such as {_ENTRY}, got {found.get(key)!r} for {key!r} ({place})")
    return entry


def _is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
