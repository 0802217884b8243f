# SPDX-License-Identifier: Apache-2.0
"""Clips of files whose pictures are their numbers: every codec that PyAV's wheel writes, read from every start."""

import functools

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reco_lightning.data.video import file as video_file
from reco_lightning.data.video.clip import VideoInfo, probe, read_clip
from reco_lightning.data.video.frame_prints import FrameTable, frame_prints
from reco_lightning.data.video.readers import read_decord, seek_pyav
from tests.helpers.videos import bit_frames, bits_of, cut_in_front, encode

pytestmark = pytest.mark.third_party

FRAMES = 44
FINE = {"qmin": "1", "qmax": "3"}
#: pixels, containers, and whether there are B-frames; the options that make the pictures clear and the coding quick
CODECS = {
    "libx264": ("yuv420p", ("mp4", "mov", "mkv", "avi", "flv", "ts"), True, {"crf": "12"}),
    "libx265": ("yuv420p", ("mp4", "mkv", "ts"), True, {}),
    "mpeg4": ("yuv420p", ("mp4", "mov", "avi", "mkv"), True, FINE),
    "mpeg1video": ("yuv420p", ("mpg", "mkv", "ts"), True, FINE),
    "mpeg2video": ("yuv420p", ("mpg", "mp4", "mkv", "avi", "ts"), True, FINE),
    "msmpeg4v2": ("yuv420p", ("avi",), False, FINE),
    "msmpeg4": ("yuv420p", ("avi", "wmv"), False, FINE),
    "wmv1": ("yuv420p", ("wmv", "avi"), False, FINE),
    "wmv2": ("yuv420p", ("wmv", "avi"), False, FINE),
    "flv": ("yuv420p", ("flv",), False, FINE),
    "h263p": ("yuv420p", ("avi",), False, FINE),
    "libvpx": ("yuv420p", ("webm", "avi"), False, {}),
    "libvpx-vp9": ("yuv420p", ("webm", "mp4"), False, {"cpu-used": "8"}),
    "libsvtav1": ("yuv420p", ("mp4", "webm"), False, {"preset": "12", "svtav1-params": "lp=1"}),
    "mjpeg": ("yuvj420p", ("avi", "mov"), False, {}),
    "png": ("rgb24", ("mov", "avi"), False, {}),
    "ffv1": ("yuv420p", ("mkv", "avi"), False, {}),
    "huffyuv": ("yuv422p", ("avi",), False, {}),
    "prores_ks": ("yuv422p10le", ("mov",), False, {}),
    "qtrle": ("rgb24", ("mov",), False, {}),
    "gif": ("rgb8", ("gif",), False, {}),
    "snow": ("yuv420p", ("avi",), False, {"strict": "-2"}),
    "svq1": ("yuv410p", ("mov",), False, {}),
    "rawvideo": ("yuv420p", ("avi",), False, {}),
}
#: codecs without frames that depend on others, or rarely met: one container each
OTHERS = {
    "avi": {
        "amv": "yuvj420p", "asv1": "yuv420p", "asv2": "yuv420p", "cinepak": "rgb24", "cljr": "yuv411p",
        "ffvhuff": "yuv420p", "jpegls": "bgr24", "ljpeg": "bgr24", "magicyuv": "gbrp", "msvideo1": "rgb555le",
        "speedhq": "yuv420p", "utvideo": "gbrp", "y41p": "yuv411p", "zlib": "bgr24", "zmbv": "rgb565le",
    },
    "mov": {
        "avrp": "gbrp10le", "cfhd": "yuv422p10le", "dpx": "gray", "dxv": "rgba", "exr": "grayf32le",
        "jpeg2000": "rgb24", "prores": "yuv422p10le", "prores_aw": "yuv422p10le",
        "r10k": "gbrp10le", "r210": "gbrp10le", "rpza": "rgb555le", "sgi": "rgb24",
        "targa": "bgr24", "tiff": "rgb24", "v210": "yuv422p10le", "v308": "yuv444p", "v408": "yuva444p",
        "v410": "yuv444p10le", "yuv4": "yuv420p",
    },
    "flv": {"flashsv": "bgr24", "flashsv2": "bgr24"},
    "rm": {"rv10": "yuv420p", "rv20": "yuv420p"},
    "mkv": {"libx264rgb": "bgr0"},
    "apng": {"apng": "rgb24"},
    "roq": {"roqvideo": "yuvj444p"},
}  # fmt: skip
CODECS |= {
    codec: (pix_fmt, (ending,), False, {"strict": "-2"})
    for ending, codecs in OTHERS.items()
    for codec, pix_fmt in codecs.items()
}
#: encoders of the wheel that write no such file, by the reason
LEFT_OUT = {
    "single pictures": "a64multi a64multi5 alias_pix bitpacked bmp fits hdr libwebp libwebp_anim pam pbm pcx pfm pgm "
    "pgmyuv phm ppm qoi sunrast vbn wbmp webp xbm xface xwd",
    "pictures of a few sizes": "dirac dnxhd dvvideo h261 h263 vc2",
    "palettes": "msrle smc",
    "other names": "av1 h264 hevc vp8 vp9",
    "nothing": "vnull wrapped_avframe",
}
HARDWARE = ("_amf", "_mf", "_nvenc", "_omx", "_qsv", "_v4l2m2m", "_vaapi", "_videotoolbox", "_vulkan", "_d3d12va")
RATES = {
    "constant": None,
    "variable": [n if n < 15 else 15 + 3 * (n - 15) + (n % 2 if n > 25 else 0) for n in range(FRAMES)],
    "late": list(range(50, 50 + FRAMES)),
    "negative": list(range(-7, FRAMES - 7)),
}


@functools.cache
def numbered():
    return bit_frames(FRAMES, 48, 64)


def make(folder, codec, ending, *, gop=12, b_frames=0, closed=True, rate="constant", cut=0):
    """Writes such a file; returns it and the numbers that it shows."""
    pix_fmt, _, _, options = CODECS[codec]
    options = dict(options)
    if codec == "libx264":
        options["x264-params"] = f"open-gop={int(not closed)}:scenecut=0:b-adapt=0"
    elif codec == "libx265":
        options["x265-params"] = f"log-level=none:pools=1:open-gop={int(not closed)}:scenecut=0:crf=12"
    elif codec in ("mpeg4", "mpeg1video", "mpeg2video") and closed:
        options |= {"flags": "+cgop", "sc_threshold": "1000000000"}
    muxer = {"avoid_negative_ts": "disabled"} if rate == "negative" else {}
    path = folder / f"{codec}-{gop}-{b_frames}-{closed}-{rate}.{ending}"
    encode(
        path,
        numbered(),
        codec=codec,
        pix_fmt=pix_fmt,
        gop=gop,
        b_frames=b_frames,
        times=RATES[rate],
        options=options,
        **muxer,
    )
    if cut:
        path = cut_in_front(path, folder / f"cut-{path.name}", cut)
    hidden = cut or (7 if rate == "negative" and ending in ("mp4", "mov") else 0)  # there an edit list begins at 0
    return path, list(range(hidden, FRAMES))


def wrong_clips(path, shown, *, frames=4, stride=1, size=(24, 32)):
    """Starts at which a clip shows other frames than those asked for."""
    info = probe(path)
    assert info.frames == len(shown)
    starts = range(info.frames - (frames - 1) * stride)
    clips = (
        read_clip(path, start=start, frames=frames, stride=stride, size=size, resize="squash", info=info)
        for start in starts
    )
    return [start for start, clip in zip(starts, clips, strict=True) if bits_of(clip) != shown[start::stride][:frames]]


def can_encode(name):
    try:
        return av.codec.Codec(name, "w").type == "video"
    except av.codec.codec.UnknownCodecError:
        return False


def test_the_table_has_every_encoder_of_the_wheel():
    known = {*CODECS, *" ".join(LEFT_OUT.values()).split()}
    assert {name for name in av.codecs_available if can_encode(name) and not name.endswith(HARDWARE)} <= known


@pytest.mark.parametrize(
    ("codec", "ending"), [(codec, end) for codec, (_, ends, *_) in CODECS.items() if can_encode(codec) for end in ends]
)
def test_every_start_of_every_codec_and_container(tmp_path, codec, ending):
    b_frames = 2 if CODECS[codec][2] else 0
    path, shown = make(tmp_path, codec, ending, b_frames=b_frames, closed=not b_frames)
    assert wrong_clips(path, shown) == []


@pytest.mark.parametrize(
    ("codec", "options"),
    [("libx264", {"crf": "12", "x264-params": "tff=1"}), ("mpeg2video", {**FINE, "flags": "+ildct+ilme"})],
)
def test_two_fields_are_one_frame(tmp_path, codec, options):
    path = encode(tmp_path / "fields.ts", numbered(), codec=codec, b_frames=2, options=options)
    assert wrong_clips(path, list(range(FRAMES))) == []


def test_a_picture_that_is_shown_twice_is_two_frames(tmp_path):
    order = [n for n in range(FRAMES // 2) for _ in range(2)]
    path = encode(tmp_path / "twice.mp4", bit_frames(FRAMES // 2, 48, 64)[order], b_frames=3)
    assert wrong_clips(path, order) == []


CODINGS = st.sampled_from([(codec, ending) for codec, (_, ends, b, _) in CODECS.items() for ending in ends if b])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    coding=CODINGS,
    gop=st.sampled_from([1, 12, 250]),
    b_frames=st.integers(0, 8),
    closed=st.booleans(),
    rate=st.sampled_from(list(RATES)),
    cut=st.sampled_from([0, 0, 5]),
    frames=st.integers(1, 9),
    stride=st.integers(1, 4),
    side=st.sampled_from([16, 30, 47, 64, 96]),
)
def test_any_way_of_coding_and_of_asking(tmp_path, coding, gop, b_frames, closed, rate, cut, frames, stride, side):
    codec, ending = coding
    path, shown = make(
        tmp_path,
        codec,
        ending,
        gop=gop,
        b_frames=min(b_frames, gop - 1),
        closed=closed or gop == 1,
        rate=rate,
        cut=cut if ending in ("mp4", "mov") and rate == "constant" else 0,
    )
    assert wrong_clips(path, shown, frames=frames, stride=stride, size=(side // 2 * 2, side // 4 * 4)) == []


def test_a_file_that_is_misread_once_is_read_by_pyav_from_then_on(tmp_path, monkeypatch):
    path, shown = make(tmp_path, "libx264", "mp4")
    info = probe(path)
    assert info.reader == "decord"
    calls = []

    def one_too_late(name, indices, **how):
        calls.append(indices)
        return read_decord(name, range(indices.start + 1, indices.stop + 1), **how)

    monkeypatch.setattr(video_file, "read_decord", one_too_late)
    for start in (20, 30):
        clip = read_clip(path, start=start, frames=5, size=(24, 32), resize="squash", info=info)
        assert bits_of(clip) == shown[start : start + 5]
    assert calls == [range(20, 25)]
    other, shown = make(tmp_path, "libx264", "mkv")  # a file of its own
    assert bits_of(read_clip(other, start=20, frames=5, size=(24, 32), resize="squash", info=info)) == shown[20:25]
    assert len(calls) == 2


def test_pyav_seeks_and_its_clips_are_proved_too(tmp_path, monkeypatch):
    path, shown = make(tmp_path, "libx264", "mkv")
    info = probe(path)._replace(reader="pyav")
    whole = []
    honest = video_file.read_pyav
    monkeypatch.setattr(video_file, "read_pyav", lambda *how, **more: whole.append(how) or honest(*how, **more))
    ask = {"start": 36, "frames": 4, "stride": 2, "size": (24, 32), "resize": "squash", "info": info}
    assert bits_of(read_clip(path, **ask)) == shown[36:44:2]
    assert not whole  # the key frame before is near
    monkeypatch.setattr(video_file, "seek_pyav", lambda *how, **more: np.roll(seek_pyav(*how, **more), 1, 0))
    assert bits_of(read_clip(path, **ask)) == shown[36:44:2]
    assert len(whole) == 1


def test_without_a_table_nothing_is_taken_on_trust(tmp_path, monkeypatch):
    path, shown = make(tmp_path, "libx264", "mp4")
    monkeypatch.setattr(video_file, "read_decord", lambda *how, **more: pytest.fail("not proved"))
    info = VideoInfo(FRAMES, 25.0, 48, 64, "decord")
    assert bits_of(read_clip(path, start=30, frames=3, size=(24, 32), resize="squash", info=info)) == shown[30:33]


@pytest.mark.parametrize("size", [(45, 63), (47, 64), (128, 227)])
def test_frames_of_an_odd_size_are_proved_although_they_are_lighter(tmp_path, size, monkeypatch):
    fade = np.arange(60, 60 + 4 * FRAMES, 4).clip(0, 235).astype(np.uint8)[:, None, None, None]
    path = encode(tmp_path / "fade.mp4", np.broadcast_to(fade, (FRAMES, 48, 64, 3)).copy())
    info = probe(path)
    assert info.reader == "decord"
    monkeypatch.setattr(video_file, "seek_pyav", lambda *how, **more: pytest.fail("decord was not believed"))
    clip = read_clip(path, start=20, frames=5, size=size, resize="squash", info=info)
    assert clip.shape == (5, *size, 3)
    assert not info.table.shows(clip, range(21, 26))


def test_prints_tell_a_small_change_and_not_a_size():
    still = np.random.default_rng(0).integers(60, 180, (1, 6, 8, 3)).astype(np.uint8).repeat(40, 1).repeat(40, 2)
    frames = still.repeat(6, 0)
    for number in range(6):
        frames[number, 40:80, 40 * number : 40 * number + 40] = 255  # one of 48 cells
    table = FrameTable(frame_prints(frames), np.arange(6))
    small = frames[:, 2::5, 2::5]
    assert table.shows(small[1:4], range(1, 4))
    assert not table.shows(small[1:4], range(2, 5))
    assert not table.shows(np.zeros_like(small[1:4]), range(1, 4))  # like no frame at all
    alike = FrameTable(frame_prints(still.repeat(6, 0)), np.arange(6))
    assert alike.shows(still.repeat(2, 0), range(4, 6))  # a still scene proves nothing, and need not


def test_a_frame_costs_less_than_64_bytes(tmp_path):
    info = probe(make(tmp_path, "libx264", "mp4")[0])
    assert (info.table.prints.nbytes + info.table.times.nbytes) / info.frames < 64
