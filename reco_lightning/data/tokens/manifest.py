# SPDX-License-Identifier: Apache-2.0
"""Reads and writes `manifest.json`, the table of contents of a folder of token shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reco_lightning.support.argument_checks import check_int_sequence, check_path
from reco_lightning.support.atomic_write import atomic_write
from reco_lightning.support.disk_errors import named_disk_errors

__all__ = [
    "COLUMNS",
    "MANIFEST",
    "Manifest",
    "Shard",
    "StoredArray",
    "check_grid",
    "file_sha256",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
# of the per-clip table; source and caption are -1 where there is none
COLUMNS = ("label", "source", "start", "stop", "stride", "caption")
_COLUMNS_BEFORE_CAPTIONS = COLUMNS[:5]
_FORMAT, _VERSION = "reco_lightning.tokens", 1


@dataclass(frozen=True)
class StoredArray:
    """One `.npy` file.

    Attributes:
        file: Name, in the manifest's folder.
        bytes: Size of the file.
        sha256: Of the whole file, 64 hexadecimal digits.
    """

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Some of the clips.

    Attributes:
        clips: How many.
        tokens: Ids (clips, t, h, w), or (clips, N), of the manifest's dtype.
        table: int64 (clips, 6), the columns of `COLUMNS`; (clips, 5), without captions, in folders of older versions.
    """

    clips: int
    tokens: StoredArray
    table: StoredArray


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of token shards.

    Attributes:
        vocab_size: V; ids are 0 to V - 1.
        grid: (t, h, w) of every clip, or (N,) where the ids lie on no grid.
        dtype: Of the stored ids: uint16, or uint32 where V is above 65536.
        clips: How many, in all shards.
        tokenizer: Name of what made the ids.
        tokenizer_sha256: `reco_lightning.support.fingerprint.fingerprint` of it, or "".
        classes: Names of the classes; labels are places in this list.
        sources: Video files of the clips, relative to the folder of videos.
        video: How the clips were read: frames, stride, size and the like; plain values.
        shards: The files, in order of the clips.
        frame_aligned: Whether the ids of a clip are in order of time, those of frame block k at place k of the grid.
        captions: Texts of the clips; the table's last column holds places in this list.
        columns: Of the per-clip tables.
    """

    vocab_size: int
    grid: tuple[int, ...]
    dtype: str
    clips: int
    tokenizer: str = ""
    tokenizer_sha256: str = ""
    classes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    video: Mapping[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    frame_aligned: bool = True
    captions: tuple[str, ...] = ()
    columns: tuple[str, ...] = COLUMNS

    @property
    def tokens(self) -> int:
        """N, ids per clip."""
        return math.prod(self.grid)

    @property
    def files(self) -> list[StoredArray]:
        """All files, shard by shard."""
        return [stored for shard in self.shards for stored in (shard.tokens, shard.table)]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, as 64 hexadecimal digits.

    Args:
        path: The file; read in pieces.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Writes `manifest.json`; it appears, or replaces the old one, at once and whole.

    Args:
        folder: Where the shards lie.
        manifest: What it says.

    Returns:
        The file.
    """
    path = Path(folder, MANIFEST)
    content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(manifest)}
    remedy = "the manifest that was there is as it was: free space, and give the same command again"
    with named_disk_errors(path, remedy), atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `manifest.json`.

    Args:
        folder: A folder that `TokenShardWriter` wrote.

    Returns:
        What it says; nothing is said yet about the shards themselves.

    Raises:
        ValueError: There is none, it is no manifest or one of another version, or it contradicts itself.
    """
    check_path(folder=folder)
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ValueError(
            f"folder must hold token shards, got {os.fspath(folder)!r} without a {MANIFEST}, which is "
            "written last (the writing may not have ended); `reco tokenize` makes one"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = (content["format"], content["version"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a manifest of token shards, but cannot be read as one: {error!r}") from error
    columns = tuple(content.get("columns", ()))
    if found != (_FORMAT, _VERSION) or columns not in (COLUMNS, _COLUMNS_BEFORE_CAPTIONS):
        raise ValueError(
            f"{path} must be of format {_FORMAT!r}, version {_VERSION}, columns {COLUMNS}, got {found[0]!r}, version "
            f"{found[1]}, columns {content.get('columns')}; tokenise again, or install the version that wrote it"
        )
    try:
        manifest = Manifest(
            vocab_size=int(content["vocab_size"]),
            grid=check_grid(content["grid"], frame_aligned=content.get("frame_aligned", True)),
            dtype=str(content["dtype"]),
            clips=int(content["clips"]),
            tokenizer=str(content["tokenizer"]),
            tokenizer_sha256=str(content["tokenizer_sha256"]),
            classes=tuple(map(str, content["classes"])),
            sources=tuple(map(str, content["sources"])),
            video=dict(content["video"]),
            shards=tuple(
                Shard(int(shard["clips"]), StoredArray(**shard["tokens"]), StoredArray(**shard["table"]))
                for shard in content["shards"]
            ),
            frame_aligned=bool(content.get("frame_aligned", True)),  # older versions stored no other ids
            captions=tuple(map(str, content.get("captions", ()))),
            columns=columns,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a manifest of token shards, but a value is missing or wrong: {error!r}"
        ) from error
    _check(path, manifest)
    return manifest


def check_grid(grid: Sequence[int], *, frame_aligned: bool = True) -> tuple[int, ...]:
    """Checks the shape of a clip's ids.

    Args:
        grid: (t, h, w), or (N,) where the ids lie on no grid.
        frame_aligned: Whether the ids are in order of time; then the grid has to say where frame blocks end.

    Returns:
        The same.

    Raises:
        ValueError: There are other than one or three numbers, one is not positive, or time has no axis of its own.

    Example:
        >>> check_grid([5, 16, 16]), check_grid([1024], frame_aligned=False)
        ((5, 16, 16), (1024,))
    """
    check_int_sequence(grid=grid)
    numbers = tuple(map(int, grid))
    if len(numbers) not in (1, 3) or min(numbers) < 1:
        raise ValueError(f"grid must be three positive numbers (t, h, w), or one (N,), got {numbers}")
    if frame_aligned and len(numbers) == 1:
        raise ValueError(
            f"grid must be (t, h, w) where ids are in order of time, got {numbers}; pass frame_aligned=False"
        )
    return numbers


def _check(path: Path, manifest: Manifest) -> None:
    counted = sum(shard.clips for shard in manifest.shards)
    if counted != manifest.clips:
        raise ValueError(f"{path} must count its clips right, got clips {manifest.clips} and {counted} in its shards")
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"{path} must name dtype uint16 or uint32, got {manifest.dtype!r}")
    if manifest.vocab_size < 1:
        raise ValueError(f"{path} must have a positive grid and vocabulary, got {manifest.grid}, {manifest.vocab_size}")
    for shard in manifest.shards:
        for name in (shard.tokens.file, shard.table.file):
            # a manifest from elsewhere may not lead out of its folder
            if Path(name).name != name or not name.endswith(".npy"):
                raise ValueError(f"{path} must name .npy files beside it, got {name!r}")
