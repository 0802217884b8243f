# SPDX-License-Identifier: Apache-2.0
"""Miniature data sets: empty files where names are enough, pictures where pixels count, and zip files of either."""

from __future__ import annotations

import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".png": ("png", "rgb24"), ".jpg": ("mjpeg", "yuvj444p"), ".bmp": ("bmp", "bgr24")}


def touch(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path(root)


def pixels(count, *, height=24, width=32, seed=0):
    """Frames of noise, uint8 (count, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def encode_picture(image, suffix=".png"):
    name, pix_fmt = CODECS[suffix]
    context = av.CodecContext.create(name, "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def write_frames(folder, frames, *, name="{}.png", first=1):
    """Write frames as pictures, numbered from `first` without leading zeros."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(frames, start=first):
        path = Path(folder, name.format(number))
        path.write_bytes(encode_picture(image, path.suffix))
    return Path(folder)


def pack(folder, path, *, below="", method=zipfile.ZIP_DEFLATED):
    """Pack all files below a folder, in an order of no use; `below` is put before their names."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(Path(folder).rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, str(Path(below, file.relative_to(folder))))
    return path
