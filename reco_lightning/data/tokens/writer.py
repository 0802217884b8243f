# SPDX-License-Identifier: Apache-2.0
"""`TokenShardWriter`: writes token ids as shards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reco_lightning.data.tokens.manifest import (
    COLUMNS,
    MANIFEST,
    Manifest,
    Shard,
    StoredArray,
    check_grid,
    file_sha256,
    write_manifest,
)
from reco_lightning.support.argument_checks import check_flag, check_int, check_path
from reco_lightning.support.disk_errors import named_disk_errors

__all__ = ["ClipSource", "TokenShardWriter", "check_ids", "refuse_shards", "token_dtype"]

_KEPT = "the shards that were there are as they were: free space, and give the same command again"


class ClipSource(NamedTuple):
    """The origin of a clip: its file and frames.

    Attributes:
        path: The video file, relative to the folder of videos.
        start: Its first frame.
        stop: The frame after its last.
        stride: Distance between its frames, in frames of the file.
    """

    path: str
    start: int
    stop: int
    stride: int = 1


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest of the two dtypes in which ids are stored.

    Args:
        vocab_size: V, 1 to 2**32.

    Raises:
        ValueError: V is out of range.

    Example:
        >>> token_dtype(65536), token_dtype(65537)
        ('uint16', 'uint32')
    """
    check_int(vocab_size=vocab_size)
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size must be 1 to 2**32, got {vocab_size}")
    return "uint16" if vocab_size <= 2**16 else "uint32"


def check_ids(ids: Tensor | npt.ArrayLike, *, grid: tuple[int, ...], vocab_size: int) -> npt.NDArray[Any]:
    """Checks the ids of some clips.

    Args:
        ids: Integers (n, t, h, w), or (n, N).
        grid: (t, h, w), or (N,).
        vocab_size: V.

    Returns:
        The same as an array.

    Raises:
        ValueError: The dtype, the shape or an id is wrong; the message names the first clip with such an id.

    Example:
        >>> check_ids([[[[0, 7]]]], grid=(1, 1, 2), vocab_size=8).shape
        (1, 1, 1, 2)
    """
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids must be integers, got {array.dtype}")
    if array.ndim != 1 + len(grid) or array.shape[1:] != tuple(grid):
        raise ValueError(f"ids must have shape (n, {', '.join(map(str, grid))}), got {array.shape}")
    wrong = np.argwhere((array < 0) | (array >= vocab_size))
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        raise ValueError(
            f"ids must be 0 to {vocab_size - 1}, got {int(array[place])} in clip {place[0]} at "
            f"{'(t, h, w)' if len(grid) == 3 else 'place'} {place[1:]}; "
            "is vocab_size the tokenizer's codebook size?"
        )
    return array


def refuse_shards(folder: str | os.PathLike[str]) -> None:
    """Checks that a folder holds no token shards yet.

    Args:
        folder: May not exist.

    Raises:
        ValueError: It holds some, or is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder must be a folder for token shards, got the file {os.fspath(folder)!r}")
    found = [name for name in (MANIFEST, *_shard_files(path)) if (path / name).exists()]
    if found:
        raise ValueError(
            f"folder must not hold token shards yet, got {os.fspath(folder)!r} with {found[0]}; choose another one, or "
            "pass overwrite=True"
        )


class TokenShardWriter:
    """Writes token shards; a reader sees the old folder or the new one, never something in between.

    Shards are written in a temporary folder beside their place, named after their content and moved when all are there;
    the manifest comes last. After an exception nothing new remains, and an existing set of shards stays as it was.

    Args:
        folder: Where to; made if missing.
        vocab_size: V; ids are 0 to V - 1.
        grid: (t, h, w) of every clip, or (N,) where the ids lie on no grid.
        tokenizer: Name of what made the ids.
        tokenizer_sha256: `reco_lightning.support.fingerprint.fingerprint` of it.
        classes: Names of the classes. Where given, labels must be places in it.
        video: How the clips were read, for the record; plain values.
        shard_size: Clips per shard.
        overwrite: Replace shards that the folder holds already.
        frame_aligned: Whether the ids of a clip are in order of time; False for a grid (N,).
        workspace: Folder for what is not finished, made anew and removed at the end; on the same disk. By default one
            of an own name in `folder`.

    Raises:
        ValueError: An argument is out of range, or the folder holds shards already.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TokenShardWriter(folder, vocab_size=8, grid=(1, 2, 2)) as writer:
        ...         writer.write(np.arange(8).reshape(2, 1, 2, 2))
        ...     writer.manifest.clips, sorted(path.name[:12] for path in Path(folder).iterdir())
        (2, ['clips-00000-', 'manifest.jso', 'tokens-00000'])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        vocab_size: int,
        grid: tuple[int, ...],
        tokenizer: str = "",
        tokenizer_sha256: str = "",
        classes: Sequence[str] = (),
        video: dict[str, Any] | None = None,
        shard_size: int = 8192,
        overwrite: bool = False,
        frame_aligned: bool = True,
        workspace: str | os.PathLike[str] | None = None,
    ) -> None:
        check_path(folder=folder)
        check_path(workspace=workspace, or_none=True)
        check_flag(overwrite=overwrite, frame_aligned=frame_aligned)
        check_int(vocab_size=vocab_size)
        check_int(at_least=1, shard_size=shard_size)
        for name, value in (("tokenizer", tokenizer), ("tokenizer_sha256", tokenizer_sha256)):
            if not isinstance(value, str):
                raise ValueError(f"{name} must be text, got {value!r}")
        if video is not None and not isinstance(video, Mapping):
            raise ValueError(f"video must be a dict or None, got {video!r}")
        if isinstance(classes, str) or not isinstance(classes, Sequence):
            raise ValueError(f"classes must be a sequence of names, got {classes!r}")
        shape = check_grid(grid, frame_aligned=frame_aligned)
        self.folder = Path(folder)
        self.shard_size, self.overwrite = shard_size, overwrite
        self.manifest = Manifest(
            vocab_size=int(vocab_size),
            grid=shape,
            dtype=token_dtype(vocab_size),
            clips=0,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            classes=tuple(map(str, classes)),
            video=dict(video or {}),
            frame_aligned=frame_aligned,
        )
        if not overwrite:
            refuse_shards(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if workspace is None:
            workspace = tempfile.mkdtemp(prefix=".unfinished-", dir=self.folder)
        else:
            shutil.rmtree(workspace, ignore_errors=True)
            os.makedirs(workspace)
        self._temporary: Path | None = Path(workspace)
        self._sources: dict[str, int] = {}
        self._captions: dict[str, int] = {}
        self._shards: list[Shard] = []
        self._ids: list[npt.NDArray[Any]] = []  # clips of the shard to come
        self._table: list[npt.NDArray[np.int64]] = []
        self._waiting = 0

    def write(
        self,
        ids: Tensor | npt.ArrayLike,
        labels: Tensor | npt.ArrayLike | None = None,
        sources: Sequence[ClipSource] | None = None,
        captions: Sequence[str | None] | None = None,
    ) -> None:
        """Adds clips.

        Args:
            ids: Integers (n, t, h, w), or (n, N), 0 to V - 1.
            labels: Integers (n,); without them all are 0.
            sources: Where the n clips come from; without them training and validation can be split by order only.
            captions: Texts of the n clips; None for a clip without one.

        Raises:
            ValueError: Shapes, numbers or ids do not fit, or the writer is closed.
        """
        if self._temporary is None:
            raise ValueError("write must come before close, got a closed TokenShardWriter; make a new one")
        array = check_ids(ids, grid=self.manifest.grid, vocab_size=self.manifest.vocab_size)
        count = len(array)
        marks = _labels(labels, count, len(self.manifest.classes))
        if sources is not None and len(sources) != count:
            raise ValueError(f"sources must be one per clip, got {len(sources)} for {count} clips")
        if captions is not None and len(captions) != count:
            raise ValueError(f"captions must be one per clip, got {len(captions)} for {count} clips")
        table = np.full((count, len(COLUMNS)), -1, np.int64)
        table[:, 0] = marks
        for row, source in zip(table, sources or (), strict=False):
            if not 0 <= source.start < source.stop or source.stride < 1:
                raise ValueError(f"sources must have 0 <= start < stop and stride >= 1, got {source}")
            row[1] = self._sources.setdefault(str(source.path), len(self._sources))
            row[2:5] = source[1:]
        for row, caption in zip(table, captions or (), strict=False):
            if caption is not None:
                row[5] = self._captions.setdefault(str(caption), len(self._captions))
        self._ids.append(array.astype(self.manifest.dtype))
        self._table.append(table)
        self._waiting += count
        while self._waiting >= self.shard_size:
            self._write_shard(self.shard_size)

    def close(self) -> Path:
        """Writes what is left, then the manifest.

        Returns:
            The folder.

        Raises:
            ValueError: No clip was written, or the folder got shards from elsewhere meanwhile.
        """
        if self._temporary is None:
            return self.folder
        try:
            if self._waiting:
                self._write_shard(self._waiting)
            if not self._shards:
                raise ValueError(f"token shards must hold at least one clip, got none for {self.folder}")
            if not self.overwrite:
                refuse_shards(self.folder)
            self._publish()
        finally:
            self._discard()
        return self.folder

    def __enter__(self) -> TokenShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def _write_shard(self, count: int) -> None:
        assert self._temporary is not None
        ids, table = np.concatenate(self._ids), np.concatenate(self._table)
        number = len(self._shards)
        self._shards.append(
            Shard(
                clips=count,
                tokens=_store(self._temporary, f"tokens-{number:05d}", ids[:count]),
                table=_store(self._temporary, f"clips-{number:05d}", table[:count]),
            )
        )
        self._ids, self._table = [ids[count:]], [table[count:]]
        self._waiting -= count

    def _publish(self) -> None:
        assert self._temporary is not None
        old = _shard_files(self.folder)
        self.manifest = replace(
            self.manifest,
            clips=sum(shard.clips for shard in self._shards),
            sources=tuple(self._sources),
            captions=tuple(self._captions),
            shards=tuple(self._shards),
        )
        new = [stored.file for stored in self.manifest.files]
        for name in new:
            os.replace(self._temporary / name, self.folder / name)
        write_manifest(self.folder, self.manifest)
        for name in old:  # only now: until the manifest was replaced, they were what a reader saw
            if name not in new:
                (self.folder / name).unlink()

    def _discard(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary = None
        self._ids, self._table, self._waiting = [], [], 0


def _labels(labels: Tensor | npt.ArrayLike | None, count: int, classes: int) -> npt.NDArray[Any]:
    if labels is None:
        return np.zeros(count, np.int64)
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.shape != (count,) or (count and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"labels must be integers of shape ({count},), got {array.dtype} of shape {array.shape}")
    wrong = array[(array < 0) | (array >= classes)] if classes else array[array < 0]
    if len(wrong):
        allowed = f"0 to {classes - 1}, the places in classes" if classes else "0 or more"
        raise ValueError(f"labels must be {allowed}, got {int(wrong[0])}")
    return array


def _shard_files(folder: Path) -> list[str]:
    return sorted(path.name for pattern in ("tokens-*.npy", "clips-*.npy") for path in folder.glob(pattern))


def _store(folder: Path, name: str, array: npt.NDArray[Any]) -> StoredArray:
    """Write an array under a name that its content gives, so that it never replaces another one."""
    path = folder / f"{name}.npy"
    with named_disk_errors(path, _KEPT), open(path, "wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    sha256 = file_sha256(path)
    path = path.rename(folder / f"{name}-{sha256[:12]}.npy")
    return StoredArray(path.name, path.stat().st_size, sha256)
