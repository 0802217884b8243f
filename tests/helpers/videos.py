# SPDX-License-Identifier: Apache-2.0
"""Makes the small and the odd video files that the reading tests need; a frame's grey value tells its number."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def grey(number):
    """Grey value of frame `number`, far enough from its neighbours' to survive coding."""
    return 20 + 5 * number


def numbers_of(clip):
    """Frame numbers that a clip uint8 (T, H, W, 3) shows."""
    return [round((float(frame.mean()) - 20) / 5) for frame in clip]


def grey_frames(count, height=48, width=64):
    return np.stack([np.full((height, width, 3), grey(number), np.uint8) for number in range(count)])


def bit_frames(count, height=48, width=64):
    """Frames whose picture is their number: cell b of 2 rows x 4 columns is light where bit b of it is 1."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1  # (T, 8)
    cells = np.where(bits, 235, 20).astype(np.uint8).reshape(count, 2, 4)
    return cells.repeat(height // 2, 1).repeat(width // 4, 2)[..., None].repeat(3, 3)


def bits_of(clip):
    """Frame numbers that a clip of `bit_frames` shows."""
    grey = clip.mean(-1)
    height, width = grey.shape[1] // 2, grey.shape[2] // 4
    cells = grey.reshape(len(grey), 2, height, 4, width)[
        :, :, height // 4 : -(height // 4), :, width // 4 : -(width // 4)
    ]
    return ((cells.mean((2, 4)).reshape(-1, 8) > 127) << np.arange(8)).sum(1).tolist()


def encode(path, frames, *, codec="libx264", pix_fmt="yuv420p", gop=12, b_frames=0, times=None, options=None, **muxer):
    """Write frames; `times` are their time stamps in 1/25 s, `muxer` are container options."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=25, options=options or ({"crf": "8"} if codec == "libx264" else {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_in_front(source, path, frames):
    """Copy an MP4 without its first `frames` frames by an edit list, as editors do: they stay in it unseen."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        shift = round(frames / 25 / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copied
                new.mux(packet)
    return path


def turn(path):
    """Make players turn an MP4 by 90 degrees clockwise: writes the matrix of its track header."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def damage(path, kind):
    """Damage a file: `noise` or `hole` in the middle, `truncate` to 60 %, `empty` it, or make it `text`."""
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, len(data) // 6
    if kind == "noise":
        data[middle : middle + length] = np.random.default_rng(0).bytes(length)
    elif kind == "hole":
        data[middle : middle + length] = bytes(length)
    elif kind == "truncate":
        del data[len(data) * 6 // 10 :]
    else:
        data = {"empty": b"", "text": b"this is no video\n"}[kind]
    path.write_bytes(data)
    return path
