# SPDX-License-Identifier: Apache-2.0
"""Crash-safe partial output of `reco tokenize`: an interrupted run resumes without re-encoding.

Between the encoder, whose processes append ids here in whatever order they get them, and the token shards, which are
written in the order of the clips when all are there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reco_lightning.data.tokens.writer import check_ids, token_dtype
from reco_lightning.support.disk_errors import named_disk_errors

__all__ = ["EncodedClips", "PartWriter", "PartialTokens", "difference"]

_PLAN = "plan.json"
_FORMAT, _VERSION = "reco_lightning.unfinished_tokens", 1
_REMEDY = "what was encoded before is kept: free space, and give the same command again"


def difference(before: Mapping[str, Any], now: Mapping[str, Any], *, within: str = "") -> str:
    """Returns the first entry in which two plans differ, in words; "" if they do not.

    Args:
        before: Plain values and mappings of them.
        now: The same.
        within: Put before the entry's name.

    Example:
        >>> difference({"frames": 17, "videos": {"a.mp4": "9 bytes"}}, {"frames": 17, "videos": {"a.mp4": "8 bytes"}})
        'videos a.mp4 was 9 bytes and is 8 bytes'
    """
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, "not there"), now.get(key, "not there")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if deeper := difference(old, new, within=f"{within}{key} "):
                return deeper
        elif old != new:
            return f"{within}{key} was {old} and is {new}"
    return ""


class EncodedClips:
    """The clips that are encoded, read from the files of an `PartialTokens`.

    Args:
        files: Files of records.
        record: Their type.
        clips: How many clips there are in all.

    Attributes:
        done: Which of them are encoded, bool (clips,).
    """

    def __init__(self, files: Sequence[Path], record: np.dtype[Any], *, clips: int) -> None:
        self._records: list[npt.NDArray[Any]] = []
        self._places = np.full((clips, 2), -1, np.int64)  # file and row of each clip
        for path in files:
            count = path.stat().st_size // record.itemsize  # the last record may be cut off
            if count == 0:
                continue
            records = np.memmap(path, record, "r", shape=(count,))
            for row, clip in enumerate(records["clip"].tolist()):
                if 0 <= clip < clips and _checksum(records[row]) == records["crc"][row]:
                    self._places[clip] = len(self._records), row
            self._records.append(records)
        self.done: npt.NDArray[np.bool_] = self._places[:, 0] >= 0

    def ids(self, clips: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Returns the ids of clips that are encoded.

        Args:
            clips: Their numbers, n of them, 1 or more.

        Returns:
            (n, t, h, w), or (n, N).
        """
        return np.stack([self._records[part]["ids"][row] for part, row in self._places[clips].tolist()])


class PartialTokens:
    """The ids encoded so far, in a folder of their own.

    It holds `plan.json`, which says what is being made, and one file of records for each process of each start. A
    record is a clip's number, its ids and a checksum; one that was cut off or damaged does not count. A clip encoded
    twice counts once. Nothing is appended to a file of an earlier start.

    Args:
        folder: The folder; `begin` makes it.
        grid: Shape of a clip's ids.
        vocab_size: V; ids are 0 to V - 1.
        clips: How many there are to encode; their numbers are 0 to clips - 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     work = PartialTokens(Path(folder, "work"), grid=(2,), vocab_size=8, clips=3)
        ...     work.begin({"frames": 17})
        ...     with work.part() as part:
        ...         part.append([2, 0], np.array([[1, 2], [3, 4]]))
        ...     found = work.read()
        ...     found.done.tolist(), found.ids([0, 2]).tolist()
        ([True, False, True], [[3, 4], [1, 2]])
    """

    def __init__(self, folder: str | os.PathLike[str], *, grid: tuple[int, ...], vocab_size: int, clips: int) -> None:
        self.folder = Path(folder)
        self.grid, self.vocab_size, self.clips = grid, vocab_size, clips
        self.record = np.dtype([("crc", "<u4"), ("clip", "<i8"), ("ids", token_dtype(vocab_size), grid)])

    def begin(self, plan: Mapping[str, Any], *, anew: bool = False) -> None:
        """Begins, or resumes what an interrupted run left; one process does this, before any of them writes.

        Args:
            plan: All that the clips and their ids depend on; plain values and mappings of them.
            anew: Where something made by another plan is there, throw it away.

        Raises:
            ValueError: Something made by another plan is there; the message names what differs.
        """
        now = json.loads(json.dumps({"format": _FORMAT, "version": _VERSION, **plan}))
        path = self.folder / _PLAN
        if path.is_file():
            changed = difference(_read(path), now)
            if not changed:
                return
            if not anew:
                raise ValueError(
                    f"settings must be those of the unfinished tokenisation in {self.folder}, but {changed}; restore "
                    "the old value to go on with it, or begin anew with overwrite=True, or choose another output"
                )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        temporary = path.with_suffix(".tmp")
        with named_disk_errors(temporary, _REMEDY):
            temporary.write_text(json.dumps(now, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)

    def part(self) -> PartWriter:
        """Returns a new file to append records to; each process has its own."""
        return PartWriter(self)

    def records(self) -> int:
        """Returns how many records were written so far, by all processes; from the files' sizes alone."""
        return sum(path.stat().st_size // self.record.itemsize for path in self._files())

    def read(self) -> EncodedClips:
        """Reads all files and compares the checksums of their records."""
        return EncodedClips(self._files(), self.record, clips=self.clips)

    def failures(self) -> dict[int, str]:
        """Returns the clips that a process could not read, in this start or an earlier one, each with a reason."""
        found: dict[int, str] = {}
        for path in sorted(self.folder.glob("part-*.failed")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line may be cut off
                    clip, reason = json.loads(line)
                    found[clip] = reason
        return found

    def remove(self) -> None:
        """Removes the folder, the plan first, so that a removal cut off leaves nothing to resume."""
        (self.folder / _PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.bin"))


class PartWriter:
    """Appends records to a file of its own, and reasons why clips could not be read to another one.

    What `append` was given has left the process when it returns: killing the process loses nothing of it.

    Args:
        work: What it is a part of.
    """

    def __init__(self, work: PartialTokens) -> None:
        self._work = work
        for number in itertools.count():
            path = work.folder / f"part-{number:05d}.bin"
            try:
                self._file = path.open("xb", buffering=0)  # nothing is left to write when it is closed
            except FileExistsError:  # of another process, or of an earlier start
                continue
            break
        self._path, self._failed = path, path.with_suffix(".failed")

    def append(self, clips: Sequence[int], ids: Tensor | npt.ArrayLike) -> None:
        """Writes ids down.

        Args:
            clips: Numbers of the clips, n of them.
            ids: Integers (n, t, h, w), or (n, N), 0 to V - 1.

        Raises:
            ValueError: Shapes, numbers or ids do not fit.
            OSError: The disk is full, or refuses them.
        """
        array = check_ids(ids, grid=self._work.grid, vocab_size=self._work.vocab_size)
        if len(array) != len(clips):
            raise ValueError(f"ids must be those of the {len(clips)} clips encoded, got {len(array)}")
        records = np.zeros(len(clips), self._work.record)
        records["clip"], records["ids"] = clips, array
        for record in records:
            record["crc"] = _checksum(record)
        left = memoryview(records.tobytes())
        with named_disk_errors(self._path, _REMEDY):
            while left:
                left = left[self._file.write(left) :]

    def fail(self, clip: int, reason: str) -> None:
        """Writes down that a clip could not be read.

        Args:
            clip: Its number.
            reason: Why.
        """
        with named_disk_errors(self._failed, _REMEDY), self._failed.open("a", encoding="utf-8") as file:
            file.write(json.dumps([clip, reason], ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Closes the file; it stays."""
        self._file.close()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[4:])  # all but the checksum itself


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:  # not ours, or damaged: differs from any plan
        return {}
