# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from reco_lightning.data.video.frame_folders import find_frame_folders, folder_parts, read_frame_labels, walk
from tests.data.trees import pack, touch

NAMES = ("a/1.png", "b/c/2.jpg", "b/c/d/3.PNG", "b/notes.txt", ".hidden/1.png", "e/.1.png", "__MACOSX/a/1.png")


def test_folders_and_zip_files_are_walked_alike(tmp_path):
    root = touch(tmp_path / "tree", *NAMES)
    (root / "__MACOSX" / "a" / "1.png").unlink()
    assert list(walk(root)) == [("a", ["1.png"]), ("b", ["notes.txt"]), ("b/c", ["2.jpg"]), ("b/c/d", ["3.PNG"])]
    assert find_frame_folders(root) == ["a", "b/c", "b/c/d"]
    touch(root, *NAMES)
    archive = pack(root, tmp_path / "tree.zip")
    assert find_frame_folders(archive) == ["a", "b/c", "b/c/d"]
    assert find_frame_folders(archive / "b") == ["c", "c/d"]
    (tmp_path / "above").mkdir()
    archive.rename(tmp_path / "above" / "tree.zip")
    assert find_frame_folders(tmp_path / "above") == ["tree.zip/a", "tree.zip/b/c", "tree.zip/b/c/d"]


def test_linked_folders_are_followed_once(tmp_path):
    root = touch(tmp_path / "tree", "a/1.png")
    (root / "b").symlink_to(touch(tmp_path / "elsewhere", "2.png"), target_is_directory=True)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    assert find_frame_folders(root) == ["a", "b"]


@pytest.mark.parametrize(
    ("root", "name", "parts"),
    [
        ("clips", "cats/first", ("cats", "first")),
        ("clips", "cats.zip/first", ("cats", "first")),
        ("clips", "cats.zip/cats/first", ("cats", "first")),
        ("clips", "cats.ZIP", ("cats",)),
        ("cats.zip", "cats/first", ("first",)),
        ("cats.zip", "dogs/first", ("dogs", "first")),
        ("clips", ".", ()),
    ],
)
def test_zip_files_count_as_folders(root, name, parts):
    assert folder_parts(root, name) == parts


@pytest.mark.parametrize("packed", [False, True])
def test_labels_beside_the_frames(tmp_path, packed):
    root = touch(tmp_path / "tree", "a/1.png", "a/2.png", "b/1.png")
    labels = [["a/1.png", 3], ["a/2.png", 3], ["b", 0]]
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    (root / "b" / "dataset.json").write_text("not read: it lies deeper")
    if packed:
        (root / "b" / "dataset.json").unlink()
        root = pack(root, tmp_path / "tree.zip", below="tree").parent
        expected = {"tree.zip/tree/a": 3, "tree.zip/tree/b": 0}
        touch(root, "other/1.png")
        for path in sorted((root / "tree").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    else:
        expected = {"a": 3, "b": 0}
    assert read_frame_labels(root) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", r"dataset\.json must be \{\"labels\": .*, got JSONDecodeError"),
        ("[]", r"dataset\.json must be .*, got TypeError"),
        (
            '{"labels": [["a/1.png", [0, 1]]]}',
            r"must give labels that are numbers or names, got \[0, 1\] for 'a/1\.png'",
        ),
        ('{"labels": {"a/1.png": 0, "a/2.png": 1}}', "must give all frames of a video one label, got 0 and 1 for 'a'"),
    ],
)
def test_labels_that_are_wrong_are_named(tmp_path, content, message):
    touch(tmp_path, "a/1.png").joinpath("dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_frame_labels(tmp_path)


def test_no_labels(tmp_path):
    assert read_frame_labels(touch(tmp_path, "a/1.png")) == {}
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert read_frame_labels(tmp_path) == {}
