# SPDX-License-Identifier: Apache-2.0
"""From video files to token shards."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.data.clips.folder import VideoFolder
from reco_lightning.data.clips.module import VideoDataModule
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import ClipSource, TokenShards
from reco_lightning.data.video.clip import VideoError
from reco_lightning.pipelines.tokenize.run import tokenize_folder
from reco_lightning.support.devices import pick_device
from reco_lightning.support.fingerprint import fingerprint
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.base import to_unit_range
from reco_lightning.tokenizers.loading import load_tokenizer
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers import tiny_tokenizers


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keeps scans out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def videos(tmp_path):
    random = np.random.default_rng(0)
    for name, frames in (("a/one.mp4", 14), ("a/two.mp4", 9), ("b/three.mp4", 23)):
        write_video(tmp_path / "videos" / name, random.integers(0, 256, (frames, 48, 64, 3), np.uint8))
    return tmp_path / "videos"


def tokenizer():
    torch.manual_seed(0)
    return VQVAE(codebook_size=32, width=8)


def run(videos, output, **options):
    options = {
        "tokenizer": tokenizer(),
        "frames": 5,
        "size": 32,
        "progress": False,
        "device": "cpu",
        "num_workers": 0,
        **options,
    }
    return tokenize_folder(videos=str(videos), output=str(output), **options)


def test_every_clip_is_tokenised_with_its_label_and_origin(videos, tmp_path):
    net = tokenizer().train()
    path = run(videos, tmp_path / "tokens", tokenizer=net, batch_size=3, shard_size=4)
    assert path == tmp_path / "tokens"
    assert net.training
    shards = TokenShards(path)
    folder = VideoFolder(videos, frames=5, size=32)
    assert len(shards) == len(folder) == 2 + 1 + 4
    for index, clip in enumerate(folder.clips):
        ids = net.encode(to_unit_range(folder[index]["video"][None]))
        assert torch.equal(shards[index]["tokens"], ids.flatten())
        assert shards[index]["label"] == clip.label
        name = str(Path(clip.path).relative_to(videos))
        assert shards.source(index) == ClipSource(name, clip.start, clip.start + 5, 1)
    manifest = shards.manifest
    assert (manifest.classes, manifest.grid, manifest.vocab_size) == (("a", "b"), (2, 4, 4), 32)
    assert (manifest.tokenizer, manifest.tokenizer_sha256) == ("VQVAE", fingerprint(net))
    assert manifest.video == {"frames": 5, "stride": 1, "size": [32, 32], "resize": "short_side_crop"}


def trained_on(videos, folder, **data):
    """A checkpoint of a VQVAE that was trained on such clips, by `reco fit`'s own parts."""
    module = VideoDataModule(str(videos), batch_size=2, **data)
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(tokenizer(), datamodule=module)
    trainer.save_checkpoint(folder / "vqvae.ckpt")
    return str(folder / "vqvae.ckpt")


def test_clips_are_those_that_the_tokenizer_was_trained_on(videos, tmp_path, capsys):
    checkpoint = trained_on(videos, tmp_path, frames=5, stride=2, size=(16, 24))
    ask = {"tokenizer": checkpoint, "videos": str(videos), "device": "cpu"}
    capsys.readouterr()
    shards = TokenShards(tokenize_folder(output=str(tmp_path / "tokens"), **ask))
    assert shards.manifest.video == {"frames": 5, "stride": 2, "size": [16, 24], "resize": "short_side_crop"}
    assert shards.manifest.grid == (2, 2, 3)
    said = "Clips: 5 frames of 16 x 24 pixels at stride 2, as the tokenizer was trained on.\n"
    assert capsys.readouterr().out.startswith(said)
    shards = TokenShards(tokenize_folder(output=str(tmp_path / "others"), frames=9, size=32, stride=1, **ask))
    assert shards.manifest.video == {"frames": 9, "stride": 1, "size": [32, 32], "resize": "short_side_crop"}
    trained = "the tokenizer was trained on 5 frames of 16 x 24 pixels at stride 2."
    assert capsys.readouterr().out.startswith(f"Clips: 9 frames of 32 x 32 pixels at stride 1; {trained}")


def test_published_tokenizers_know_their_clips(tmp_path):
    options = {"args": Namespace(resolution=64, sequence_length=9)}
    weights = tiny_tokenizers.omnitokenizer().state_dict()
    torch.save({"state_dict": weights, "hyper_parameters": options}, tmp_path / "omni.ckpt")
    assert load_tokenizer(tmp_path / "omni.ckpt").trained_on == (9, (64, 64), 1)
    tiny_tokenizers.save_larp(tmp_path / "larp")
    config = load_tokenizer(tmp_path / "larp").config
    assert load_tokenizer(tmp_path / "larp").trained_on == (config.frame_num, (config.input_size,) * 2, 1)


def test_a_tokenizer_that_knows_no_clips_gets_the_usual_ones(videos, tmp_path, capsys):
    with pytest.raises(VideoError, match="a clip spans 17"):
        tokenize_folder(tokenizer=tokenizer(), videos=str(videos / "a"), output=str(tmp_path / "t"), device="cpu")
    assert "17 frames of 128 x 128 pixels at stride 1; the tokenizer does not tell" in capsys.readouterr().out


def test_stride_step_size_and_workers(videos, tmp_path):
    path = run(videos, tmp_path / "tokens", stride=2, clip_step=4, size=(32, 48), resize="squash", num_workers=1)
    shards = TokenShards(path)
    assert shards.grid == (2, 4, 6)
    assert [shards.source(index)[:3] for index in range(3)] == [
        ("a/one.mp4", 0, 9),
        ("a/one.mp4", 4, 13),
        ("a/two.mp4", 0, 9),
    ]


def test_summary_and_files_left_out(videos, tmp_path, capsys):
    (videos / "b" / "broken.mp4").write_bytes(b"no video")
    with pytest.warns(UserWarning, match="1 of 4 videos"):
        path = run(videos, tmp_path / "tokens", progress=True)
    output = capsys.readouterr()
    assert f"Wrote 7 clips of 2 x 4 x 4 tokens (ids below 32) from 3 videos in 2 class(es) to {path}." in output.out
    assert "Left out 1 video(s):\n  b/broken.mp4: " in output.out
    assert "Tokenising" in output.err


def test_clips_of_a_file_that_goes_bad_are_not_replaced_by_copies_of_others(videos, tmp_path, monkeypatch, capsys):
    original = VideoFolder.__init__

    def scan_then_break(self, *args, **options):
        original(self, *args, **options)
        (videos / "a" / "one.mp4").write_bytes(b"no longer a video")

    monkeypatch.setattr(VideoFolder, "__init__", scan_then_break)
    with pytest.warns(UserWarning, match=r"one.mp4"):
        shards = TokenShards(run(videos, tmp_path / "tokens", progress=True))
    assert [shards.source(index).path for index in range(len(shards))] == ["a/two.mp4"] + ["b/three.mp4"] * 4
    assert "Left out 2 clip(s) of videos that could be scanned but not read again" in capsys.readouterr().out


def test_a_checkpoint_will_do(videos, tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    net = tokenizer()
    trainer.strategy.connect(net)
    trainer.save_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    shards = TokenShards(run(videos, tmp_path / "tokens", tokenizer=str(tmp_path / "net.ckpt")))
    assert shards.manifest.tokenizer == "VQVAE net.ckpt"
    assert shards.manifest.tokenizer_sha256 == fingerprint(net)


def test_any_tokenizer_will_do(videos, tmp_path):
    class Own:
        codebook_size, temporal_stride, spatial_stride, frame_aligned = 2, 4, 16, True

        def grid(self, frames, height, width):
            return 2, height // 16, width // 16

        def encode(self, video):
            return torch.ones(len(video), 2, 2, 2, dtype=torch.int64)

        def decode(self, ids, *, clamp=False): ...

    shards = TokenShards(run(videos, tmp_path / "tokens", tokenizer=Own()))
    assert (shards.manifest.tokenizer, shards.manifest.tokenizer_sha256) == ("Own", "")
    assert shards[0]["tokens"].tolist() == [1] * 8


class Holistic:
    """Ids of the whole clip, in no order of time: brightness of the clip and of its colours."""

    codebook_size, temporal_stride, spatial_stride, frame_aligned = 256, 5, 32, False

    def grid(self, frames, height, width):
        return (4,)

    def encode(self, video):
        pixels = (video + 1) * 127.5
        return torch.cat([pixels.mean((1, 2, 3, 4))[:, None], pixels.mean((2, 3, 4))], 1).long()

    def decode(self, ids, *, clamp=False): ...


def test_holistic_ids_are_stored_and_train_in_windows_over_equal_ranges(videos, tmp_path, capsys):
    path = run(videos, tmp_path / "tokens", tokenizer=Holistic(), progress=True)
    assert "Wrote 7 clips of 4 tokens (ids below 256)" in capsys.readouterr().out
    shards = TokenShards(path)
    assert (shards.grid, shards.manifest.frame_aligned) == ((4,), False)
    video = VideoFolder(videos, frames=5, size=32)[6]["video"]
    assert shards[6]["tokens"].tolist() == Holistic().encode(to_unit_range(video[None]))[0].tolist()
    network = VideoTransformer(vocab_size=256, grid=(4, 1, 1), dim=32, depth=2, heads=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ReCoCallback(WindowSampler(2, 2, window_blocks=1), continuity_weight=0)],
    )
    trainer.fit(VideoModel(network), datamodule=TokenDataModule(str(path), batch_size=2, val_fraction=0.3))
    assert trainer.global_step == 2


def test_captions_are_stored_with_their_clips(videos, tmp_path, capsys):
    path = tmp_path / "captions.jsonl"
    path.write_text(
        '{"file": "b/three.mp4", "caption": "Noise."}\n'
        '{"file": "a/two.mp4", "caption": "Noise."}\n'
        '{"file": "b/broken.mp4", "caption": "Nothing."}\n'
    )
    (videos / "b" / "broken.mp4").write_bytes(b"no video")
    with pytest.warns(UserWarning, match="1 of 4 videos"):
        shards = TokenShards(run(videos, tmp_path / "tokens", captions=str(path), progress=True))
    assert [shards.caption(index) for index in range(7)] == [None, None] + ["Noise."] * 5
    assert shards.manifest.captions == ("Noise.",)
    assert "1 video(s) have no caption, a/one.mp4 for one." in capsys.readouterr().out
    path.write_text('{"file": "three.mp4", "caption": "Noise."}')
    with (
        pytest.warns(UserWarning, match="1 of 4 videos"),
        pytest.raises(ValueError, match=r"captions must name files relative to the folder of videos.*line 1"),
    ):
        run(videos, tmp_path / "other", captions=str(path))
    assert not (tmp_path / "other").exists()


def test_errors_come_before_the_work_and_leave_nothing(videos, tmp_path, monkeypatch):
    output = tmp_path / "tokens"
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        run(videos, output, batch_size=0)
    with pytest.raises(ValueError, match="shard_size must be a whole number of 1 or more, got 0"):
        run(videos, output, shard_size=0)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ a multiple of 4 .*, got 6"):
        run(videos, output, frames=6)
    with pytest.raises(ValueError, match="height must be a multiple of 8 pixels, got 36"):
        run(videos, output, size=36)
    with pytest.raises(
        ValueError, match="tokenizer must be a checkpoint or have the members of VideoTokenizer, got a Linear"
    ):
        run(videos, output, tokenizer=torch.nn.Linear(1, 1))
    assert not output.exists()
    run(videos, output)
    with monkeypatch.context() as patch:
        patch.setattr(VideoFolder, "__init__", lambda *_, **__: pytest.fail("scanned first"))
        with pytest.raises(ValueError, match="folder must not hold token shards yet"):
            run(videos, output)
    run(videos, output, overwrite=True)


def test_a_failure_half_way_leaves_no_shards_but_what_is_encoded(videos, tmp_path, monkeypatch):
    net = tokenizer().train()
    net.encoder.eval()  # modes need not be the same all over
    calls = iter([0, 1])
    encode = net.encode
    with monkeypatch.context() as patch:
        patch.setattr(net, "encode", lambda video: encode(video) if next(calls) == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(videos, tmp_path / "tokens", tokenizer=net, batch_size=2, shard_size=1)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [".unfinished"]
    assert net.training
    assert not net.encoder.training
    assert net._trainer is None
    with pytest.raises(ValueError, match="folder must hold token shards"):
        TokenShards(tmp_path / "tokens")
    assert len(TokenShards(run(videos, tmp_path / "tokens", tokenizer=net, batch_size=2))) == 7


def test_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match="device must be one of this machine, got 'cuda:2' where it has 2 of that type"
    ):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="got 'cuda' where it has 0"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="got 'meta' where it has 0"):
        pick_device("meta")
