# SPDX-License-Identifier: Apache-2.0
"""Damaged videos: what is refused, what is kept with `on_damage="keep"`, and what is printed."""

import numpy as np
import pytest
import torch

from reco_lightning.data.clips.folder import VideoFolder
from reco_lightning.data.tokens.shards import TokenShards
from reco_lightning.data.video.clip import VideoError, probe, read_clip
from reco_lightning.pipelines.tokenize.run import tokenize_folder
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.data.trees import write_frames
from tests.helpers.processes import run_module
from tests.helpers.videos import bit_frames, bits_of, damage, encode

pytestmark = pytest.mark.third_party

FRAMES, HALF = 96, 48
CODINGS = {
    "h264.mp4": {"b_frames": 2},
    "h264.mkv": {"b_frames": 2, "options": {"crf": "8", "x264-params": "open-gop=1"}},
    "hevc.mkv": {"codec": "libx265", "b_frames": 2, "options": {"x265-params": "log-level=none:pools=1"}},
    "mpeg2.ts": {"codec": "mpeg2video", "b_frames": 2, "options": {"qmin": "1", "qmax": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 2, "options": {"qmin": "1", "qmax": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
}


def noisy(count):
    """Numbered frames under noise, so that their packets are large."""
    noise = np.random.default_rng(0).integers(-20, 20, (count, 48, 64, 1))
    return (bit_frames(count).astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def joined(tmp_path):
    """Two MPEG-TS files one after the other, as recorders leave them."""
    frames = bit_frames(FRAMES)
    parts = [encode(tmp_path / f"{n}.ts", frames[n : n + HALF], b_frames=2) for n in (0, HALF)]
    path = tmp_path / "videos" / "joined.ts"
    path.parent.mkdir()
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("kind", ["noise", "hole", "truncate"])
@pytest.mark.parametrize("name", CODINGS)
def test_the_frames_in_front_of_and_behind_the_damage_are_whole_and_without_a_hole(tmp_path, name, kind):
    frames = noisy(FRAMES)
    path = damage(encode(tmp_path / name, frames, **CODINGS[name]), kind)
    if (name, kind) == ("h264.mp4", "truncate"):
        with pytest.raises(VideoError, match="cannot be decoded"):  # its index is gone
            probe(path, on_damage="keep")
        return
    if (name, kind) != ("mpeg2.ts", "truncate"):  # sound as far as it goes, and says nothing of its length
        with pytest.raises(VideoError, match=r"is damaged|is cut off|cannot be decoded"):
            probe(path)
    info = probe(path, on_damage="keep")
    assert len(info.parts()) == (1 if kind == "truncate" else 2)
    assert info.frames >= FRAMES // 3
    for first, stop in info.parts():
        clip = read_clip(path, start=first, frames=stop - first, size=(48, 64), info=info)
        numbers = bits_of(clip)
        assert numbers == list(range(numbers[0], numbers[0] + stop - first))
        assert np.abs(clip.astype(int) - frames[numbers]).mean((1, 2, 3)).max() < 12  # no smear
    assert numbers[-1] == FRAMES - 1 or kind == "truncate"


def test_a_clip_over_the_damage_is_refused(joined):
    info = probe(joined, on_damage="keep")
    (_, border), _ = info.runs
    with pytest.raises(VideoError, match=rf"frames {border - 1} to {border} do not lie in one of 0 to {border - 1}, "):
        read_clip(joined, start=border - 1, frames=2, info=info)


def test_a_folder_keeps_the_sound_parts_and_says_how_many_clips(joined, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ask = {"frames": 8, "size": (48, 64)}
    encode(joined.with_name("whole.mp4"), bit_frames(16))
    with pytest.warns(UserWarning, match=r"1 of 2 videos .* cannot be used:\n  joined.ts: is damaged or cut off after"):
        assert len(VideoFolder(joined.parent, **ask)) == 2
    told = r"1 video\(s\) .* are damaged; .*\n  joined.ts: is damaged .* frame \d+; 11 clip\(s\) of 2 sound part\(s\)"
    with pytest.warns(UserWarning, match=told):
        folder = VideoFolder(joined.parent, **ask, on_damage="keep")
    shown = [bits_of(item["video"].numpy().astype(float)) for item in (folder[index] for index in range(len(folder)))]
    assert all(numbers == list(range(numbers[0], numbers[0] + 8)) for numbers in shown)
    assert {number for numbers in shown[:-2] for number in numbers} >= {*range(40), *range(HALF, FRAMES)}
    with pytest.warns(UserWarning, match=told):  # from the cache
        again = VideoFolder(joined.parent, **ask, on_damage="keep")
    assert again.infos == folder.infos
    with pytest.warns(UserWarning, match=r"1 of 2 videos .* cannot be used"):
        assert len(VideoFolder(joined.parent, **ask)) == 2
    with pytest.raises(VideoError, match=r"is too short: it holds 4\d frames without damage \(is damaged or cut off"):
        VideoFolder(joined.parent, frames=60, on_damage="keep", cache=False)


def test_tokens_of_the_sound_parts(joined, tmp_path):
    torch.manual_seed(0)
    options = {
        "tokenizer": VQVAE(codebook_size=32, width=8),
        "frames": 9,
        "size": 48,
        "device": "cpu",
        "num_workers": 0,
    }
    with pytest.warns(UserWarning, match=r"1 video\(s\) .* are damaged"):
        path = tokenize_folder(
            videos=str(joined.parent), output=str(tmp_path / "tokens"), on_damage="keep", progress=False, **options
        )
    starts = [TokenShards(path).source(index).start for index in range(len(TokenShards(path)))]
    (_, border), _ = probe(joined, on_damage="keep").runs
    assert [start for start in starts if start >= border] == list(range(border, border + 5 * 9, 9))


def test_a_folder_of_frames_is_kept_around_a_damaged_one(tmp_path):
    folder = write_frames(tmp_path / "a", bit_frames(20))
    (folder / "13.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(VideoError, match=r"13.png"):
        probe(folder)
    info = probe(folder, on_damage="keep")
    assert (info.frames, info.runs) == (20, ((0, 12), (13, 20)))
    assert bits_of(read_clip(folder, start=13, frames=7, size=(48, 64), info=info)) == list(range(13, 20))
    with pytest.raises(VideoError, match="frames 11 to 13 do not lie in one of 0 to 11, 13 to 19"):
        read_clip(folder, start=11, frames=3, info=info)


def test_nothing_is_printed_but_one_warning(joined):
    """By libav, decord or us: in a process of its own, with all that it writes."""
    damage(encode(joined.with_name("b.mp4"), noisy(40), b_frames=2), "noise")
    encode(joined.with_name("c.ts"), bit_frames(40), b_frames=3)  # decord: co located POCs unavailable
    script = joined.parent.parent / "read.py"
    script.write_text(
        "import warnings, sys\n"
        "warnings.simplefilter('always')\n"
        "from reco_lightning.data.clips.folder import VideoFolder\n"
        "for on_damage in ('skip', 'keep'):\n"
        f"    folder = VideoFolder({str(joined.parent)!r}, frames=4, size=32, cache=False, on_damage=on_damage)\n"
        "    [folder[index] for index in range(len(folder))]\n"
    )
    lines = run_module(script).splitlines()
    said = [line.strip() for line in lines if "warn" not in line.partition(":")[0]]
    assert sum(line.startswith("joined.ts:") for line in said) == 2
    assert sum(line.startswith("b.mp4:") for line in said) == 2
    assert len(lines) <= 14, "\n".join(lines)
