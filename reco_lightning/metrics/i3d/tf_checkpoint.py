# SPDX-License-Identifier: Apache-2.0
"""Reads TensorFlow checkpoints (`NAME.index`, `NAME.data-00000-of-00001`) without TensorFlow.

The index is a table of sorted keys in LevelDB's format: blocks of prefix-compressed entries, found through an index
block that the footer points to. A value is a `BundleEntryProto` that says where in the data file a tensor lies.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["BundleEntry", "bundle_files", "read_index", "read_tensor"]

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # bytes
_FLOAT32 = 1  # DT_FLOAT


@dataclass(frozen=True)
class BundleEntry:
    """The place of a float32 tensor in the checkpoint.

    Args:
        shape: Its shape.
        offset: First byte in the data file.
        size: Bytes.
    """

    shape: tuple[int, ...]
    offset: int
    size: int


def bundle_files(checkpoint: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Returns the two files of a checkpoint.

    Args:
        checkpoint: Its folder, its prefix (`model.ckpt`), or one of its files.

    Returns:
        The index and the data file.

    Raises:
        ValueError: If a file is missing, a folder holds several checkpoints, or the data is in several parts.

    Example:
        >>> bundle_files("nowhere")
        Traceback (most recent call last):
            ...
        ValueError: checkpoint must be the folder or prefix of a TensorFlow checkpoint, got 'nowhere', with no ...
    """
    path, given = Path(checkpoint), os.fspath(checkpoint)
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"checkpoint must be one checkpoint, got the folder {given!r} with {names}; give a prefix")
        index = found[0] if found else path / "model.ckpt.index"
    else:
        prefix = given.removesuffix(".index").removesuffix(".data-00000-of-00001")
        index = Path(f"{prefix}.index")
    data = index.with_suffix(".data-00000-of-00001")
    for file in (index, data):
        if not file.is_file():
            raise ValueError(
                "checkpoint must be the folder or prefix of a TensorFlow checkpoint, "
                f"got {given!r}, with no {'.index' if file == index else '.data-00000-of-00001'} file {file}"
            )
    return index, data


def read_index(path: str | os.PathLike[str]) -> dict[str, BundleEntry]:
    """Returns the tensors of a checkpoint, by name.

    Args:
        path: The index file.

    Returns:
        Where each tensor lies, sorted by name.

    Raises:
        ValueError: If the file is no index or damaged, or of a kind that is not read: several data files, compressed
            blocks, numbers in big-endian order, sliced tensors, or numbers that are not float32.
    """
    content = Path(path).read_bytes()
    try:
        return _entries(content)
    except _UnreadableError as error:
        raise ValueError(f"checkpoint must have a readable index, got {os.fspath(path)!r}: {error}") from None
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"checkpoint must have a whole index, got {os.fspath(path)!r}, which is damaged") from error


def read_tensor(data: str | os.PathLike[str], entry: BundleEntry) -> Tensor:
    """Reads a tensor.

    Args:
        data: The data file.
        entry: Where it lies.

    Returns:
        float32, of the entry's shape.

    Raises:
        ValueError: If the file ends before the tensor does.
    """
    with open(data, "rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.size)
    if len(content) != entry.size:
        raise ValueError(f"checkpoint must be whole, got {os.fspath(data)!r}, which ends too early; download it again")
    return torch.from_numpy(np.frombuffer(content, "<f4").astype(np.float32)).view(entry.shape)


class _UnreadableError(Exception):
    """What is wrong with an index."""


def _entries(content: bytes) -> dict[str, BundleEntry]:
    if len(content) < _FOOTER or struct.unpack("<Q", content[-8:])[0] != _MAGIC:
        raise _UnreadableError("it does not end as an index ends")
    position = len(content) - _FOOTER
    for _ in range(2):  # the handle of the meta-index, which is empty
        _, position = _varint(content, position)
    entries: dict[str, BundleEntry] = {}
    headers = 0
    for _, handle in _block(content, *_handle(content, position)):
        for key, value in _block(content, *_handle(handle, 0)):
            if key:
                entries[key.decode()] = _entry(key.decode(), value)
            else:
                headers += 1
                _check_header(value)
    if headers != 1 or not entries:
        raise _UnreadableError(f"it has {headers} headers and {len(entries)} tensors")
    return entries


def _handle(content: bytes, position: int) -> tuple[int, int]:
    offset, position = _varint(content, position)
    size, _ = _varint(content, position)
    return offset, size


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block, which a byte for the compression and a checksum follow."""
    block = content[offset : offset + size]
    compression, checksum = struct.unpack("<BI", content[offset + size : offset + size + 5])
    if _masked(_crc32c(content[offset : offset + size + 1])) != checksum:
        raise _UnreadableError("its checksum does not match; download it again")
    if compression:
        raise _UnreadableError(
            f"its blocks are compressed (kind {compression}), as in TF-Hub's; take that of google-deepmind/kinetics-i3d"
        )
    (restarts,) = struct.unpack("<I", block[-4:])
    end = size - 4 * (restarts + 1)
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        new, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + new]
        position += new
        yield key, block[position : position + length]
        position += length


def _check_header(value: bytes) -> None:
    header = {field: number for field, number in _fields(value) if isinstance(number, int)}
    parts, order = header.get(1, 0), header.get(2, 0)
    if parts != 1:
        raise _UnreadableError(f"its data is in {parts} files; only those in one are read")
    if order != 0:
        raise _UnreadableError("its numbers are in big-endian order")


def _entry(name: str, value: bytes) -> BundleEntry:
    shape: tuple[int, ...] = ()
    numbers = {1: 0, 3: 0, 4: 0, 5: 0}  # type, part, offset, size; proto3 leaves zeros out
    for field, content in _fields(value):
        if field == 2 and isinstance(content, bytes):  # TensorShapeProto, of dimensions with a size each
            shape = tuple(
                int(dict(_fields(dimension)).get(1, 0)) if isinstance(dimension, bytes) else 0
                for inner, dimension in _fields(content)
                if inner == 2
            )
        elif field == 7:
            raise _UnreadableError(f"its tensor {name} is sliced")
        elif isinstance(content, int):
            numbers[field] = content
    if numbers[1] != _FLOAT32:
        raise _UnreadableError(f"its tensor {name} is of type {numbers[1]}, not float32")
    if numbers[5] != 4 * math.prod(shape):
        raise _UnreadableError(f"its tensor {name} of shape {shape} has {numbers[5]} bytes")
    return BundleEntry(shape, numbers[4], numbers[5])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer: integers, or bytes of what is nested."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, kind = key >> 3, key & 7
        if kind == 0:
            number, position = _varint(message, position)
            yield field, number
        elif kind == 2:
            length, position = _varint(message, position)
            yield field, message[position : position + length]
            position += length
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            yield field, int.from_bytes(message[position : position + width], "little")
            position += width
        else:
            raise _UnreadableError(f"it has a field of kind {kind}")


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = (number >> 1) ^ (0x82F63B78 if number & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(number)
    return table


_TABLE = _crc_table()


def _crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """LevelDB stores checksums turned and shifted, so that a checksum of checksums stays one."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
