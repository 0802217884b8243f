# SPDX-License-Identifier: Apache-2.0
"""Reads captions of video files from JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Collection

from reco_lightning.data.index.text_lines import read_lines
from reco_lightning.support.argument_checks import check_path

__all__ = ["read_captions"]


def read_captions(path: str | os.PathLike[str], *, files: Collection[str]) -> dict[str, str]:
    r"""Reads the caption of each video file.

    Args:
        path: UTF-8 file of lines such as `{"file": "cats/a.mp4", "caption": "A cat."}`; other keys are left alone,
            empty lines passed over.
        files: Video files that there are, relative to their folder.

    Returns:
        Captions by file; files may be missing.

    Raises:
        ValueError: `path` is no file; or a line is no such object, names a file that is not there or one that has a
            caption already. The message names the line.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "captions.jsonl")
        ...     _ = path.write_text('{"file": "cats/a.mp4", "caption": "A cat."}\n')
        ...     read_captions(path, files=["cats/a.mp4", "dogs/b.mp4"])
        {'cats/a.mp4': 'A cat.'}
    """
    check_path(captions=path)
    if not os.path.isfile(path):
        raise ValueError(f"captions must be an existing file of JSON lines, got {os.fspath(path)!r} (no such file)")
    known, found = frozenset(files), {}
    for number, line in enumerate(read_lines(path, argument="captions"), start=1):
        if not line.strip():
            continue
        place = f"{os.fspath(path)}, line {number}"
        name, caption = _entry(line, place)
        if name not in known:
            example = min(known, default="a.mp4")
            raise ValueError(
                f"captions must name files relative to the folder of videos, as {example!r}, got {name!r}, which "
                f"is not there ({place})"
            )
        if name in found:
            raise ValueError(f"captions must be one per file, got a second one for {name!r} ({place})")
        found[name] = caption
    return found


def _entry(line: str, place: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        name, caption = entry["file"], entry["caption"]
    except (ValueError, KeyError, TypeError) as error:
        name, caption = None, repr(error)
    if not isinstance(name, str) or not isinstance(caption, str):
        raise ValueError(
            f'captions must be lines such as {{"file": "cats/a.mp4", "caption": "A cat."}}, got {line.strip()[:80]!r} '
            f"({place})"
        )
    return os.path.normpath(name), caption
