# SPDX-License-Identifier: Apache-2.0
"""Finds the videos below a folder and probes each one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from tqdm.auto import tqdm

from reco_lightning.data.video.clip import OnDamage, VideoError, VideoInfo, open_source, probe
from reco_lightning.data.video.frame_prints import PRINT_BYTES, FrameTable

__all__ = ["VIDEO_EXTENSIONS", "Scan", "cache_file", "find_videos", "leads_back", "scan_videos"]

VIDEO_EXTENSIONS = (
    ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"
)  # fmt: skip
_CACHE_VERSION = 2  # raise when the meaning of an entry changes
_THREADS = 8  # both decoders release the interpreter lock; more threads only fight for memory


class _Entry(NamedTuple):
    """What is remembered of a sound file: its stamp and what `probe` found."""

    stamp: list[int]
    info: VideoInfo


class Scan(NamedTuple):
    """The findings of a scan.

    Attributes:
        infos: Sound files in the order they were given, with what `probe` says of each.
        skipped: Files that cannot be used, each with the reason.
    """

    infos: dict[str, VideoInfo]
    skipped: list[tuple[str, str]]


def find_videos(root: str | os.PathLike[str], extensions: Sequence[str] = VIDEO_EXTENSIONS) -> list[str]:
    """Lists the videos below a folder, in an order that depends on nothing but their names.

    Linked folders are followed, hidden files and folders (`.name`) passed over.

    Args:
        root: The folder.
        extensions: Endings that count as video, with the dot, in any case.

    Returns:
        Paths relative to `root`, sorted folder by folder, by code point.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.mp4", "a.MKV", "notes.txt", "._b.mp4"):
        ...         Path(folder, name).touch()
        ...     find_videos(folder)
        ['a.MKV', 'b.mp4']
    """
    endings = tuple(ending.lower() for ending in extensions)
    found: list[Path] = []
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not leads_back(folder, name)]
        chosen = (name for name in names if not name.startswith(".") and name.lower().endswith(endings))
        found.extend(Path(folder, name).relative_to(root) for name in chosen)
    return [str(path) for path in sorted(found, key=lambda path: path.parts)]


def leads_back(folder: str, name: str) -> bool:
    """Returns whether a linked folder is one of its own parents, so that walking into it would never end.

    Args:
        folder: Where it lies.
        name: Its name.
    """
    here, target = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
    return here == target or here.startswith(target.rstrip(os.sep) + os.sep)


def scan_videos(
    root: str | os.PathLike[str], names: Sequence[str], *, cache: bool = True, on_damage: OnDamage = "skip"
) -> Scan:
    """Probes files, several at a time, remembering the sound ones until they change.

    Args:
        root: The folder.
        names: Paths relative to `root`; of files, or of folders of frames.
        cache: Take unchanged files (same size and time of change) from the last scan of this folder, and keep this
            one for the next in `cache_file(root)`. Broken files are probed again every time.
        on_damage: `keep` takes the sound parts of damaged videos too.

    Returns:
        Sound files and broken ones, in the order of `names`.

    Example:
        >>> scan_videos("/nowhere", ["a.mp4"], cache=False).skipped
        [('/nowhere/a.mp4', 'is not a file')]
    """
    paths = [os.path.normpath(os.path.join(os.path.abspath(root), name)) for name in names]
    known = _load(cache_file(root)) if cache else {}
    findings: dict[str, VideoInfo | str] = {}
    for name, path in zip(names, paths, strict=True):
        entry = known.get(name)
        if entry is not None and entry.stamp == _stamp(path):
            findings[path] = entry.info if on_damage == "keep" else entry.info.damage or entry.info
    fresh = [path for path in paths if path not in findings]
    stamps = {path: _stamp(path) for path in fresh}  # taken before the probe: a file that grows meanwhile is not kept
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        outcomes = pool.map(partial(_outcome, on_damage=on_damage), fresh)
        bar = tqdm(outcomes, "checking videos", len(fresh), leave=False, unit="file", delay=5)
        findings.update(zip(fresh, bar, strict=True))
    scan = Scan({}, [])
    for name, path in zip(names, paths, strict=True):
        found = findings[path]
        if isinstance(found, str):
            scan.skipped.append((path, found))
        else:
            scan.infos[path] = found
            if path in stamps:
                known[name] = _Entry(stamps[path], found)
    if cache and any(path in scan.infos for path in fresh):
        _save(cache_file(root), known)
    return scan


def cache_file(root: str | os.PathLike[str]) -> Path:
    """Returns where the last scan of a folder is kept: below `$XDG_CACHE_HOME`, by default `~/.cache`.

    Args:
        root: The folder; links and relative paths lead to the same file.

    Returns:
        A file of arrays for NumPy; deleting it costs nothing but the next scan's time.

    Example:
        >>> cache_file("clips").parts[-3:-1]
        ('reco_lightning', 'videos')
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:20]
    return Path(home, "reco_lightning", "videos", f"{digest}.npz")


def _outcome(path: str, *, on_damage: OnDamage) -> VideoInfo | str:
    try:
        return probe(path, on_damage=on_damage)
    except VideoError as error:
        return error.reason


def _stamp(path: str) -> list[int]:
    try:
        return open_source(path).stamp()
    except (OSError, VideoError):
        return []


def _makers() -> str:
    """Versions that a finding depends on: another decord may read other files rightly."""
    found = []
    for package in ("av", "decord", "decord2"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join([f"scan {_CACHE_VERSION}", *found])


def _load(path: Path) -> dict[str, _Entry]:
    try:
        with np.load(path) as arrays:
            content = json.loads(arrays["content"].tobytes())
            prints, times = arrays["prints"], arrays["times"]
        if content["made_by"] != _makers():
            return {}
        entries, frame, time = {}, 0, 0
        for name, (stamp, values, runs, frames, stamps) in content["files"].items():
            table = FrameTable(prints[frame : frame + frames], times[time : time + stamps]) if frames else None
            frame, time = frame + frames, time + stamps
            parts = tuple((first, stop) for first, stop in runs)
            entries[name] = _Entry(stamp, VideoInfo(*values)._replace(table=table, runs=parts))
        return entries
    except (OSError, ValueError, KeyError, TypeError, BadZipFile):  # none, unreadable, or written by something else
        return {}


def _save(path: Path, entries: dict[str, _Entry]) -> None:
    files, tables = {}, []
    for name, (stamp, info) in entries.items():
        sizes = (0, 0) if info.table is None else (len(info.table.prints), len(info.table.times))
        files[name] = [stamp, info._replace(table=None, runs=()), info.runs, *sizes]
        tables += [] if info.table is None else [info.table]
    content = json.dumps({"made_by": _makers(), "files": files}).encode()
    prints = np.concatenate([np.empty((0, PRINT_BYTES), np.uint8), *(table.prints for table in tables)])
    times = np.concatenate([np.empty(0, np.int64), *(table.times for table in tables)])
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, never the run
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as part:
            np.savez(part, content=np.frombuffer(content, np.uint8), prints=prints, times=times)
        os.replace(part.name, path)  # ranks that write at the same time leave one whole file
