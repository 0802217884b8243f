# SPDX-License-Identifier: Apache-2.0
"""Prepares the demo's output folder and removes an earlier demo's files."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["prepare_output"]

_MARK = ".reco-demo"


def prepare_output(output: str, *, videos: str | None = None) -> Path:
    """Makes the output folder, without what an earlier demo left in it.

    Args:
        output: The folder. It may be missing, empty, or hold an earlier demo; of that, only what the demo itself wrote
            is removed.
        videos: The user's videos, which may not lie in it.

    Returns:
        The folder.

    Raises:
        ValueError: It holds files of somebody else, or the videos.
    """
    folder = Path(output)
    work = folder / "work"
    if videos is not None and folder.resolve() in (Path(videos).resolve(), *Path(videos).resolve().parents):
        raise ValueError(f"output must not be a folder that the videos lie in, got {output!r} with videos {videos!r}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {output!r}")
    if folder.is_dir() and any(folder.iterdir()):
        if not (work / _MARK).is_file() or work.is_symlink():
            raise ValueError(
                f"output must be new, empty, or hold an earlier demo, got {output!r} with other files; choose another "
                "folder"
            )
        shutil.rmtree(work)
        for name in ("index.html", "results.json", "results.md"):
            (folder / name).unlink(missing_ok=True)
        for pattern in ("figures/*.svg", "figures/*.png", "videos/*.mp4"):
            for path in folder.glob(pattern):
                path.unlink()
    work.mkdir(parents=True)
    (work / _MARK).write_text("Made by `reco demo`, which removes this folder when it runs again.\n")
    return folder
