# SPDX-License-Identifier: Apache-2.0
import pickle
import sys

import numpy as np
import pytest

from reco_lightning.data.clips.folder import VideoFolder
from reco_lightning.data.video import clip as video
from reco_lightning.data.video import file, readers
from reco_lightning.data.video.clip import VideoError, VideoInfo, fit_size, probe, read_clip
from tests.helpers.videos import (
    bit_frames,
    bits_of,
    cut_in_front,
    damage,
    encode,
    encode_sound,
    grey_frames,
    numbers_of,
    turn,
)

pytestmark = pytest.mark.third_party

FRAMES = 40
SOUND = {
    "plain.mp4": {},
    "long gop.mp4": {"gop": 250, "b_frames": 3},
    "überlang és 100%.mkv": {"b_frames": 2},
    "variable_rate.mp4": {"times": [n if n < 20 else 20 + 3 * (n - 20) for n in range(FRAMES)]},
    "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "no_duration.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}, "live": "1"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "b_frames": 2, "options": {"qmin": "1", "qmax": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2, "options": {"qmin": "1", "qmax": "2"}},
    "hevc.mp4": {"codec": "libx265", "b_frames": 2, "options": {"x265-params": "log-level=none:pools=1"}},
    "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "full_range.mp4": {"pix_fmt": "yuvj420p"},
    "deep.mp4": {"pix_fmt": "yuv420p10le"},
}


@pytest.fixture
def plain(tmp_path):
    return encode(tmp_path / "plain.mp4", grey_frames(FRAMES), b_frames=2)


@pytest.mark.parametrize(("name", "how"), SOUND.items())
def test_every_reader_returns_the_frames_that_were_asked_for(tmp_path, name, how):
    path = encode(tmp_path / name, grey_frames(FRAMES), **how)
    info = probe(path)
    assert (info.frames, info.height, info.width) == (FRAMES, 48, 64)
    for start, frames, stride in ((0, FRAMES, 1), (FRAMES - 3, 3, 1), (1, 13, 3), (17, 5, 4), (24, 2, 1)):
        clip = read_clip(path, start=start, frames=frames, stride=stride, size=32, info=info)
        assert clip.dtype == np.uint8
        assert clip.shape == (frames, 32, 32, 3)
        assert numbers_of(clip) == list(range(start, start + frames * stride, stride))


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path, plain):
    path = cut_in_front(plain, tmp_path / "edited.mp4", frames=5)
    info = probe(path)
    assert info.frames == FRAMES - 5
    assert numbers_of(read_clip(path, start=30, frames=5, size=32, info=info)) == [35, 36, 37, 38, 39]


def test_decord_reads_the_common_case_and_pyav_returns_the_same_pixels(tmp_path):
    down, right = np.mgrid[0:96, 0:128]
    frames = np.stack([np.stack([down + 10 * t, right, right + down], -1) for t in range(12)]).astype(np.uint8)
    path = encode(tmp_path / "colours.mp4", frames)
    info = probe(path)
    assert info.reader == "decord"
    one = read_clip(path, start=2, frames=8, size=64, info=info)
    other = read_clip(path, start=2, frames=8, size=64, info=info._replace(reader="pyav"))
    assert np.abs(one.astype(int) - other).mean() < 1


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_rotation_metadata_is_applied(tmp_path, reader):
    frames = np.zeros((4, 48, 96, 3), np.uint8)
    frames[:, :24, :48] = 255  # top left, so top right once turned clockwise
    path = turn(encode(tmp_path / "phone.mp4", frames))
    info = probe(path)
    assert (info.height, info.width) == (96, 48)
    clip = read_clip(path, start=0, frames=4, size=(96, 48), info=info._replace(reader=reader))
    assert clip[0, 10, 40].min() > 230
    assert clip[0, 10, 8].max() < 25
    assert clip[0, 80, 40].max() < 25


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_short_side_crop_keeps_proportions_and_squash_does_not(tmp_path, reader):
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 48:80] = 255  # a band of a quarter of the width, in the centre
    path = encode(tmp_path / "band.mp4", frames)
    info = probe(path)._replace(reader=reader)
    crop = read_clip(path, start=0, frames=3, size=64, info=info)
    squash = read_clip(path, start=0, frames=3, size=64, resize="squash", info=info)
    assert np.mean(crop > 127) == pytest.approx(1 / 2, abs=0.03)
    assert np.mean(squash > 127) == pytest.approx(1 / 4, abs=0.03)


@pytest.mark.parametrize("size", [8, 16, 48, 72, (33, 57)])
def test_widths_whose_rows_decord_pads_come_out_whole(plain, size):
    clip = read_clip(plain, start=3, frames=2, size=size, resize="squash")
    assert clip.shape == (2, *(size if isinstance(size, tuple) else (size, size)), 3)
    assert numbers_of(clip) == [3, 4]


def test_portrait_odd_and_single_frame(tmp_path):
    path = encode(tmp_path / "odd.mp4", grey_frames(1, height=71, width=35), pix_fmt="yuv444p")
    assert probe(path)[:1] + probe(path)[2:4] == (1, 71, 35)
    assert read_clip(path, start=0, frames=1, size=32).shape == (1, 32, 32, 3)


def test_without_info_a_file_is_probed_once_until_it_changes(plain, monkeypatch):
    calls = []
    monkeypatch.setattr(video, "probe", lambda path: calls.append(path) or probe(path))
    video._probe_unchanged.cache_clear()
    for _ in range(3):
        read_clip(plain, start=0, frames=2, size=32)
    assert len(calls) == 1
    encode(plain, grey_frames(5))
    with pytest.raises(VideoError, match="holds 5 frames"):
        read_clip(plain, start=20, frames=2, size=32)


def test_pyav_takes_over_where_decord_is_missing_or_fails_later(plain, monkeypatch):
    info = probe(plain)
    assert info.reader == "decord"
    monkeypatch.setitem(sys.modules, "decord", None)
    assert numbers_of(read_clip(plain, start=7, frames=3, size=32, info=info)) == [7, 8, 9]
    assert probe(plain).reader == "pyav"


def test_a_bridge_set_by_the_user_does_no_harm(plain):
    import decord

    info = probe(plain)
    decord.bridge.set_bridge("torch")
    try:
        assert numbers_of(readers.read_decord(str(plain), range(7, 9), total=FRAMES, size=(64, 64))) == [7, 8]
        assert isinstance(read_clip(plain, start=7, frames=2, size=32, info=info), np.ndarray)
    finally:
        decord.bridge.set_bridge("native")


def test_a_reader_that_returns_other_frames_is_not_trusted(plain, monkeypatch):
    honest = file.read_decord
    monkeypatch.setattr(file, "read_decord", lambda path, indices, **rest: honest(path, range(0, len(indices)), **rest))
    assert probe(plain).reader == "pyav"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm"])
@pytest.mark.parametrize("kind", ["noise", "hole", "truncate"])
def test_damage_anywhere_is_found(tmp_path, suffix, kind):
    codec = {".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(suffix, "libx264")
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, 48, 64, 3), np.uint8)  # large packets
    path = damage(encode(tmp_path / f"a{suffix}", noise, codec=codec), kind)
    with pytest.raises(VideoError, match=rf"a{suffix}: (is damaged|is cut off|cannot be decoded)"):
        probe(path)


def test_a_stream_cut_behind_its_index_is_found(tmp_path):
    path = encode(tmp_path / "fast.mp4", grey_frames(FRAMES), movflags="+faststart")
    with pytest.raises(VideoError, match=r"fast.mp4: (is damaged|is cut off|cannot be decoded)"):
        probe(damage(path, "truncate"))


def test_gifs_are_read_at_their_rate(tmp_path):
    times = [5 * number // 2 for number in range(20)]  # 10 a second, in 1/25 s
    path = encode(tmp_path / "gifs" / "a.gif", bit_frames(20), codec="gif", pix_fmt="rgb8", times=times)
    assert probe(path).fps == pytest.approx(10, rel=0.05)
    folder = VideoFolder(path.parent, frames=4, size=(48, 64), cache=False)
    assert [bits_of(folder[index]["video"].numpy().astype(float)) for index in (0, 4)] == [
        [0, 1, 2, 3],
        [16, 17, 18, 19],
    ]


def test_an_animated_webp_is_refused_by_a_way_out(tmp_path):
    said = r"a.webp is an animated WebP, which FFmpeg does not decode; convert it first, for instance: magick a.webp"
    path = encode(tmp_path / "a.webp", bit_frames(3), codec="libwebp_anim")
    for place in (path, tmp_path):  # a video of its own, and a frame of one
        with pytest.raises(VideoError, match=said):
            probe(place)


def test_files_that_are_no_video_are_named(tmp_path, plain):
    with pytest.raises(VideoError, match=r"sound.mp4: holds no video stream"):
        probe(encode_sound(tmp_path / "sound.mp4"))
    with pytest.raises(VideoError, match=r"plain.mp4: cannot be decoded: Invalid data"):
        probe(damage(plain, "text"))
    with pytest.raises(VideoError, match=r"plain.mp4: is empty \(0 bytes\)"):
        probe(damage(plain, "empty"))
    with pytest.raises(VideoError, match=r"missing.mp4: is not a file"):
        probe(tmp_path / "missing.mp4")
    with pytest.raises(VideoError, match=r"missing.mp4: cannot be read: No such file"):
        read_clip(tmp_path / "missing.mp4", start=0, frames=1)


def test_a_file_cut_after_the_probe_is_named(plain):
    info = probe(plain)
    damage(plain, "truncate")
    with pytest.raises(VideoError, match=r"plain.mp4: (cannot be decoded|holds no video stream)"):
        read_clip(plain, start=30, frames=5, size=32, info=info)
    encode(plain, grey_frames(20))
    with pytest.raises(VideoError, match=r"plain.mp4: ended before frame 30"):
        read_clip(plain, start=30, frames=5, size=32, info=info)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": -1}, "start must be a whole number of 0 or more, got -1"),
        ({"frames": 0}, "frames must be a whole number of 1 or more, got 0"),
        ({"stride": 0}, "stride must be a whole number of 1 or more, got 0"),
        ({"size": 0}, "size must be a positive side or a pair .* got 0"),
        ({"size": (4, 4, 4)}, "size must be a positive side or a pair"),
        ({"resize": "stretch"}, "resize must be one of .*squash.*, got 'stretch'"),
        ({"start": 4}, "holds 5 frames; a clip of 2 at stride 1 from frame 4 needs 6"),
    ],
)
def test_arguments_out_of_range(wrong, message):
    arguments = {"start": 0, "frames": 2, "info": VideoInfo(5, 25.0, 48, 64), **wrong}
    with pytest.raises(ValueError, match=message):
        read_clip("a.mp4", **arguments)


def test_fit_size_covers_the_clip():
    assert fit_size(640, 360, size=(128, 256), resize="short_side_crop") == (455, 256)
    assert fit_size(2, 3000, size=64, resize="short_side_crop") == (64, 96000)


def test_video_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert (str(error), VideoError(str(error)).reason) == ("a.mp4: is empty", "a.mp4: is empty")
