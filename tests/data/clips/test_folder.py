# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reco_lightning.data.clips.folder import Clip, VideoFolder
from reco_lightning.data.video import scan as video_scan
from reco_lightning.data.video.clip import VideoError
from reco_lightning.data.video.scan import cache_file, find_videos
from tests.helpers.videos import damage, encode, encode_sound, grey_frames, numbers_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two classes of sound files, made once and copied for every test that changes them."""
    root = tmp_path_factory.mktemp("made")
    encode(root / "cats" / "a.mp4", grey_frames(12))
    encode(root / "cats" / "deep" / "er" / "ß b.MKV", grey_frames(8))
    encode(root / "dogs" / "c.mp4", grey_frames(9))
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "clips")


def spoil(root):
    """Adds one file of every bad kind."""
    for kind in ("noise", "hole", "truncate", "empty", "text"):
        damage(encode(root / "bad" / f"{kind}.mp4", grey_frames(30)), kind)
    encode_sound(root / "bad" / "sound.mp4")
    encode(root / "dogs" / "short.mp4", grey_frames(3))


def test_clips_lie_end_to_end_in_sorted_order(root):
    folder = VideoFolder(root, frames=4, size=32)
    assert folder.classes == ["cats", "dogs"]
    assert [(os.path.relpath(c.path, root), c.start, c.label) for c in folder.clips] == [
        (os.path.join("cats", "a.mp4"), 0, 0),
        (os.path.join("cats", "a.mp4"), 4, 0),
        (os.path.join("cats", "a.mp4"), 8, 0),
        (os.path.join("cats", "deep", "er", "ß b.MKV"), 0, 0),
        (os.path.join("cats", "deep", "er", "ß b.MKV"), 4, 0),
        (os.path.join("dogs", "c.mp4"), 0, 1),
        (os.path.join("dogs", "c.mp4"), 4, 1),
    ]
    assert folder.skipped == []
    item = folder[6]
    assert item["video"].dtype == torch.uint8
    assert item["video"].shape == (4, 32, 32, 3)
    assert numbers_of(item["video"].numpy().astype(float)) == [4, 5, 6, 7]
    assert (item["label"].dtype, item["label"].shape, int(item["label"]), item["index"]) == (torch.int64, (), 1, 6)
    assert folder[-1]["index"] == 6
    with pytest.raises(IndexError, match="index must lie below 7"):
        folder[7]


def test_stride_and_clip_step_place_the_clips(root):
    folder = VideoFolder(root, frames=3, stride=2, clip_step=3, size=32)
    assert [clip.start for clip in folder.clips if clip.path.endswith("a.mp4")] == [0, 3, 6]
    assert numbers_of(folder[2]["video"].numpy().astype(float)) == [6, 8, 10]


def test_files_in_the_root_are_a_class_of_their_own(root):
    (root / "cats" / "a.mp4").rename(root / "a.mp4")
    assert VideoFolder(root, frames=4, size=32).classes == [".", "cats", "dogs"]
    flat = VideoFolder(root / "dogs", frames=4, size=32)
    assert (flat.classes, {clip.label for clip in flat.clips}) == (["."], {0})


def test_unusable_files_are_named_in_one_warning_and_left_out(root):
    spoil(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = VideoFolder(root, frames=4, size=32)
    messages = [str(entry.message) for entry in caught if "cannot be used" in str(entry.message)]
    assert len(messages) == 1
    assert f"7 of 10 videos in {root} cannot be used" in messages[0]
    bad = "empty", "hole", "noise", "sound", "text", "truncate"
    assert [os.path.relpath(path, root) for path, _ in folder.skipped] == [
        *(os.path.join("bad", f"{name}.mp4") for name in bad),
        os.path.join("dogs", "short.mp4"),
    ]
    for path, reason in folder.skipped:
        assert f"{os.path.relpath(path, root)}: {reason}" in messages[0]
    assert folder.skipped[-1][1] == "is too short: it holds 3 frames, a clip spans 4"
    assert folder.classes == ["bad", "cats", "dogs"]  # labels do not depend on damage
    assert len(folder) == 7
    assert [folder[index]["index"] for index in range(7)] == list(range(7))


def test_on_error_raise_names_them_all(root):
    spoil(root)
    with pytest.raises(VideoError, match=r"(?s)7 of 10 videos .* cannot be used:.*empty.mp4: is empty.*short.mp4"):
        VideoFolder(root, frames=4, size=32, on_error="raise")


def test_a_folder_without_a_usable_video_is_an_error(tmp_path, root):
    with pytest.raises(ValueError, match=r"root must be a folder of videos, got .*: there is nothing of that name"):
        VideoFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"root must be a folder of videos, got .*: there is a file of that name"):
        VideoFolder(root / "dogs" / "c.mp4")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"root must hold videos, got .*\.mp4.*pass extensions="):
        VideoFolder(tmp_path / "notes")
    with pytest.raises(VideoError, match=r"3 of 3 videos .* cannot be used"):
        VideoFolder(root, frames=100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "frames must be a whole number of 1 or more, got 0"),
        ({"stride": 0}, "stride must be a whole number of 1 or more, got 0"),
        ({"clip_step": 0}, "clip_step must be a whole number of 1 or more or None, got 0"),
        ({"size": -1}, "size must be a positive side"),
        ({"resize": "stretch"}, "resize must be one of"),
        ({"on_error": "ignore"}, "on_error must be one of .* got 'ignore'"),
        ({"extensions": ".mp4"}, "extensions must be a list of endings"),
        ({"extensions": ["mp4"]}, "extensions must be a list of endings"),
    ],
)
def test_arguments_out_of_range(root, wrong, message):
    with pytest.raises(ValueError, match=message):
        VideoFolder(root, **wrong)


def test_listing_follows_links_once_and_passes_hidden_files_over(root, tmp_path):
    (root / "birds").symlink_to(shutil.copytree(root / "dogs", tmp_path / "elsewhere"), target_is_directory=True)
    (root / "dogs" / "loop").symlink_to(root, target_is_directory=True)
    (root / "dogs" / "._c.mp4").touch()
    shutil.copytree(root / "cats", root / ".thumbnails")
    found = [name.replace(os.sep, "/") for name in find_videos(root)]
    assert found == ["birds/c.mp4", "cats/a.mp4", "cats/deep/er/ß b.MKV", "dogs/c.mp4"]


def test_a_second_scan_probes_only_what_is_new_or_changed_or_was_broken(root, monkeypatch):
    damage(encode(root / "dogs" / "d.mp4", grey_frames(12)), "noise")
    with pytest.warns(UserWarning, match="1 of 4"):
        first = VideoFolder(root, frames=4, size=32)
    probed = []
    honest = video_scan.probe
    monkeypatch.setattr(
        video_scan, "probe", lambda path, **how: probed.append(os.path.basename(path)) or honest(path, **how)
    )
    encode(root / "dogs" / "c.mp4", grey_frames(30))
    encode(root / "dogs" / "e.mp4", grey_frames(5))
    with pytest.warns(UserWarning, match="1 of 5"):
        second = VideoFolder(root, frames=4, size=32)
    assert sorted(probed) == ["c.mp4", "d.mp4", "e.mp4"]
    assert second.infos[str(root / "cats" / "a.mp4")] == first.infos[str(root / "cats" / "a.mp4")]
    assert second.infos[str(root / "dogs" / "c.mp4")].frames == 30
    probed.clear()
    with pytest.warns(UserWarning, match="1 of 5"):
        VideoFolder(root, frames=4, size=32, cache=False)
    assert len(probed) == 5


@pytest.mark.parametrize("content", ["no arrays", "older", "others"])
def test_a_cache_that_cannot_be_read_is_replaced(root, content):
    path = cache_file(root)
    path.parent.mkdir(parents=True)
    if content == "no arrays":
        path.write_text("{}")
    else:
        written = b'{"made_by": "an older version", "files": {}}' if content == "older" else b"[]"
        np.savez(path, content=np.frombuffer(written, np.uint8), prints=np.empty((0, 48), np.uint8), times=np.empty(0))
    first = VideoFolder(root, frames=4, size=32)
    with np.load(path) as arrays:
        assert b"a.mp4" in arrays["content"].tobytes()
        assert len(arrays["prints"]) == sum(info.frames for info in first.infos.values())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert VideoFolder(root, frames=4, size=32).infos == first.infos


def test_a_cache_that_cannot_be_written_stops_nothing(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(VideoFolder(root, frames=4, size=32)) == 7


def test_a_file_that_goes_bad_later_is_named_once_and_stood_in_for(root):
    folder = VideoFolder(root, frames=4, size=32)
    damage(root / "cats" / "a.mp4", "empty")
    with pytest.warns(UserWarning, match=r"a\.mp4: .*It was sound when scanned") as caught:
        served = [folder[index]["index"] for index in range(7)]
    assert len(caught) == 1
    assert served == [3, 3, 3, 3, 4, 5, 6]
    strict = VideoFolder(root / "dogs", frames=4, size=32, on_error="raise")
    damage(root / "dogs" / "c.mp4", "text")
    with pytest.raises(VideoError, match=r"c\.mp4: cannot be decoded"):
        strict[0]
    with pytest.warns(UserWarning, match="sound when scanned"):
        numbers = {folder[index]["index"] for index in range(7)}
    assert numbers == {3, 4}
    damage(root / "cats" / "deep" / "er" / "ß b.MKV", "empty")
    with (
        pytest.warns(UserWarning, match="sound when scanned"),
        pytest.raises(VideoError, match="none of its videos can be read any more"),
    ):
        folder[0]


def test_select_keeps_stand_ins_among_the_chosen(root):
    folder = VideoFolder(root, frames=4, size=32).select([6, 0, 1])
    assert [clip.start for clip in folder.clips] == [4, 0, 4]
    assert isinstance(folder.clips[0], Clip)
    assert int(folder[0]["label"]) == 1
    damage(root / "cats" / "a.mp4", "empty")
    with pytest.warns(UserWarning, match="sound when scanned"):
        assert [folder[index]["index"] for index in range(3)] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_what_the_main_process_reads(root, method, workers):
    spoil(root)
    with pytest.warns(UserWarning, match="7 of 10"):
        folder = VideoFolder(root, frames=4, size=32)
    own = torch.stack([folder[index]["video"] for index in range(7)])  # readers are opened before the fork too
    batches = list(DataLoader(folder, 3, num_workers=workers, multiprocessing_context=method, timeout=120))
    assert torch.equal(torch.cat([batch["video"] for batch in batches]), own)
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [1, 1, 1, 1, 1, 2, 2]


def test_workers_go_on_when_a_file_goes_bad(root):
    folder = VideoFolder(root, frames=4, size=32)
    damage(root / "cats" / "a.mp4", "noise")
    loader = DataLoader(folder, 3, num_workers=2, multiprocessing_context="fork", timeout=120)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inherited by forked workers, which warn
        assert torch.cat([batch["index"] for batch in loader]).tolist() == [3, 3, 3, 3, 4, 5, 6]
