# SPDX-License-Identifier: Apache-2.0
"""Explains why a folder does not have the layout that was asked for, and guesses which one it has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reco_lightning.data.video.decoders import VideoError
from reco_lightning.data.video.frame_folders import find_frame_folders, walk
from reco_lightning.data.video.frames import split_zip
from reco_lightning.data.video.scan import find_videos

__all__ = ["EXPECTED", "layout_error", "likely_layout"]

_SHOWN, _SHOWN_IN_A_FOLDER = 8, 2  # lines

# a miniature of what each layout takes, below the root
EXPECTED = {
    "folders": ("cats/a.mp4", "dogs/b.mp4", "or with split='train': train/cats/a.mp4"),
    "frames": (
        "first/0001.png",
        "first/0002.png",
        "or cats/first/0001.png, or with split='train': train/cats/first/0001.png, or any of these in a .zip",
    ),
    "list": ("cats/a.mp4", "index: a file with a line cats/a.mp4"),
    "manifest": ("a.mp4", 'index: a file with a line {"path": "a.mp4", "caption": "A cat."}'),
    "ffs": ("train/videos/a.mp4", "or train/a.mp4, or frames: a/0001.jpg, also below train, also in a .zip"),
    "sky": ("sky_train/a/a_1/a_frames_00000001.jpg", "sky_test/b/b_1/b_frames_00000001.jpg"),
    "taichi": ("frames/train/a/0001.png", "frames/test/b/0001.png"),
    "ucf101": (
        "Archery/v_Archery_g08_c01.avi",
        "or without index: train/Archery/v_Archery_g08_c01.avi, test/...",
        "index: trainlist01.txt or testlist01.txt, with classInd.txt beside it",
    ),
    "msrvtt": (
        "TrainValVideo/video0.mp4",
        "index: a JSON file of videos and sentences such as MSRVTT_data.json, or a CSV file of video_id beside it",
    ),
}


def layout_error(layout: str, root: str | os.PathLike[str], problem: str, *, guess: bool = True) -> ValueError:
    """Builds the error for a data set that lies in another way.

    Args:
        layout: What was asked for, a key of `EXPECTED`.
        root: Where; a folder, a zip file or nothing.
        problem: What is wrong, naming the argument.
        guess: Name the layout that it looks like, if that is another one.

    Returns:
        To be raised.

    Example:
        >>> print(layout_error("sky", "/nowhere", "root must hold folders of frames"))
        root must hold folders of frames
        layout='sky' expects below root:
          sky_train/a/a_1/a_frames_00000001.jpg
          sky_test/b/b_1/b_frames_00000001.jpg
        found in /nowhere:
          nothing
    """
    try:
        likely, found = likely_layout(root) if guess else None, _found(root)
    except VideoError as error:  # a zip file that cannot be read is part of what was found
        likely, found = None, [str(error)]
    lines = [
        problem,
        f"layout={layout!r} expects below root:",
        *(f"  {line}" for line in EXPECTED[layout]),
        f"found in {os.fspath(root)}:",
        *(f"  {line}" for line in found or ["nothing"]),
        *([f"It looks like layout={likely!r}."] if likely not in (None, layout) else []),
    ]
    return ValueError("\n".join(lines))


def likely_layout(root: str | os.PathLike[str]) -> str | None:
    """Guesses the layout of what is there from the names alone.

    Args:
        root: A folder or a zip file.

    Returns:
        A layout; None where there are neither videos nor pictures, or both.

    Example:
        >>> likely_layout("/nowhere") is None
        True
    """
    frames, videos = [Path(name) for name in find_frame_folders(root)], [Path(name) for name in find_videos(root)]
    if videos and not frames:
        if all(re.fullmatch(r"v_.+_g\d+_c\d+", video.stem) for video in videos):
            return "ucf101"
        return "msrvtt" if all(re.fullmatch(r"video\d+", video.stem) for video in videos) else "folders"
    if frames and not videos:
        tops = {folder.parts[:1] for folder in frames}
        if tops <= {("sky_train",), ("sky_test",)}:
            return "sky"
        return "taichi" if tops == {("frames",)} else "frames"
    return None


def _found(root: str | os.PathLike[str]) -> list[str]:
    if not (os.path.isdir(root) or split_zip(os.path.abspath(root))[0]):
        return []
    lines: list[str] = []
    for folder, names in walk(root):
        lines += [os.path.normpath(os.path.join(folder, name)) for name in names[:_SHOWN_IN_A_FOLDER]]
        if len(names) > _SHOWN_IN_A_FOLDER:
            lines[-1] += f" and {len(names) - _SHOWN_IN_A_FOLDER} more"
        if len(lines) > _SHOWN:
            return [*lines[:_SHOWN], "..."]
    return lines
