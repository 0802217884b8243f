# SPDX-License-Identifier: Apache-2.0
"""From data sets in other layouts than class folders to token shards, by function and by command."""

from __future__ import annotations

import json

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from reco_lightning.cli.entry_point import main
from reco_lightning.data.tokens.shards import ClipSource, TokenShards
from reco_lightning.data.video.clip import read_clip
from reco_lightning.pipelines.tokenize.run import tokenize_folder
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.base import to_unit_range
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.data.trees import pack, pixels, write_frames
from tests.helpers.videos import encode


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keeps scans out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tokenizer():
    torch.manual_seed(0)
    return VQVAE(codebook_size=32, width=8)


@pytest.fixture
def checkpoint(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    net = tokenizer()
    trainer.strategy.connect(net)
    trainer.save_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    return tmp_path / "net.ckpt"


def run(videos, output, **options):
    usual = {"tokenizer": tokenizer(), "frames": 5, "size": 32, "progress": False, "device": "cpu", "num_workers": 0}
    options = usual | options
    return tokenize_folder(videos=str(videos), output=str(output), **options)


def command(*args):
    main(["tokenize", "--frames", "5", "--size", "32", "--device", "cpu", *map(str, args)])


def describe(path):
    """Source, label and caption of every clip."""
    shards = TokenShards(path)
    return [(*shards.source(i)[:3], int(shards[i]["label"]), shards.caption(i)) for i in range(len(shards))]


@pytest.fixture
def sky(tmp_path):
    for name, count, seed in (("sky_train/x/x_1", 12, 1), ("sky_train/x/x_2", 6, 2), ("sky_test/y/y_1", 5, 3)):
        write_frames(tmp_path / "sky" / name, pixels(count, height=32, width=48, seed=seed), name="frame_{}.png")
    return tmp_path / "sky"


def test_the_command_on_skytimelapse(sky, checkpoint, tmp_path, capsys):
    command(
        "--tokenizer", checkpoint, "--videos", sky, "--output", tmp_path / "t", "--layout", "sky", "--split", "train"
    )
    assert "Wrote 3 clips of 2 x 4 x 4 tokens (ids below 32) from 2 videos in 1 class(es)" in capsys.readouterr().out
    shards = TokenShards(tmp_path / "t")
    assert shards.manifest.classes == (".",)
    assert [shards.source(index) for index in range(3)] == [
        ClipSource("sky_train/x/x_1", 0, 5, 1),
        ClipSource("sky_train/x/x_1", 5, 10, 1),
        ClipSource("sky_train/x/x_2", 0, 5, 1),
    ]
    net = tokenizer().eval()
    for index, written in enumerate(
        (pixels(12, height=32, width=48, seed=1)[5:10], pixels(6, height=32, width=48, seed=2)[:5]), 1
    ):
        ids = net.encode(to_unit_range(torch.from_numpy(np.ascontiguousarray(written[None, :, :, 8:40]))))
        assert torch.equal(shards[index]["tokens"], ids.flatten())


def test_the_command_on_ucf101(checkpoint, tmp_path):
    names = [
        "HammerThrow/v_HammerThrow_g01_c01.avi",
        "Hammering/v_Hammering_g08_c01.avi",
        "Hammering/v_Hammering_g01_c01.avi",
    ]
    for seed, name in enumerate(names):
        encode(tmp_path / "UCF-101" / name, pixels(6, height=32, width=48, seed=seed), codec="mpeg4")
    (tmp_path / "classInd.txt").write_text("1 Hammering\n2 HammerThrow\n3 YoYo")
    (tmp_path / "testlist01.txt").write_text(f"{names[0]}\n{names[2]}\n")
    args = ["--videos", tmp_path / "UCF-101", "--output", tmp_path / "t", "--layout", "ucf101", "--split", "test"]
    command("--tokenizer", checkpoint, *args, "--index", tmp_path / "testlist01.txt")
    assert describe(tmp_path / "t") == [(names[0], 0, 5, 1, None), (names[2], 0, 5, 0, None)]
    manifest = TokenShards(tmp_path / "t").manifest
    assert manifest.classes == ("Hammering", "HammerThrow", "YoYo")
    assert (manifest.video["layout"], manifest.video["split"]) == ("ucf101", "test")


def test_a_wrong_layout_on_the_command_line(sky, checkpoint, tmp_path, capsys):
    args = ["--tokenizer", checkpoint, "--videos", sky, "--output", tmp_path / "t"]
    with pytest.raises((SystemExit, ValueError)) as caught:
        command(*args)
    message = f"{caught.value}\n{capsys.readouterr().err}"
    assert "layout='folders' expects below root:\n  cats/a.mp4" in message
    assert "It looks like layout='sky'." in message
    assert not (tmp_path / "t").exists()


def test_captions_of_a_video_go_round_its_clips(tmp_path, capsys):
    write_video(tmp_path / "videos" / "all" / "video0.mp4", pixels(16, height=32, width=32))
    write_video(tmp_path / "videos" / "all" / "video7.mp4", pixels(5, height=32, width=32))
    data = {
        "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video7", "split": "train"}],
        "sentences": [{"video_id": "video0", "caption": "one"}, {"video_id": "video0", "caption": "two"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    options = {"layout": "msrvtt", "split": "train", "index": str(tmp_path / "data.json")}
    path = run(tmp_path / "videos", tmp_path / "t", progress=True, **options)
    assert [(name, caption) for name, _, _, _, caption in describe(path)] == [
        ("all/video0.mp4", "one"),
        ("all/video0.mp4", "two"),
        ("all/video0.mp4", "one"),
        ("all/video7.mp4", None),
    ]
    assert "1 video(s) have no caption, all/video7.mp4 for one." in capsys.readouterr().out
    (tmp_path / "captions.jsonl").touch()
    with pytest.raises(
        ValueError, match=r"captions must be left out where the index of videos has captions, got '.*jsonl'"
    ):
        run(tmp_path / "videos", tmp_path / "u", captions=str(tmp_path / "captions.jsonl"), **options)


def test_parts_of_a_video_by_a_manifest(tmp_path):
    write_video(tmp_path / "a.mp4", pixels(20, height=32, width=32), fps=10)
    lines = [
        {"path": "a.mp4", "label": "b", "caption": "late", "start": 1.0},
        {"path": "a.mp4", "label": "a", "caption": "early", "end": 0.9},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = run(tmp_path, tmp_path / "t", layout="manifest", index=str(tmp_path / "m.jsonl"))
    assert describe(path) == [("a.mp4", 10, 15, 1, "late"), ("a.mp4", 15, 20, 1, "late"), ("a.mp4", 0, 5, 0, "early")]
    pixels_read = read_clip(tmp_path / "a.mp4", start=10, frames=5, size=32)
    ids = tokenizer().encode(to_unit_range(torch.from_numpy(pixels_read[None])))
    assert torch.equal(TokenShards(path)[0]["tokens"], ids.flatten())


def test_a_zip_file_gives_the_shards_of_the_folder(sky, tmp_path):
    packed = pack(sky, tmp_path / "sky.zip")
    folder, zipped = (run(videos, tmp_path / name, layout="sky") for videos, name in ((sky, "f"), (packed, "z")))
    assert describe(folder) == describe(zipped)
    assert TokenShards(folder).manifest == TokenShards(zipped).manifest


def test_going_on_with_another_layout_split_or_index_is_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "videos" / "train" / "a.mp4", pixels(6, height=32, width=32))
    (tmp_path / "one.jsonl").write_text('{"path": "train/a.mp4", "split": "train"}')
    (tmp_path / "two.jsonl").write_text('{"path": "train/a.mp4", "split": "train", "caption": "A cat."}')
    begun = {"layout": "manifest", "split": "train", "index": str(tmp_path / "one.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "videos", tmp_path / "t", **begun)
    for change, message in (
        ({"layout": "folders", "index": None}, "layout was manifest and is not there"),
        ({"split": None}, "split was train and is not there"),
        ({"index": str(tmp_path / "two.jsonl")}, "index_sha256 was [0-9a-f]{64} and is [0-9a-f]{64}"),
    ):
        with pytest.raises(ValueError, match=rf"settings must be those of the unfinished tokenisation .*{message}"):
            run(tmp_path / "videos", tmp_path / "t", **begun | change)
    (tmp_path / "one.jsonl").rename(tmp_path / "moved.jsonl")  # the same content
    path = run(tmp_path / "videos", tmp_path / "t", **begun | {"index": str(tmp_path / "moved.jsonl")})
    assert describe(path) == [("train/a.mp4", 0, 5, 0, None)]
