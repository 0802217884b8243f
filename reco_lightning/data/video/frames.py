# SPDX-License-Identifier: Apache-2.0
"""Lists, checks and reads a video that is stored as one picture for each frame."""

from __future__ import annotations

import os
import posixpath
import re
import struct
import zlib
from functools import lru_cache
from typing import NamedTuple, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from reco_lightning.data.video.decoders import (
    OnDamage,
    Pixels,
    VideoError,
    VideoInfo,
    frame_pixels,
    refuse_animated_webp,
)

__all__ = [
    "IMAGE_EXTENSIONS",
    "FrameFolder",
    "frame_order",
    "is_frame_folder",
    "is_image",
    "split_zip",
    "zip_folders",
]

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# by their first bytes, since endings lie
_CODECS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8", "mjpeg"), (b"RIFF", "webp"), (b"BM", "bmp"))
_JPEG_END = b"\xff\xd9"


class ZipMember(NamedTuple):
    """Where a file lies in a zip file: `offset` of its header, `stored` and `size` in bytes, `method`, `crc`."""

    offset: int
    stored: int
    size: int
    method: int
    crc: int


def frame_order(name: str) -> tuple[int, list[str | int]]:
    """Returns a sorting key of frame files: by the number after the last underscore, then naturally (9 before 10).

    Args:
        name: File name with its ending.

    Example:
        >>> sorted(["sky_a_10.jpg", "sky_a_9.jpg", "sky_b_8.jpg"], key=frame_order)
        ['sky_b_8.jpg', 'sky_a_9.jpg', 'sky_a_10.jpg']
        >>> sorted(["10.png", "9.png", "009b.png"], key=frame_order)
        ['9.png', '009b.png', '10.png']
    """
    stem = os.path.splitext(name)[0]
    last = stem.rsplit("_", 1)[-1]
    number = int(last) if "_" in stem and last.isdecimal() else -1
    pieces = re.split(r"(\d+)", stem)  # text at even places, digits at odd ones, so that keys can be compared
    return number, [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)]


class FrameFolder:
    """A video of pictures in a folder, in the order of `frame_order`; does what `VideoFile` does.

    Args:
        path: The folder; one inside a zip file is `videos.zip/first`. Folders below it and hidden files do not count.

    Attributes:
        path: The same, absolute.
        names: File names of the frames in order.

    Raises:
        VideoError: There is no such folder, or the zip file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("10.png", "9.png", "notes.txt"):
        ...         pathlib.Path(root, name).touch()
        ...     FrameFolder(root).names
        ['9.png', '10.png']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._zip, inside = split_zip(self.path)
        self._members: dict[str, ZipMember] = {}
        if self._zip:
            folders = zip_folders(self._zip)
            if inside not in folders:
                raise VideoError(self.path, "is not in the zip file")
            self._members = folders[inside]
        try:
            names = self._members or os.listdir(self.path)
        except OSError as error:
            raise VideoError(self.path, f"cannot be read: {error.strerror}") from error
        self.names = sorted(filter(is_image, names), key=frame_order)

    def probe(self, on_damage: OnDamage = "skip") -> VideoInfo:
        """Decodes all frames once and says what they are.

        Args:
            on_damage: `keep` passes over frames that are damaged.

        Raises:
            VideoError: There is no frame, one is damaged, or they differ in size; the reason names the first such file.
                With `keep`: none is sound, or the sound ones differ in size.
        """
        shape: tuple[int, int] | None = None
        runs: list[tuple[int, int]] = []
        damage: list[VideoError] = []
        for number, name in enumerate(self.names):
            try:
                height, width = _shape(_decode(self, name))
            except VideoError as error:
                damage.append(error)
                if on_damage == "skip":
                    raise
                continue
            if shape not in (None, (height, width)):
                raise VideoError(self.path, f"{name} is {height} x {width} pixels, {self.names[runs[0][0]]} is not")
            shape = height, width
            first = runs.pop()[0] if runs and runs[-1][1] == number else number
            runs.append((first, number + 1))
        if damage and shape is None:
            raise damage[0]
        if shape is None:
            raise VideoError(self.path, f"holds no frame: no file that ends in {', '.join(IMAGE_EXTENSIONS)}")
        info = VideoInfo(len(self.names), 0.0, *shape, "frames")
        return info._replace(runs=tuple(runs), damage="; ".join(each.reason for each in damage)) if damage else info

    def read(self, indices: range, *, info: VideoInfo, size: tuple[int, int]) -> Pixels:
        """Reads the frames at ascending `indices`, scaled to `size` (height, width): uint8 (T, height, width, 3).

        Raises:
            VideoError: A frame cannot be read, or there are more or fewer than there were.
        """
        if len(self.names) != info.frames:
            raise VideoError(self.path, f"held {info.frames} frames and now holds {len(self.names)}")
        scaler = VideoReformatter()
        frames = (_decode(self, self.names[index]) for index in indices)
        return np.stack([frame_pixels(scaler, frame, height=size[0], width=size[1]) for frame in frames])

    def read_file(self, name: str) -> bytes:
        """Returns the content of a file in the folder.

        Args:
            name: Any file's, a picture's or not.

        Raises:
            VideoError: It cannot be read.
        """
        try:
            if self._zip:
                return _read_member(self._zip, self._members[name])
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read()
        except (OSError, KeyError, zlib.error, struct.error, ValueError) as error:
            raise VideoError(self.path, f"{name} cannot be read: {error}") from error

    def stamp(self) -> list[int]:
        """Returns the size of all frames in bytes and the latest change in ns; in a zip file, that of the zip file."""
        if self._zip:
            return [sum(self._members[name].size for name in self.names), os.stat(self._zip).st_mtime_ns]
        states = [os.stat(os.path.join(self.path, name)) for name in self.names]
        return [sum(each.st_size for each in states), max((each.st_mtime_ns for each in states), default=0)]


def is_image(name: str) -> bool:
    """Returns whether a file name is that of a frame: a picture's ending, and not hidden.

    Args:
        name: Without folders.
    """
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_frame_folder(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path leads to a folder, on disk or in a zip file: its video is one picture for each frame.

    Args:
        path: A video; need not exist.
    """
    if os.path.isdir(path):
        return True
    archive, inside = split_zip(os.path.abspath(path))
    return bool(archive) and inside in zip_folders(archive)


def split_zip(path: str) -> tuple[str, str]:
    """Splits a path at the zip file that it leads into.

    Args:
        path: Absolute.

    Returns:
        The zip file, and the folder inside it with `/`, "" for its top; two empty strings where there is none.

    Example:
        >>> split_zip("/nowhere/videos.zip/first")
        ('', '')
    """
    head = path
    while os.path.dirname(head) != head:
        if head.lower().endswith(".zip") and os.path.isfile(head):
            inside = os.path.relpath(path, head).replace(os.sep, "/")
            return head, "" if inside == "." else inside
        head = os.path.dirname(head)
    return "", ""


def zip_folders(path: str) -> dict[str, dict[str, ZipMember]]:
    """Lists the folders inside a zip file that hold files, each with its files; remembered until the zip file changes.

    Args:
        path: The zip file.

    Raises:
        VideoError: It cannot be read.
    """
    try:
        status = os.stat(path)
        return _zip_folders(path, status.st_size, status.st_mtime_ns)
    except (OSError, BadZipFile) as error:
        raise VideoError(path, f"cannot be read as a zip file: {error}") from error


@lru_cache(maxsize=64)
def _zip_folders(path: str, size: int, changed: int) -> dict[str, dict[str, ZipMember]]:
    found: dict[str, dict[str, ZipMember]] = {}
    with ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                folder, name = posixpath.split(posixpath.normpath(info.filename))
                member = ZipMember(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                found.setdefault(folder, {})[name] = member
    return found


def _read_member(path: str, member: ZipMember) -> bytes:
    # a ZipFile would read its whole table of contents again, or share one file position among forked workers
    with open(path, "rb") as file:
        file.seek(member.offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # past the name and the extra field
        data = file.read(member.stored)
    if member.method not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError("it must be stored or deflated in its zip file")
    data = zlib.decompress(data, -zlib.MAX_WBITS) if member.method == ZIP_DEFLATED else data
    if zlib.crc32(data) != member.crc:
        raise ValueError("its checksum is wrong")
    return data


def _decode(folder: FrameFolder, name: str) -> VideoFrame:
    data = folder.read_file(name)
    codec = next((codec for start, codec in _CODECS if data.startswith(start)), None)
    if codec is None:
        raise VideoError(folder.path, f"{name} is {'no picture' if data else 'empty (0 bytes)'}")
    refuse_animated_webp(folder.path, name, data[:32])
    if codec == "mjpeg" and _JPEG_END not in data[-1024:]:  # FFmpeg would paint the missing part grey
        raise VideoError(folder.path, f"{name} is cut off")
    context = cast(VideoCodecContext, av.CodecContext.create(codec, "r"))
    context.thread_count = 1
    try:
        frames = [*context.decode(av.Packet(data)), *context.decode(None)]
    except av.FFmpegError as error:
        raise VideoError(folder.path, f"{name} cannot be decoded: {error.strerror}") from error
    if len(frames) != 1 or frames[0].is_corrupt:
        raise VideoError(folder.path, f"{name} is damaged")
    return frames[0]


def _shape(frame: VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if frame.rotation // 90 % 2 else (frame.height, frame.width)
