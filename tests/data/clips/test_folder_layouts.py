# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reco_lightning.data.clips.folder import Clip, VideoFolder
from reco_lightning.data.clips.module import VideoDataModule, split_clips
from reco_lightning.data.video import scan as video_scan
from reco_lightning.data.video.clip import VideoError
from tests.data.trees import pack, pixels, write_frames
from tests.helpers.videos import encode, grey_frames, numbers_of


def clips_of(folder):
    return [(os.path.relpath(clip.path, folder.root), *clip[1:]) for clip in folder.clips]


@pytest.fixture
def frames(tmp_path):
    """Two classes of frame folders; the file names of one sort wrongly as text."""
    root = tmp_path / "frames"
    write_frames(root / "cats" / "a", pixels(12, seed=1), name="x_{}.png")
    write_frames(root / "dogs" / "b", pixels(5, seed=2))
    write_frames(root / "dogs" / "short", pixels(3, seed=3))
    return root


def open_frames(root, **options):
    with pytest.warns(
        UserWarning, match=r"(?s)1 of 3 videos .*dogs/short: is too short: it holds 3 frames, a clip spans 5"
    ):
        return VideoFolder(root, frames=3, stride=2, size=(24, 32), layout="frames", **options)


def test_frame_folders_are_cut_into_clips_of_the_pixels_written(frames):
    folder = open_frames(frames, clip_step=4)
    assert folder.classes == ["cats", "dogs"]
    assert clips_of(folder) == [("cats/a", 0, 0, None), ("cats/a", 4, 0, None), ("dogs/b", 0, 1, None)]
    assert np.array_equal(folder[1]["video"], pixels(12, seed=1)[4:9:2])
    assert np.array_equal(folder[2]["video"], pixels(5, seed=2)[::2])
    assert int(folder[2]["label"]) == 1


def test_a_zip_file_and_a_folder_give_the_same_clips(frames, tmp_path):
    folder, packed = open_frames(frames), open_frames(pack(frames, tmp_path / "frames.zip"))
    assert clips_of(folder) == clips_of(packed)
    assert folder.classes == packed.classes
    own = torch.stack([folder[index]["video"] for index in range(len(folder))])
    for workers in (0, 2):  # forked ones inherit the table of contents
        loader = DataLoader(
            packed, 2, num_workers=workers, multiprocessing_context="fork" if workers else None, timeout=60 * workers
        )
        assert torch.equal(torch.cat([batch["video"] for batch in loader]), own)


def test_frame_folders_are_remembered_until_they_change(frames, monkeypatch):
    open_frames(frames)
    probed = []
    honest = video_scan.probe
    monkeypatch.setattr(
        video_scan, "probe", lambda path, **how: probed.append(os.path.basename(path)) or honest(path, **how)
    )
    open_frames(frames)
    assert probed == []
    write_frames(frames / "dogs" / "b", pixels(1, seed=4), first=6)
    assert open_frames(frames).infos[str(frames / "dogs" / "b")].frames == 6
    assert probed == ["b"]


def test_a_frame_that_goes_bad_later_is_stood_in_for(frames):
    folder = open_frames(frames)
    (frames / "cats" / "a" / "x_1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"cats/a: x_1\.png is empty \(0 bytes\)\. It was sound when scanned"):
        assert folder[0]["index"] == 2
    with pytest.raises(VideoError, match="x_1"):
        folder.read(0)


def manifest(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_parts_of_a_video_in_seconds_with_labels_and_captions(tmp_path):
    encode(tmp_path / "a.mp4", grey_frames(30))  # 25 frames a second
    write_frames(tmp_path / "b", pixels(9))
    index = manifest(
        tmp_path / "index.jsonl",
        {"path": "a.mp4", "label": "x", "caption": ["one", "two"], "start": 0.4, "end": 0.96},  # frames 10 to 23
        {"path": "a.mp4", "label": "w", "caption": "three", "start": 1.0},  # frames 25 to 29
        {"path": "a.mp4", "label": "w", "end": 0.17},  # frames 0 to 4
        {"path": "a.mp4", "label": "w", "end": 0.15},  # frames 0 to 3
        {"path": "b", "label": "x", "start": 1.0},
        {"path": "gone.mp4", "label": "x"},
    )
    with pytest.warns(UserWarning, match="3 of 6 videos") as caught:
        folder = VideoFolder(tmp_path, frames=5, size=32, clip_step=4, layout="manifest", index=index)
    assert clips_of(folder) == [
        ("a.mp4", 10, 1, "one"),
        ("a.mp4", 14, 1, "two"),
        ("a.mp4", 18, 1, "one"),
        ("a.mp4", 25, 0, "three"),
        ("a.mp4", 0, 0, None),
    ]
    assert numbers_of(folder[3]["video"].numpy().astype(float)) == [25, 26, 27, 28, 29]
    assert folder.classes == ["w", "x"]
    message = str(caught[0].message)
    assert "a.mp4: is too short: it holds 4 frames from second 0 to 0.15, a clip spans 5" in message
    assert "b: has no frame rate, so that start and end in seconds mean nothing" in message
    assert "gone.mp4: is not a file" in message
    assert list(folder.infos) == [str(tmp_path / "a.mp4")]


def test_a_part_that_begins_or_ends_beyond_the_video(tmp_path):
    encode(tmp_path / "a.mp4", grey_frames(10))
    index = manifest(tmp_path / "i", {"path": "a.mp4", "start": 9.0}, {"path": "a.mp4", "start": 0.2, "end": 99})
    with pytest.warns(UserWarning, match="it holds 0 frames from second 9 to the end, a clip spans 5"):
        folder = VideoFolder(tmp_path, frames=5, size=32, layout="manifest", index=index)
    assert clips_of(folder) == [("a.mp4", 5, 0, None)]


@pytest.fixture
def ucf101(tmp_path):
    for group in range(1, 6):
        for name in ("Archery", "Biking"):
            for clip in (1, 2):
                path = tmp_path / "UCF-101" / name / f"v_{name}_g{group:02d}_c{clip:02d}.mp4"
                if group + clip == 2 and name == "Archery":
                    encode(path, grey_frames(6))
                    first = path
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(first, path)
    return tmp_path / "UCF-101"


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_on_ucf101_is_by_group(ucf101, seed):
    data = VideoDataModule(str(ucf101), frames=3, size=32, layout="ucf101", val_fraction=0.4, seed=seed)
    data.setup("fit")
    groups = [
        {os.path.basename(clip.path).split("_")[2] for clip in part.clips} for part in (data.train_set, data.val_set)
    ]
    assert ([len(part) for part in groups], groups[0] & groups[1]) == ([3, 2], set())
    assert (len(data.train_set), len(data.val_set)) == (3 * 8, 2 * 8)
    assert [{clip.label for clip in part.clips} for part in (data.train_set, data.val_set)] == [{0, 1}, {0, 1}]


def test_the_data_module_takes_split_and_index(ucf101, tmp_path):
    (tmp_path / "classInd.txt").write_text("1 Archery\n2 Biking")
    (tmp_path / "testlist01.txt").write_text("Biking/v_Biking_g02_c01.mp4\nArchery/v_Archery_g02_c01.mp4")
    data = VideoDataModule(
        str(ucf101),
        frames=3,
        size=32,
        layout="ucf101",
        split="test",
        index=str(tmp_path / "testlist01.txt"),
        val_fraction=0,
    )
    data.setup("fit")
    assert [batch["label"].tolist() for batch in data.predict_dataloader()] == [[1, 1, 0, 0]]
    data = VideoDataModule(str(ucf101), frames=3, size=32, layout="sky", split="train")
    with pytest.raises(ValueError, match=r"(?s)layout='sky' expects.*It looks like layout='ucf101'"):
        data.prepare_data()


def test_one_group_cannot_be_parted():
    clips = [Clip("a", 0, 0), Clip("b", 0, 0)]
    with pytest.raises(
        ValueError, match=r"val_fraction must be 0 where all files are of one group, .*\(g01\), got 0\.5"
    ):
        split_clips(clips, val_fraction=0.5, span=3, groups={"a": "g01", "b": "g01"})
    assert split_clips(clips, val_fraction=0.5, span=3, groups={"a": "g01"}) == ([0], [1])


def test_parts_of_a_single_file_are_split_by_time_in_whatever_order_they_are_named():
    clips = [Clip("a", start, 0) for start in (20, 24, 0, 4, 8, 22)]
    assert split_clips(clips, val_fraction=0.3, span=4) == ([2, 3, 4], [1, 5])
