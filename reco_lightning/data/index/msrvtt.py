# SPDX-License-Identifier: Apache-2.0
"""Indexes MSR-VTT from its annotation JSON or from the CSV files of the 1K-A split."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reco_lightning.data.index.clip_index import ClipIndex, IndexedVideo, refuse_missing
from reco_lightning.data.index.text_lines import read_lines
from reco_lightning.data.video.scan import VIDEO_EXTENSIONS, find_videos

__all__ = ["index_msrvtt"]

_BESIDE = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")


def index_msrvtt(
    root: str | os.PathLike[str],
    index: str | os.PathLike[str],
    *,
    split: str | None = None,
    extensions: Sequence[str] = VIDEO_EXTENSIONS,
) -> ClipIndex:
    """Lists the videos of MSR-VTT with their captions.

    The files are the clips that the data set is about: the times in the JSON file are those of the film that each was
    cut from, and do not count here.

    Args:
        root: Folder of `video0.mp4` and so on, in whatever folders below it.
        index: JSON file `{"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}`; or a CSV file
            with a column `video_id`, and `sentence` or else the JSON file beside it.
        split: `train`, `validate` or `test` of the JSON file; a CSV file is a split of its own.
        extensions: Endings that count as video.

    Raises:
        ValueError: The index is no such file, or none of its videos, or one of them twice, is below `root`.
    """
    captions: dict[str, list[str]] = {}
    if os.fspath(index).lower().endswith(".csv"):
        if split is not None:
            raise ValueError(f"split must be left out with a CSV file, which is a split of its own, got {split!r}")
        ids = _from_csv(index, captions)
    else:
        videos = _from_json(index, captions)
        splits = sorted({str(video.get("split")) for video in videos})
        if split is not None and split not in splits:
            raise ValueError(f"split must be one of {splits}, which {os.fspath(index)} has, got {split!r}")
        ids = [video["video_id"] for video in videos if split in (None, video.get("split"))]
    files: dict[str, str] = {}
    for name in find_videos(root, extensions):
        video = Path(name).stem
        if files.setdefault(video, name) != name:
            raise ValueError(
                f"root must hold every video once, got {files[video]} and {name} in {os.fspath(root)}; point it to the "
                "folder of one of them"
            )
    ids = list(dict.fromkeys(ids))
    paths = [files.get(video, f"{video}.mp4") for video in ids]  # what is missing is named after the scan
    refuse_missing(paths, root, layout="msrvtt", index=index)
    texts = (tuple(captions.get(video, ())) for video in ids)
    return ClipIndex(tuple(IndexedVideo(path, 0, text) for path, text in zip(paths, texts, strict=True)))


def _from_json(path: str | os.PathLike[str], captions: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Videos of a JSON file; its sentences are added to `captions`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        videos = [video for video in content["videos"] if video["video_id"]]
        for sentence in content["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(str(sentence["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'index must be JSON {{"videos": [{{"video_id", "split"}}], "sentences": [{{"video_id", "caption"}}]}}, or '
            f"a CSV file, got {os.fspath(path)!r}: {error!r}"
        ) from error
    return videos


def _from_csv(path: str | os.PathLike[str], captions: dict[str, list[str]]) -> list[str]:
    """Videos of a CSV file; its sentences, or those of the JSON files beside it, are added to `captions`."""
    try:
        rows = list(csv.DictReader(f"{line}\n" for line in read_lines(path, argument="index")))
    except csv.Error as error:  # a quote that is never closed; in Python 3.10 a NUL
        raise ValueError(f"index must be a CSV file, got {os.fspath(path)!r}: {error}") from error
    if not rows or "video_id" not in rows[0]:
        columns = list(rows[0]) if rows else "no line"
        raise ValueError(f"index must have a column video_id, got {columns} in {os.fspath(path)}")
    if "sentence" in rows[0]:
        for row in rows:
            captions.setdefault(row["video_id"], []).append(row["sentence"])
    else:
        beside = [found for name in _BESIDE if (found := Path(path).parent / name).is_file()]
        if not beside:
            raise ValueError(
                f"index must have a column sentence, or one of {', '.join(_BESIDE)} beside it, got "
                f"{os.fspath(path)!r} with {list(rows[0])}"
            )
        for annotations in beside[:1] if beside[0].name == _BESIDE[0] else beside:  # the first holds all of the others
            _from_json(annotations, captions)
    return [row["video_id"] for row in rows]
