# SPDX-License-Identifier: Apache-2.0
import zipfile

import numpy as np
import pytest

from reco_lightning.data.video.clip import VideoError, VideoInfo, probe, read_clip
from reco_lightning.data.video.frames import FrameFolder, frame_order, is_frame_folder
from tests.data.trees import encode_picture, pack, pixels, write_frames
from tests.helpers.videos import encode


def test_order_is_by_the_number_after_the_last_underscore_and_else_natural():
    names = ["clip_2_10.jpg", "clip_10_9.jpg", "clip_3_100.jpg"]
    assert sorted(names, key=frame_order) == ["clip_10_9.jpg", "clip_2_10.jpg", "clip_3_100.jpg"]
    names = ["frame10_256x256.png", "frame9_256x256.png", "frame009b_256x256.png", "a.png"]
    assert sorted(names, key=frame_order) == ["a.png", "frame9_256x256.png", "frame009b_256x256.png", *names[:1]]
    # a constant number after the underscore decides nothing
    assert sorted(["10_64.png", "9_64.png"], key=frame_order) == ["9_64.png", "10_64.png"]


def test_a_clip_of_a_frame_folder_is_the_pixels_that_were_written(tmp_path):
    written = pixels(12)
    folder = write_frames(tmp_path / "a", written)
    (folder / "notes.txt").write_text("no frame")
    (folder / "._3.png").write_bytes(b"hidden")
    info = probe(folder)
    assert info == VideoInfo(frames=12, fps=0.0, height=24, width=32, reader="frames")
    clip = read_clip(folder, start=1, frames=4, stride=3, size=(24, 32), info=info)
    assert np.array_equal(clip, written[[1, 4, 7, 10]])
    assert np.array_equal(read_clip(folder, start=0, frames=2, size=(24, 32)), written[:2])  # probes itself
    crop = read_clip(folder, start=0, frames=12, size=24, info=info)  # nothing to scale, the centre is cut out
    assert np.array_equal(crop, written[:, :, 4:28])
    with pytest.raises(VideoError, match="holds 12 frames; a clip of 4 at stride 4 from frame 0 needs 13"):
        read_clip(folder, start=0, frames=4, stride=4, info=info)


@pytest.mark.parametrize("resize", ["short_side_crop", "squash"])
@pytest.mark.parametrize("size", [16, (20, 48)])
def test_frames_are_resized_as_those_of_a_video_file(tmp_path, resize, size):
    written = pixels(3, height=30, width=44)
    folder = write_frames(tmp_path / "a", written)
    file = encode(tmp_path / "a.mkv", written, codec="ffv1", pix_fmt="bgr0")  # lossless
    info = VideoInfo(3, 25.0, 30, 44, "pyav")
    expected = read_clip(file, start=0, frames=3, size=size, resize=resize, info=info)
    assert np.array_equal(read_clip(folder, start=0, frames=3, size=size, resize=resize), expected)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_other_pictures_and_wrong_endings(tmp_path, suffix):
    smooth = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8)
    written = np.stack([np.stack([smooth + 20 * t, smooth, 255 - smooth], -1) for t in range(3)])
    folder = write_frames(tmp_path / "a", written, name="{}" + suffix)
    (folder / f"2{suffix}").rename(folder / "2.png")  # what is in it counts
    clip = read_clip(folder, start=0, frames=3, size=(24, 32))
    assert np.abs(clip.astype(int) - written).max() <= (0 if suffix == ".bmp" else 8)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_frames_in_a_zip_file_are_those_of_the_folder(tmp_path, method):
    folder = write_frames(tmp_path / "tree" / "cats" / "a", pixels(11))
    archive = pack(tmp_path / "tree", tmp_path / "tree.zip", method=method)
    inside = archive / "cats" / "a"
    assert FrameFolder(inside).names == FrameFolder(folder).names == [f"{number}.png" for number in range(1, 12)]
    assert FrameFolder(inside).stamp()[0] == FrameFolder(folder).stamp()[0]
    assert probe(inside) == probe(folder)
    options = {"start": 2, "frames": 3, "stride": 2, "size": 16}
    assert np.array_equal(read_clip(inside, **options), read_clip(folder, **options))
    assert [is_frame_folder(path) for path in (inside, archive, archive / "cats", folder)] == [True, False, False, True]


def spoil(folder, kind):
    path = folder / "2.jpg"
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "size":
        path.write_bytes(encode_picture(pixels(1, width=30)[0], ".jpg"))
    elif kind == "none":
        for file in folder.iterdir():
            file.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"no picture", "start alone": b"\xff\xd8 and \xff\xd9"}[kind])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut off", r"a: 2\.jpg is cut off"),
        ("size", r"a: 2\.jpg is 24 x 30 pixels, 1\.jpg is not"),
        ("empty", r"a: 2\.jpg is empty \(0 bytes\)"),
        ("text", r"a: 2\.jpg is no picture"),
        ("start alone", r"a: 2\.jpg cannot be decoded: "),
        ("none", r"a: holds no frame: no file that ends in \.bmp"),
    ],
)
def test_frames_that_cannot_be_used_are_named(tmp_path, kind, reason):
    folder = write_frames(tmp_path / "a", pixels(3), name="{}.jpg")
    spoil(folder, kind)
    with pytest.raises(VideoError, match=reason):
        probe(folder)


def test_a_folder_that_changes_is_noticed(tmp_path):
    folder = write_frames(tmp_path / "a", pixels(4))
    info = probe(folder)
    (folder / "2.png").unlink()
    with pytest.raises(VideoError, match="held 4 frames and now holds 3"):
        read_clip(folder, start=0, frames=2, info=info)
    assert read_clip(folder, start=0, frames=3, size=8).shape == (3, 8, 8, 3)  # probed again
    with pytest.raises(VideoError, match="cannot be read: No such file"):
        FrameFolder(tmp_path / "b")
    with pytest.raises(VideoError, match=r"notes\.txt cannot be read"):
        FrameFolder(folder).read_file("notes.txt")


def test_zip_files_that_cannot_be_used_are_named(tmp_path):
    write_frames(tmp_path / "tree" / "a", pixels(2))
    packed = pack(tmp_path / "tree", tmp_path / "stored.zip", method=zipfile.ZIP_STORED)
    data = bytearray(packed.read_bytes())
    data[200] ^= 1
    packed.write_bytes(data)
    with pytest.raises(VideoError, match=r"2\.png cannot be read: its checksum is wrong"):
        read_clip(packed / "a", start=0, frames=2, info=VideoInfo(2, 0.0, 24, 32, "frames"))
    squeezed = pack(tmp_path / "tree", tmp_path / "squeezed.zip", method=zipfile.ZIP_BZIP2)
    with pytest.raises(VideoError, match=r"1\.png cannot be read: it must be stored or deflated"):
        probe(squeezed / "a")
    with pytest.raises(VideoError, match="is not in the zip file"):
        FrameFolder(squeezed / "b")
    (tmp_path / "text.zip").write_text("no zip file")
    with pytest.raises(VideoError, match="cannot be read as a zip file"):
        probe(tmp_path / "text.zip" / "a")
