# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from reco_lightning.data.index.clip_index import (
    IndexedVideo,
    class_places,
    index_frame_folders,
    index_list,
    index_manifest,
    index_video_folders,
)
from tests.data.trees import pack, touch


def lines(path, *entries):
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries), "utf-8")
    return path


def found(index):
    """Path and name of the class of every video."""
    return [(video.path, index.classes[video.label]) for video in index.videos]


def test_class_folders_and_splits(tmp_path):
    touch(tmp_path, "train/dogs/b.mp4", "train/cats/deep/a.mp4", "test/cats/c.mp4", "test/apes/d.mp4", "e.mp4")
    assert found(index_video_folders(tmp_path)) == [
        ("e.mp4", "."),
        ("test/apes/d.mp4", "test"),
        ("test/cats/c.mp4", "test"),
        ("train/cats/deep/a.mp4", "train"),
        ("train/dogs/b.mp4", "train"),
    ]
    train = index_video_folders(tmp_path, split="train")
    assert found(train) == [("train/cats/deep/a.mp4", "cats"), ("train/dogs/b.mp4", "dogs")]
    assert train.classes == index_video_folders(tmp_path, split="test").classes == ("apes", "cats", "dogs")
    with pytest.raises(ValueError, match=r"split must be a folder below root, one of \['test', 'train'\], got 'val'\n"):
        index_video_folders(tmp_path, split="val")


FRAMES = ("cats/a/1.png", "cats/a/2.png", "dogs/b/1.png", "c/1.png")


@pytest.mark.parametrize("packed", [False, True])
def test_frame_folders(tmp_path, packed):
    root = touch(tmp_path / "tree", *FRAMES)
    if packed:
        root = pack(root, tmp_path / "tree.zip", below="tree")
    prefix = "tree/" if packed else ""
    index = index_frame_folders(root)
    assert found(index) == [(f"{prefix}c", "."), (f"{prefix}cats/a", "cats"), (f"{prefix}dogs/b", "dogs")]
    assert found(index_frame_folders(root, split="cats")) == [(f"{prefix}cats/a", ".")]
    with pytest.raises(ValueError, match=r"split must be a folder below root, one of \['cats', 'dogs'\], got 'train'"):
        index_frame_folders(root, split="train")


def test_a_zip_file_per_class_or_per_split(tmp_path):
    pack(touch(tmp_path / "one", "a/1.png"), tmp_path / "root.zip")
    (tmp_path / "root").mkdir()
    for name in ("cats", "dogs"):
        pack(tmp_path / "one", tmp_path / "root" / f"{name}.zip")
    assert found(index_frame_folders(tmp_path / "root")) == [("cats.zip/a", "cats"), ("dogs.zip/a", "dogs")]
    assert found(index_frame_folders(tmp_path / "root", split="dogs")) == [("dogs.zip/a", ".")]


def test_labels_of_frame_folders(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png")
    lines(tmp_path / "dataset.json", {"labels": [["a/1.png", 2], ["b/1.png", 0]]})
    index = index_frame_folders(tmp_path)
    assert (found(index), index.classes) == ([("a", "2"), ("b", "0")], ("0", "1", "2"))
    touch(tmp_path, "c/1.png")
    with pytest.raises(ValueError, match=r"dataset\.json in .* must give every video a label, got none for 'c'"):
        index_frame_folders(tmp_path)


def test_a_list_takes_the_class_from_the_folder_above(tmp_path):
    touch(tmp_path, "x/cats/a.mp4", "x/dogs/b/1.png", "c.mp4", "x/cats/left_out.mp4")
    listed = lines(tmp_path / "list.txt", "x/dogs/b", "", "./x/cats/a.mp4", "c.mp4", f"{tmp_path}/x/cats/gone.mp4")
    index = index_list(tmp_path, listed)
    assert found(index) == [("x/dogs/b", "dogs"), ("x/cats/a.mp4", "cats"), ("c.mp4", "."), ("x/cats/gone.mp4", "cats")]
    lines(listed, "c.mp4", "./c.mp4")
    with pytest.raises(ValueError, match=r"index must name every video once, got 'c\.mp4' twice in .*list\.txt"):
        index_list(tmp_path, listed)
    lines(listed, "cats/a.mp4")
    with pytest.raises(
        ValueError, match=r"(?s)index must name videos relative to root, got .* with 'cats/a\.mp4', which"
    ):
        index_list(tmp_path, listed)
    lines(listed, "")
    with pytest.raises(ValueError, match=r"index must name videos, got .*list\.txt' \(it names none\)"):
        index_list(tmp_path, listed)


def test_a_list_of_folders_in_a_zip_file(tmp_path):
    root = pack(touch(tmp_path / "tree", *FRAMES), tmp_path / "tree.zip")
    assert found(index_list(root, lines(tmp_path / "list", "dogs/b", "cats/a"))) == [
        ("dogs/b", "dogs"),
        ("cats/a", "cats"),
    ]


def test_a_manifest_says_everything(tmp_path):
    touch(tmp_path, "a.mp4", "b/1.png")
    manifest = lines(
        tmp_path / "manifest.jsonl",
        {
            "path": "a.mp4",
            "label": "dogs",
            "caption": "Ein Hündchen.",
            "split": "train",
            "start": 1,
            "end": 2.5,
            "x": 0,
        },
        "",
        {"path": "./a.mp4", "label": "dogs", "caption": ["One.", "Two."], "split": "train", "start": 2.5},
        {"path": "b", "label": "cats", "split": "test"},
    )
    index = index_manifest(tmp_path, manifest)
    assert index.videos == (
        IndexedVideo("a.mp4", 1, ("Ein Hündchen.",), 1, 2.5),
        IndexedVideo("a.mp4", 1, ("One.", "Two."), 2.5, None),
        IndexedVideo("b", 0),
    )
    assert index.classes == index_manifest(tmp_path, manifest, split="test").classes == ("cats", "dogs")
    assert index_manifest(tmp_path, manifest, split="test").videos == index.videos[2:]
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\], which .* has, got 'val'"):
        index_manifest(tmp_path, manifest, split="val")
    plain = index_manifest(tmp_path, lines(manifest, {"path": "a.mp4"}))
    assert (plain.videos, plain.classes) == ((IndexedVideo("a.mp4"),), (".",))
    assert index_manifest(tmp_path, lines(manifest, {"path": "a.mp4", "label": 2})).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4", r"index must hold lines such as \{\"path\".*, got 'a\.mp4' \(.*line 2\)"),
        ('["a.mp4"]', r"index must hold lines such as .*line 2"),
        ({"file": "a.mp4"}, r"got None for 'path' \(.*line 2\)"),
        ({"path": "a.mp4", "label": 1.5}, r"got 1\.5 for 'label' \(.*line 2\)"),
        ({"path": "a.mp4", "caption": [1]}, r"got \[1\] for 'caption' \(.*line 2\)"),
        ({"path": "a.mp4", "split": 1}, r"got 1 for 'split' \(.*line 2\)"),
        ({"path": "a.mp4", "start": "1"}, r"got '1' for 'start' \(.*line 2\)"),
        ({"path": "a.mp4", "start": -1}, r"got -1 for 'start' \(.*line 2\)"),
        ({"path": "a.mp4", "start": 2, "end": 2}, r"got 2 for 'end' \(.*line 2\)"),
        ({"path": "a.mp4"}, r"label must be on all lines of .* or on none, got it on 1"),
        ({"path": "a.mp4", "label": 0}, r"labels must be all names or all numbers from 0 in .*, got 'cats' and 0"),
    ],
)
def test_lines_of_a_manifest_that_are_wrong_are_named(tmp_path, line, message):
    manifest = lines(touch(tmp_path, "a.mp4") / "manifest.jsonl", {"path": "a.mp4", "label": "cats"}, line)
    with pytest.raises(ValueError, match=message):
        index_manifest(tmp_path, manifest)


def test_a_manifest_of_other_videos(tmp_path):
    manifest = lines(touch(tmp_path, "b/a.mp4") / "manifest.jsonl", {"path": "a.mp4"})
    with pytest.raises(ValueError, match=r"(?s)index must name videos relative to root, .*layout='manifest' expects"):
        index_manifest(tmp_path, manifest)


def test_numbers_below_zero_are_no_labels():
    with pytest.raises(ValueError, match="labels must be all names or all numbers from 0 in here, got -1"):
        class_places([0, -1], source="here")
    with pytest.raises(ValueError, match="labels must be below 1000000 in here, got 1000000000; give names instead"):
        class_places([0, 10**9], source="here")
