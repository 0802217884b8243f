# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from reco_lightning.data.index.layouts import open_index
from tests.data.trees import pack, touch


def paths(root, layout, split=None):
    index = open_index(root, layout=layout, split=split)
    assert index.classes == (".",)
    return [video.path for video in index.videos]


def test_faceforensics_as_videos(tmp_path):
    root = touch(tmp_path, "train/videos/b.avi", "train/videos/a.avi", "train/images/a/1.jpg", "val/videos/c.avi")
    assert paths(root, "ffs", "train") == ["train/videos/a.avi", "train/videos/b.avi"]
    assert paths(root / "train", "ffs") == ["videos/a.avi", "videos/b.avi"]
    assert paths(root / "train" / "videos", "ffs") == ["a.avi", "b.avi"]
    touch(root, "train/videos/d/1.jpg")
    with pytest.raises(
        ValueError, match=r"root must hold videos or frames, got both, as train/videos/a\.avi and train/vid"
    ):
        open_index(root, layout="ffs", split="train")


def test_faceforensics_as_frames(tmp_path):
    root = touch(tmp_path / "ffs", "b/1.jpg", "a/1.jpg")
    assert paths(root, "ffs") == ["a", "b"]
    assert paths(pack(root, tmp_path / "other.zip"), "ffs") == ["a", "b"]
    archive = pack(root, tmp_path / "ffs.zip", below="ffs")
    assert paths(archive, "ffs") == ["ffs/a", "ffs/b"]
    archive = pack(touch(tmp_path / "split", "train/a/1.jpg", "val/b/1.jpg"), tmp_path / "split.zip")
    assert paths(archive, "ffs", "train") == ["train/a"]


def test_skytimelapse(tmp_path):
    root = touch(
        tmp_path,
        "sky_train/x/x_1/x_frames_1.jpg",
        "sky_train/x/x_2/x_frames_2.jpg",
        "sky_test/y/y_1/y_frames_00000001.jpg",
    )
    assert paths(root, "sky", "train") == ["sky_train/x/x_1", "sky_train/x/x_2"]
    assert paths(root, "sky", "sky_test") == paths(root, "sky", "test") == ["sky_test/y/y_1"]
    assert len(paths(root, "sky")) == 3
    assert paths(root / "sky_train", "sky") == ["x/x_1", "x/x_2"]


def test_taichi(tmp_path):
    root = touch(tmp_path, "frames/train/b.mp4/0000001.png", "frames/train/a/1.png", "frames/test/c/1.png")
    assert paths(root, "taichi", "train") == ["frames/train/a", "frames/train/b.mp4"]
    assert paths(root / "frames", "taichi", "test") == ["test/c"]
    assert paths(root / "frames" / "test", "taichi") == ["c"]


def problem(root, layout, **options):
    with pytest.raises(ValueError, match=r"layout|root|index|split|zip") as caught:
        open_index(root, layout=layout, **options)
    return str(caught.value)


def test_a_wrong_layout_is_shown_what_was_expected_found_and_likely(tmp_path):
    root = touch(tmp_path / "videos", *(f"cats/{name}.mp4" for name in "abcd"), "dogs/e.mp4", ".hidden/f.mp4")
    assert problem(root, "sky", split="train") == (
        f"root must hold folders of frames, got '{root}' and split='train', where none lie\n"
        "layout='sky' expects below root:\n"
        "  sky_train/a/a_1/a_frames_00000001.jpg\n"
        "  sky_test/b/b_1/b_frames_00000001.jpg\n"
        f"found in {root}:\n"
        "  cats/a.mp4\n"
        "  cats/b.mp4 and 2 more\n"
        "  dogs/e.mp4\n"
        "It looks like layout='folders'."
    )


@pytest.mark.parametrize(
    ("names", "wrong", "likely"),
    [
        (["a/1.png", "b/1.png"], {"layout": "folders"}, "frames"),
        (["cats/a/1.png"], {"layout": "ffs"}, "frames"),
        (["cats/a/1.png"], {"layout": "taichi", "split": "train"}, "frames"),
        (["sky_train/a/x_1.png"], {"layout": "taichi"}, "sky"),
        (["frames/train/a/1.png"], {"layout": "sky"}, "taichi"),
        (["frames/train/a/1.png"], {"layout": "folders"}, "taichi"),
        (["Archery/v_Archery_g08_c01.avi"], {"layout": "ffs"}, "ucf101"),
        (["Archery/v_Archery_g08_c01.avi"], {"layout": "folders", "split": "train"}, "ucf101"),
        (["cats/a.mp4"], {"layout": "frames"}, "folders"),
        (["cats/a.mp4"], {"layout": "manifest"}, "folders"),
        (["all/video0.mp4"], {"layout": "taichi"}, "msrvtt"),
        (["a/1.png"], {"layout": "ucf101"}, "frames"),
        (["sky_train/a/one.png"], {"layout": "sky", "split": "train"}, None),
        (["a/1.png", "cats/a.mp4"], {"layout": "sky"}, None),
        (["notes.txt"], {"layout": "frames"}, None),
        ([], {"layout": "ucf101"}, None),
    ],
)
def test_every_wrong_layout(tmp_path, names, wrong, likely):
    message = problem(touch(tmp_path, *names), **wrong)
    assert f"layout={wrong['layout']!r} expects below root:\n  " in message
    assert f"found in {tmp_path}:\n  {names[0] if names else 'nothing'}" in message
    assert re.findall(r"It looks like layout='(\w+)'", message) == ([likely] if likely else [])


@pytest.mark.parametrize(
    ("names", "layout", "split", "remedy"),
    [
        (["train/videos/a.avi", "val/videos/b.avi"], "ffs", None, "no split, where none lie; pass split='train'"),
        (["val/a/1.png"], "ffs", "train", "split='train', where none lie; pass split='val'"),
        (["sky_test/a/a_1.jpg"], "sky", "train", "split='train', where none lie; pass split='test'"),
        (["frames/train/a/1.png"], "taichi", None, "no split, where none lie; pass split='train'"),
        (["a/1.png"], "taichi", "test", "split='test', where none lie; pass split=None"),
    ],
)
def test_the_split_is_the_remedy(tmp_path, names, layout, split, remedy):
    message = problem(touch(tmp_path, *names), layout, split=split)
    assert f"{remedy}\nlayout=" in message
    assert "It looks like" not in message


def test_a_zip_file_is_no_folder_of_videos(tmp_path):
    archive = pack(touch(tmp_path / "a", "1.png", "2.png", "3.png"), tmp_path / "a.zip", below="first")
    message = problem(archive, "folders")
    assert f"root must be a folder of videos, got '{archive}': there is a file of that name\n" in message
    assert message.endswith("  first/1.png\n  first/2.png and 1 more\nIt looks like layout='frames'.")


def test_a_zip_file_that_cannot_be_read_is_named(tmp_path):
    touch(tmp_path, "a.zip")
    assert f"found in {tmp_path}:\n  {tmp_path / 'a.zip'}: cannot be read as a zip file" in problem(tmp_path, "folders")
    assert problem(tmp_path, "frames").startswith(f"{tmp_path / 'a.zip'}: cannot be read as a zip file: ")


def test_long_listings_are_cut(tmp_path):
    message = problem(touch(tmp_path, *(f"{name}/1.txt" for name in "abcdefghijk")), "frames")
    assert message.endswith("  g/1.txt\n  h/1.txt\n  ...")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "kinetics"}, "layout must be one of 'folders', 'frames', .*, got 'kinetics'"),
        ({"layout": "list"}, r"index must be given for layout='list', got None"),
        ({"layout": "manifest"}, r"index must be given for layout='manifest', got None"),
        ({"layout": "sky", "index": "a"}, r"index must be left out for layout='sky', got 'a'"),
        ({"index": "a"}, r"index must be left out for layout='folders', got 'a'"),
        ({"layout": "list", "index": "no.txt"}, r"index must be an existing file, got 'no\.txt' \(no such file\)"),
        (
            {"layout": "list", "index": __file__, "split": "train"},
            r"split must be left out for layout='list', whose index",
        ),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_index(touch(tmp_path, "a.mp4"), **options)
