# SPDX-License-Identifier: Apache-2.0
"""Indexes UCF101 with the labels of `classInd.txt`, the official splits and the groups of one recording."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from reco_lightning.data.index.clip_index import ClipIndex, IndexedVideo, refuse_missing, relative_path
from reco_lightning.data.index.errors import layout_error
from reco_lightning.data.index.text_lines import read_lines
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS, find_videos

__all__ = ["group_of", "index_ucf101", "read_classes"]

_CLASSES = "classInd.txt"
_NAME = re.compile(r"v_(?P<class>.+)_(?P<group>g\d+)_c\d+")


def index_ucf101(
    root: str | os.PathLike[str],
    index: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    extensions: Sequence[str] = VIDEO_EXTENSIONS,
) -> ClipIndex:
    """Lists the videos of UCF101 with the official labels, from 0.

    Videos whose names share their `gXX` are one group, so that a validation part is drawn by group, as the official
    lists are, and never holds a recording that is trained on.

    Args:
        root: The folder that holds the class folders; or, without `index`, the videos themselves, or `train` and
            `test` with class folders.
        index: `trainlist01.txt`, `testlist01.txt` or the like. Labels in it count from 1 and are checked.
        split: With `index`, what the list's name has to begin with, as a check; without, the folder of that name.
        extensions: Endings that count as video.

    Raises:
        ValueError: The videos do not lie so, or the list contradicts `classInd.txt`, which is sought beside it and in
            `root`; without it the classes are the folders in alphabetical order, as in the official file.
    """
    names = find_videos(root, extensions)
    if strange := [name for name in names if not _NAME.fullmatch(Path(name).stem)] if names else ["no video"]:
        raise layout_error(
            "ucf101", root, f"root must hold videos named as v_Archery_g08_c01.avi, got {strange[0]} in it"
        )
    beside = [os.path.dirname(index)] if index else []
    files = [path for folder in (*beside, root) if os.path.isfile(path := os.path.join(folder, _CLASSES))]
    classes = read_classes(files[0]) if files else tuple(sorted({_class_of(name) for name in names}, key=str.casefold))
    places = {name.casefold(): place for place, name in enumerate(classes)}  # v_HandStandPushups in HandstandPushups
    if index:
        here = {os.path.splitext(name)[0]: name for name in names}  # .avi in the lists, perhaps .mp4 on disk
        listed = _listed(root, index, classes, places, split)
        names = [here.get(os.path.splitext(name)[0], name) for name in listed]
        refuse_missing(names, root, layout="ucf101", index=index)
    elif split:
        names = [name for name in names if Path(name).parts[0] == split]
        if not names:
            raise layout_error(
                "ucf101",
                root,
                f"split must be a folder below root, or index a list such as {split}list01.txt, got {split!r} and none",
            )
    if unknown := [name for name in names if _class_of(name).casefold() not in places]:
        raise ValueError(
            f"{files[0] if files else root} must hold the classes of all videos, got none for {unknown[0]}"
        )
    return ClipIndex(
        tuple(IndexedVideo(name, places[_class_of(name).casefold()]) for name in names),
        classes,
        {name: group_of(name) for name in names},
    )


def group_of(path: str) -> str:
    """Returns the group of a video, `g01` to `g25`; all classes have all groups, so that holding some out empties none.

    Args:
        path: Of any spelling; one that is not named as UCF101's videos is a group of its own.

    Example:
        >>> group_of("Archery/v_Archery_g08_c01.avi"), group_of("own.mp4")
        ('g08', 'own.mp4')
    """
    found = _NAME.fullmatch(Path(path).stem)
    return found["group"] if found else path


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads `classInd.txt`: lines `1 ApplyEyeMakeup`, numbered from 1.

    Args:
        path: The file.

    Returns:
        Names of the classes in the order of their numbers.

    Raises:
        ValueError: A line is no such pair, or numbers are missing.
    """
    lines = [line.split() for line in read_lines(path, argument=_CLASSES) if line.strip()]
    numbered = sorted((int(line[0]), line[1]) for line in lines if len(line) == 2 and line[0].isdecimal())
    if [number for number, _ in numbered] != list(range(1, len(lines) + 1)):
        raise ValueError(f"{os.fspath(path)} must hold lines such as '1 ApplyEyeMakeup', numbered from 1 without a gap")
    return tuple(name for _, name in numbered)


def _listed(
    root: str | os.PathLike[str],
    index: str | os.PathLike[str],
    classes: Sequence[str],
    places: dict[str, int],
    split: str | None,
) -> list[str]:
    if split and not os.path.basename(index).startswith(split):
        raise ValueError(
            f"split must fit index, whose name is to begin with it, got {split!r} and {os.fspath(index)!r}"
        )
    names: list[str] = []
    for number, line in enumerate(read_lines(index, argument="index"), start=1):
        name, _, label = line.strip().partition(" ")
        if not name:
            continue
        names.append(relative_path(name, root))
        if label and label.strip() != str(places.get(_class_of(name).casefold(), -1) + 1):
            raise ValueError(
                f"index must number the classes from 1 as {_CLASSES} does ({classes[0]} is 1), got {line.strip()!r} "
                f"({os.fspath(index)}, line {number}); put the {_CLASSES} that belongs to the list beside it"
            )
    if strange := [name for name in names if not _NAME.fullmatch(Path(name).stem)]:
        raise ValueError(f"index must name videos as v_Archery_g08_c01.avi, got {strange[0]!r} in {os.fspath(index)}")
    return names


def _class_of(name: str) -> str:
    found = _NAME.fullmatch(Path(name).stem)
    folder = os.path.basename(os.path.dirname(name))
    return folder if found is None or folder.casefold() == found["class"].casefold() else found["class"]
