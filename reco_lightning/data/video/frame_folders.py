# SPDX-License-Identifier: Apache-2.0
"""Finds folders of frames, also inside zip files, and the labels beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from reco_lightning.data.video.frames import FrameFolder, is_image, split_zip, zip_folders
from reco_lightning.data.video.scan import leads_back

__all__ = ["LABELS", "find_frame_folders", "folder_parts", "read_frame_labels", "walk"]

LABELS = "dataset.json"


def walk(root: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Goes through all folders that hold files, in sorted order, into zip files too; linked folders are followed.

    Args:
        root: A folder or a zip file.

    Yields:
        A folder relative to `root`, `.` for `root` itself, and the names of its files, sorted; nothing hidden.

    Raises:
        VideoError: A zip file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "a").mkdir()
        ...     Path(folder, "a", "1.png").touch()
        ...     list(walk(folder))
        [('a', ['1.png'])]
    """
    root = os.path.abspath(root)
    if split_zip(root)[0]:
        yield from _walk_zip(root)
        return
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith(".") and not leads_back(folder, name))
        shown = sorted(name for name in names if not name.startswith("."))
        place = os.path.relpath(folder, root)
        if shown:
            yield place, shown
        for name in shown:
            if name.lower().endswith(".zip"):
                for inside, files in _walk_zip(os.path.join(folder, name)):
                    yield os.path.normpath(os.path.join(place, name, inside)), files


def find_frame_folders(root: str | os.PathLike[str]) -> list[str]:
    """Lists the folders that hold pictures.

    Args:
        root: A folder or a zip file.

    Returns:
        Paths relative to `root`, such as `first` or `videos.zip/first`; sorted folder by folder, by code point.

    Raises:
        VideoError: A zip file cannot be read.
    """
    found = [Path(folder) for folder, names in walk(root) if any(map(is_image, names))]
    return [str(path) for path in sorted(found, key=lambda path: path.parts)]


def folder_parts(root: str | os.PathLike[str], name: str) -> tuple[str, ...]:
    """Splits a path as if zip files were unpacked: `cats.zip` is the folder `cats`, also where it holds one.

    Args:
        root: The folder or zip file.
        name: Relative to it.

    Example:
        >>> folder_parts("clips", "cats.zip/cats/first"), folder_parts("clips", "cats.zip/first")
        (('cats', 'first'), ('cats', 'first'))
        >>> folder_parts("clips.zip", "clips/cats/first")
        ('cats', 'first')
    """
    parts = [os.path.basename(os.path.abspath(root)), *Path(name).parts]
    found: list[str] = []
    for before, part in zip([".", *parts], parts, strict=False):
        if not (before.lower().endswith(".zip") and part == before[:-4]):
            found.append(part[:-4] if part.lower().endswith(".zip") else part)
    return tuple(found[1:])


def read_frame_labels(root: str | os.PathLike[str]) -> dict[str, int | str]:
    """Reads the labels that StyleGAN-V's `dataset.json` gives, in `root` itself or in zip files below.

    It is `{"labels": [["first/0001.png", 3], ...]}`, or a mapping; paths of frames or of their folders, relative to
    the folder that it lies in.

    Args:
        root: A folder or a zip file.

    Returns:
        Labels by folder of frames, relative to `root`; empty where there is none.

    Raises:
        ValueError: The file is no such thing, or gives the frames of one folder several labels.
    """
    found: dict[str, int | str] = {}
    for place, names in walk(root):
        folder = os.path.join(os.path.abspath(root), place)
        if LABELS not in names or not (place == "." or split_zip(folder)[0]):
            continue
        path = os.path.normpath(os.path.join(folder, LABELS))
        try:
            content = json.loads(FrameFolder(folder).read_file(LABELS))["labels"]
            labels = dict(content or {})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} must be {{"labels": [["first/0001.png", 3], ...]}}, got {error!r}') from error
        for key, label in labels.items():
            if not isinstance(label, (int, str)) or isinstance(label, bool):
                raise ValueError(f"{path} must give labels that are numbers or names, got {label!r} for {key!r}")
            name = os.path.dirname(key) if is_image(os.path.basename(key)) else key
            video = os.path.normpath(os.path.join(place, name))
            if found.setdefault(video, label) != label:
                raise ValueError(
                    f"{path} must give all frames of a video one label, got {found[video]!r} and {label!r} for {name!r}"
                )
    return found


def _walk_zip(path: str) -> Iterator[tuple[str, list[str]]]:
    archive, top = split_zip(path)
    for folder, names in sorted(zip_folders(archive).items()):
        parts = Path(folder).parts
        shown = sorted(name for name in names if not name.startswith("."))
        if parts[: len(Path(top).parts)] == Path(top).parts and shown and not any(map(_hidden, parts)):
            yield str(Path(folder).relative_to(top)), shown


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
