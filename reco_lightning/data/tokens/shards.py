# SPDX-License-Identifier: Apache-2.0
"""`TokenShards`: a dataset over memory-mapped token ids.

A folder holds `manifest.json` and, per shard, two `.npy` files: ids, and a table of labels and of where each clip comes
from. Both are memory-mapped; nothing that is read is ever executed.
"""

from __future__ import annotations

import bisect
import itertools
import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reco_lightning.data.tokens.manifest import COLUMNS, MANIFEST, StoredArray, file_sha256, read_manifest
from reco_lightning.data.tokens.writer import ClipSource, TokenShardWriter

__all__ = ["ClipSource", "TokenItem", "TokenShardWriter", "TokenShards"]


class TokenItem(TypedDict):
    """One clip: `tokens` int64 (N,) in the order of the grid, N = t * h * w, and `label` int64 scalar."""

    tokens: Tensor
    label: Tensor


class TokenShards(Dataset[TokenItem]):
    """The clips of a folder of token shards, read from disk as they are asked for.

    Files are mapped into memory at the first access, in each process for itself, so that the dataset can be sent to
    workers.

    Args:
        folder: A folder that `TokenShardWriter` or `reco tokenize` wrote.

    Attributes:
        manifest: What the folder holds.

    Raises:
        ValueError: There is no manifest, or a shard is missing or of another size than the manifest says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TokenShardWriter(folder, vocab_size=8, grid=(1, 1, 2), classes=["cat", "dog"]) as writer:
        ...         writer.write([[[[1, 2]]], [[[3, 4]]]], labels=[0, 1])
        ...     shards = TokenShards(folder)
        ...     len(shards), shards[-1]
        (2, {'tokens': tensor([3, 4]), 'label': tensor(1)})
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.manifest = read_manifest(folder)
        self.folder = Path(folder)
        self._ends = list(itertools.accumulate(shard.clips for shard in self.manifest.shards))
        self._maps: dict[str, npt.NDArray[Any]] = {}
        for stored in self.manifest.files:
            path = self.folder / stored.file
            if not path.is_file():
                raise ValueError(f"{path} must exist, as {MANIFEST} names it, but is missing; copy it again")
            if path.stat().st_size != stored.bytes:
                raise ValueError(
                    f"{path} must have the {stored.bytes} bytes that {MANIFEST} says, got {path.stat().st_size}; it is "
                    "cut off or another file: copy it again, or tokenise again"
                )

    def __len__(self) -> int:
        return self.manifest.clips

    def __getitem__(self, index: int) -> TokenItem:
        shard, row = self._locate(index)
        # int64 makes a copy in memory: the mapped file is read-only, and torch has no arithmetic on uint16
        tokens = torch.from_numpy(self._array(shard, table=False)[row].reshape(-1).astype(np.int64))  # (N,)
        return {"tokens": tokens, "label": torch.tensor(int(self._array(shard, table=True)[row, 0]))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @property
    def grid(self) -> tuple[int, ...]:
        """(t, h, w) of every clip, or (N,) where the ids lie on no grid."""
        return self.manifest.grid

    @property
    def vocab_size(self) -> int:
        """V; ids are 0 to V - 1."""
        return self.manifest.vocab_size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.manifest.classes

    def table(self) -> npt.NDArray[np.int64]:
        """Returns the label and origin of every clip.

        Returns:
            int64 (clips, 6): label, place of the file in `manifest.sources` (-1: not known), first frame, frame after
            the last, stride, place of the text in `manifest.captions` (-1: none).
        """
        table = np.full((len(self), len(COLUMNS)), -1, np.int64)
        for number, end in enumerate(self._ends):
            part = self._array(number, table=True)
            table[end - len(part) : end, : part.shape[1]] = part
        return table

    def source(self, index: int) -> ClipSource | None:
        """Returns where a clip comes from.

        Args:
            index: Of the clip.

        Returns:
            File and frames, or None where they were not recorded.
        """
        shard, row = self._locate(index)
        source, start, stop, stride = map(int, self._array(shard, table=True)[row, 1:5])
        return None if source < 0 else ClipSource(self.manifest.sources[source], start, stop, stride)

    def caption(self, index: int) -> str | None:
        """Returns the text of a clip.

        Args:
            index: Of the clip.

        Returns:
            The text, or None where there is none.
        """
        shard, row = self._locate(index)
        place = int(self._array(shard, table=True)[row, 5]) if "caption" in self.manifest.columns else -1
        return None if place < 0 else self.manifest.captions[place]

    def verify(self) -> None:
        """Reads every file once and compares its checksum with the manifest's.

        Raises:
            ValueError: A file differs; the message names it and both sums.
        """
        for stored in self.manifest.files:
            found = file_sha256(self.folder / stored.file)
            if found != stored.sha256:
                raise ValueError(
                    f"{self.folder / stored.file} must have the SHA-256 {stored.sha256} that {MANIFEST} says, "
                    f"got {found}; it was changed or damaged: copy it again, or tokenise again"
                )

    def _locate(self, index: int) -> tuple[int, int]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index must be below {count}, the number of clips, got {index}")
        index %= count
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self.manifest.shards[shard].clips

    def _array(self, number: int, *, table: bool) -> npt.NDArray[Any]:
        shard = self.manifest.shards[number]
        stored = shard.table if table else shard.tokens
        if stored.file not in self._maps:
            shape = (shard.clips, len(self.manifest.columns)) if table else (shard.clips, *self.grid)
            try:
                self._maps[stored.file] = _map(
                    self.folder / stored.file, shape, "int64" if table else self.manifest.dtype
                )
            except ValueError:
                self._check_size(stored)
                raise
        # reading a mapped file past its end would kill the process without a word
        self._check_size(stored)
        return self._maps[stored.file]

    def _check_size(self, stored: StoredArray) -> None:
        path = os.path.join(self.folder, stored.file)
        try:
            found = f"{size} bytes" if (size := os.stat(path).st_size) != stored.bytes else ""
        except OSError as error:
            found = error.strerror or str(error)
        if found:
            raise ValueError(
                f"{path} must stay there with its {stored.bytes} bytes while it is read, got {found}; it was changed "
                "meanwhile: put it back, and resume from the last checkpoint"
            )


def _map(path: Path, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a .npy file of numbers, but cannot be read as one: {error}") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(
            f"{path} must hold {dtype} of shape {shape}, as {MANIFEST} says, got {array.dtype} of shape {array.shape}"
        )
    return array
