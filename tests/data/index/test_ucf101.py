# SPDX-License-Identifier: Apache-2.0
import pytest

from reco_lightning.data.index.layouts import open_index
from reco_lightning.data.index.ucf101 import read_classes
from tests.data.trees import touch

# the official numbers do not follow the code points: Hammering is 1, HammerThrow 2
CLASSES = "1 Hammering\n2 HammerThrow\n3 HandstandPushups\n"
VIDEOS = (
    "HammerThrow/v_HammerThrow_g01_c01.avi",
    "HammerThrow/v_HammerThrow_g08_c01.avi",
    "Hammering/v_Hammering_g08_c01.avi",
    "Hammering/v_Hammering_g09_c01.avi",
    "HandstandPushups/v_HandStandPushups_g01_c01.avi",
)


@pytest.fixture
def root(tmp_path):
    return touch(tmp_path / "UCF-101", *VIDEOS)


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "ucfTrainTestlist"
    folder.mkdir()
    (folder / "classInd.txt").write_text(CLASSES)
    (folder / "trainlist01.txt").write_text(f"{VIDEOS[1]} 2\n{VIDEOS[3]} 1\r\n\n{VIDEOS[2]} 1\n")
    (folder / "testlist01.txt").write_text(f"{VIDEOS[4]}\n{VIDEOS[0]}\n")
    return folder


def found(index):
    return [(video.path, video.label) for video in index.videos]


def test_the_official_lists(root, lists):
    train = open_index(root, layout="ucf101", split="train", index=lists / "trainlist01.txt")
    assert found(train) == [(VIDEOS[1], 1), (VIDEOS[3], 0), (VIDEOS[2], 0)]
    assert train.classes == ("Hammering", "HammerThrow", "HandstandPushups")
    assert train.groups == {VIDEOS[1]: "g08", VIDEOS[2]: "g08", VIDEOS[3]: "g09"}
    test = open_index(root, layout="ucf101", index=lists / "testlist01.txt")
    assert found(test) == [(VIDEOS[4], 2), (VIDEOS[0], 1)]
    assert test.classes == train.classes


def test_the_lists_hold_for_converted_files_too(tmp_path, lists):
    root = touch(tmp_path / "mp4", *(name.replace(".avi", ".mp4") for name in VIDEOS))
    test = open_index(root, layout="ucf101", index=lists / "testlist01.txt")
    assert found(test) == [(VIDEOS[4].replace(".avi", ".mp4"), 2), (VIDEOS[0].replace(".avi", ".mp4"), 1)]


def test_class_folders_have_the_official_labels_without_the_file(root):
    index = open_index(root, layout="ucf101")
    assert index.classes == ("Hammering", "HammerThrow", "HandstandPushups")
    assert found(index) == list(zip(VIDEOS, (1, 1, 0, 0, 2), strict=True))
    (root / "classInd.txt").write_text("1 HandstandPushups\n2 HammerThrow\n3 Hammering\n4 YoYo")
    index = open_index(root, layout="ucf101")
    assert ([video.label for video in index.videos], len(index.classes)) == ([1, 1, 2, 2, 0], 4)


def test_folders_of_splits_and_a_flat_folder(tmp_path):
    root = touch(
        tmp_path / "tree", *(f"train/{name}" for name in VIDEOS[1:4]), *(f"test/{name}" for name in VIDEOS[:1])
    )
    assert found(open_index(root, layout="ucf101", split="test")) == [(f"test/{VIDEOS[0]}", 1)]
    assert found(open_index(root, layout="ucf101", split="train")) == [
        (f"train/{VIDEOS[1]}", 1),
        (f"train/{VIDEOS[2]}", 0),
        (f"train/{VIDEOS[3]}", 0),
    ]
    assert len(open_index(root, layout="ucf101").videos) == 4
    with pytest.raises(
        ValueError, match=r"split must be a folder below root, or index a list such as vallist01\.txt, got"
    ):
        open_index(root, layout="ucf101", split="val")
    flat = open_index(touch(tmp_path / "flat", *(name.split("/")[1] for name in VIDEOS)), layout="ucf101")
    assert flat.classes == ("Hammering", "HammerThrow", "HandStandPushups")
    assert [video.label for video in flat.videos] == [1, 1, 0, 0, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"{VIDEOS[0]} 1",
            r"index must number the classes from 1 as classInd\.txt does \(Hammering is 1\), got .*line 1",
        ),
        (f"{VIDEOS[2]} 0", r"index must number the classes from 1 .*, got 'Hammering/v_Hammering_g08_c01\.avi 0'"),
        ("x/v_HammerThrow_g01_c01.avi 2", r"index must name videos relative to root"),
        (
            f"{VIDEOS[0]} 2\nHammering/a.avi 1",
            r"index must name videos as v_Archery_g08_c01\.avi, got 'Hammering/a\.avi'",
        ),
        (
            f"{VIDEOS[0]}\nYoYo/v_YoYo_g01_c01.avi",
            r"classInd\.txt must hold the classes of all videos, got none for YoYo/v",
        ),
    ],
)
def test_lists_that_are_wrong(root, lists, line, message):
    (lists / "trainlist01.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        open_index(root, layout="ucf101", index=lists / "trainlist01.txt")


def test_arguments_that_do_not_fit(root, lists):
    with pytest.raises(
        ValueError, match=r"split must fit index, whose name is to begin with it, got 'test' and .*train"
    ):
        open_index(root, layout="ucf101", split="test", index=lists / "trainlist01.txt")
    (lists / "classInd.txt").write_text("1 Hammering\n3 HammerThrow")
    with pytest.raises(ValueError, match=r"classInd\.txt must hold lines such as '1 ApplyEyeMakeup', numbered from 1"):
        read_classes(lists / "classInd.txt")


def test_other_videos(tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)named as v_Archery_g08_c01\.avi, got cats/a\.mp4 in it.*layout='folders'\."
    ):
        open_index(touch(tmp_path, "cats/a.mp4"), layout="ucf101")
