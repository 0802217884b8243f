# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from reco_lightning.data.index.clip_index import IndexedVideo
from reco_lightning.data.index.layouts import open_index
from tests.data.trees import touch


def annotations(path, splits, sentences):
    videos = [
        {"video_id": name, "split": split, "category": 3, "url": "u", "start time": 137.7, "end time": 149.4, "id": 0}
        for name, split in splits.items()
    ]
    texts = [{"sen_id": number, "video_id": name, "caption": text} for number, (name, text) in enumerate(sentences)]
    path.write_text(json.dumps({"info": {"year": "2016"}, "videos": videos, "sentences": texts}))
    return path


@pytest.fixture
def root(tmp_path):
    return touch(tmp_path / "msrvtt", "TrainValVideo/video0.mp4", "TrainValVideo/video1.mp4", "TestVideo/video7010.mp4")


@pytest.fixture
def data(tmp_path):
    return annotations(
        tmp_path / "MSRVTT_data.json",
        {"video0": "train", "video1": "validate", "video2": "train", "video7010": "test"},
        [("video0", "a car"), ("video7010", "a man"), ("video0", "a fast car"), ("video2", "gone")],
    )


def test_the_annotations_by_split(root, data):
    train = open_index(root, layout="msrvtt", split="train", index=data)
    assert train.videos == (
        IndexedVideo("TrainValVideo/video0.mp4", 0, ("a car", "a fast car")),  # the times are not those of the files
        IndexedVideo("video2.mp4", 0, ("gone",)),  # missing: named after the scan
    )
    assert train.classes == (".",)
    assert [video.captions for video in open_index(root, layout="msrvtt", split="validate", index=data).videos] == [()]
    assert [video.path for video in open_index(root, layout="msrvtt", index=data).videos] == [
        "TrainValVideo/video0.mp4",
        "TrainValVideo/video1.mp4",
        "video2.mp4",
        "TestVideo/video7010.mp4",
    ]
    with pytest.raises(
        ValueError, match=r"split must be one of \['test', 'train', 'validate'\], which .* has, got 'val'"
    ):
        open_index(root, layout="msrvtt", split="val", index=data)


def test_the_1k_a_split(root, data, tmp_path):
    test = tmp_path / "MSRVTT_JSFUSION_test.csv"
    test.write_text('key,vid_key,video_id,sentence\nret0,msr7010,video7010,"a man, running"\n')
    assert open_index(root, layout="msrvtt", index=test).videos == (
        IndexedVideo("TestVideo/video7010.mp4", 0, ("a man, running",)),
    )
    train = tmp_path / "MSRVTT_train.9k.csv"
    train.write_text("video_id\nvideo7010\nvideo0\n")
    assert [video.captions for video in open_index(root, layout="msrvtt", index=train).videos] == [
        ("a man",),
        ("a car", "a fast car"),
    ]
    data.unlink()
    with pytest.raises(
        ValueError, match=r"index must have a column sentence, or one of MSRVTT_data\.json, .* beside it"
    ):
        open_index(root, layout="msrvtt", index=train)
    annotations(tmp_path / "train_val_videodatainfo.json", {"video0": "train"}, [("video0", "one")])
    annotations(tmp_path / "test_videodatainfo.json", {"video7010": "test"}, [("video7010", "two")])
    captions = [video.captions for video in open_index(root, layout="msrvtt", index=train).videos]
    assert captions == [("two",), ("one",)]
    with pytest.raises(
        ValueError, match="split must be left out with a CSV file, which is a split of its own, got 'train'"
    ):
        open_index(root, layout="msrvtt", split="train", index=train)
    train.write_text("name\nvideo0\n")
    with pytest.raises(ValueError, match=r"index must have a column video_id, got \['name'\] in .*csv"):
        open_index(root, layout="msrvtt", index=train)
    train.write_text('video_id\n"video0' + 2**17 * "\n")
    with pytest.raises(ValueError, match=r"index must be a CSV file, got '.*csv': field larger than field limit"):
        open_index(root, layout="msrvtt", index=train)


def test_what_does_not_fit(root, data, tmp_path):
    with pytest.raises(ValueError, match=r"index must be given for layout='msrvtt', got None\nlayout='msrvtt' expects"):
        open_index(root, layout="msrvtt")
    touch(root, "all/video0.mp4")
    with pytest.raises(
        ValueError, match=r"root must hold every video once, got TrainValVideo/video0\.mp4 and all/video0"
    ):
        open_index(root, layout="msrvtt", index=data)
    with pytest.raises(ValueError, match=r"(?s)index must name videos relative to root.*found in .*:\n  a\.mp4"):
        open_index(touch(tmp_path / "other", "a.mp4"), layout="msrvtt", index=data)
    data.write_text('{"videos": []}')
    with pytest.raises(ValueError, match=r"index must be JSON .*, or a CSV file, got .*MSRVTT_data\.json': KeyError"):
        open_index(root, layout="msrvtt", index=data)
