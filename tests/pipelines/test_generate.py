# SPDX-License-Identifier: Apache-2.0
"""`reco generate`: a checkpoint in, mp4 files, a grid and tokens out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reco_lightning import VideoModel, VideoTransformer
from reco_lightning.cli.entry_point import main
from reco_lightning.data.video.clip import read_clip
from reco_lightning.support.checkpoints import load_module
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.base import to_unit_range
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers.checkpoints import save

GRID = (2, 4, 4)  # clips of 5 frames of 32 x 32 pixels


def video_model(folder: Path, *, vocab_size: int = 8, num_classes: int = 0) -> str:
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=vocab_size, grid=GRID, dim=32, depth=1, heads=2, num_classes=num_classes)
    for parameter in network.parameters():
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)  # probabilities far from even
    return save(VideoModel(network), folder / "model.ckpt")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return save(VQVAE(codebook_size=8, width=8), tmp_path / "vqvae.ckpt")


def test_generate_writes_videos_a_grid_and_tokens(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    model = video_model(tmp_path)
    options = ["--tokenizer", tokenizer, "--output", str(out), "-n", "3", "--batch_size=2", "--device=cpu"]
    main(["generate", "--checkpoint", model, *options, "--temperature=0.9", "--top_k=4"])
    assert sorted(p.name for p in out.iterdir()) == ["0000.mp4", "0001.mp4", "0002.mp4", "grid.mp4", "tokens.npy"]
    tokens = np.load(out / "tokens.npy")
    assert tokens.shape == (3, *GRID)
    assert 0 <= tokens.min() <= tokens.max() < 8
    assert read_clip(out / "0002.mp4", start=0, frames=5, size=32).shape == (5, 32, 32, 3)
    assert read_clip(out / "grid.mp4", start=0, frames=5, size=(64, 64)).shape == (5, 64, 64, 3)
    assert f"Wrote 3 clips of 5 frames, grid.mp4 and tokens.npy to {out}" in capsys.readouterr().out


def test_the_seed_decides(tmp_path: Path) -> None:
    model = video_model(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(
            [
                "generate",
                f"--checkpoint={model}",
                f"--output={tmp_path / name}",
                "-n",
                "2",
                f"--seed={seed}",
                "--device=cpu",
            ]
        )
    a, b, c = (np.load(tmp_path / name / "tokens.npy") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_without_a_tokenizer_it_says_how_to_get_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["generate", f"--checkpoint={video_model(tmp_path)}", f"--output={tmp_path / 'out'}", "-n", "1", "--device=cpu"]
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tokens.npy"]
    assert "--tokenizer PATH" in capsys.readouterr().out


def test_a_class_can_be_asked_for(tmp_path: Path) -> None:
    model = video_model(tmp_path, num_classes=3)
    for name, options in (("free", []), ("two", ["--label=2"])):
        main(["generate", f"--checkpoint={model}", f"--output={tmp_path / name}", "-n", "1", "--device=cpu", *options])
    assert (np.load(tmp_path / "free" / "tokens.npy") != np.load(tmp_path / "two" / "tokens.npy")).any()


@pytest.mark.slow
def test_a_longer_clip_goes_on_from_the_trained_length(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = video_model(tmp_path)
    options = ["generate", f"--checkpoint={model}", f"--tokenizer={tokenizer}", "-n", "1", "--device=cpu"]
    main([*options, f"--output={tmp_path / 'short'}"])
    main([*options, f"--output={tmp_path / 'long'}", "--length=9", "--context_blocks=1"])
    short, long = (np.load(tmp_path / name / "tokens.npy") for name in ("short", "long"))
    assert long.shape == (1, 9, *GRID[1:])
    assert (long[:, :2] == short).all()
    assert "Wrote 1 clips of 33 frames" in capsys.readouterr().out
    frames = read_clip(tmp_path / "long" / "0000.mp4", start=0, frames=33, size=32)
    start = read_clip(tmp_path / "short" / "0000.mp4", start=0, frames=5, size=32)
    assert np.abs(frames[:5].astype(int) - start).mean() < 2  # but for what H.264 loses


@pytest.mark.slow
def test_guidance_and_bfloat16(tmp_path: Path) -> None:
    model = video_model(tmp_path, num_classes=3)
    options = ["generate", f"--checkpoint={model}", "-n", "2", "--device=cpu", "--label=2"]
    main([*options, f"--output={tmp_path / 'plain'}"])
    main([*options, f"--output={tmp_path / 'one'}", "--cfg_scale=1"])
    main([*options, f"--output={tmp_path / 'guided'}", "--cfg_scale=4"])
    main([*options, f"--output={tmp_path / 'bf16'}", "--bf16"])
    plain, one, guided, low = (np.load(tmp_path / name / "tokens.npy") for name in ("plain", "one", "guided", "bf16"))
    assert (plain == one).all()
    assert (plain != guided).any()
    assert low.shape == plain.shape


@pytest.mark.slow
def test_first_frames_are_continued(tmp_path: Path, tokenizer: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 48, 32, 3), dtype=np.uint8)
    video = write_video(tmp_path / "video.mp4", pixels)
    options = ["generate", f"--checkpoint={video_model(tmp_path)}", f"--tokenizer={tokenizer}", "--device=cpu", "--n=2"]
    main([*options, f"--first_frames={video}", f"--output={tmp_path / 'a'}"])
    main([*options, f"--first_frames={video}", f"--output={tmp_path / 'b'}", "--given_frames=5", "--length=4"])
    clip = to_unit_range(torch.from_numpy(read_clip(video, start=0, frames=5, size=32))[None])
    model = load_module(tokenizer, VQVAE).eval()
    one, two = (np.load(tmp_path / name / "tokens.npy") for name in "ab")
    assert (one[:, :1] == model.encode(clip[:, :, :1]).numpy()).all()
    assert (two[:, :2] == model.encode(clip).numpy()).all()
    assert two.shape == (2, 4, *GRID[1:])
    assert (one[0, 1] != one[1, 1]).any()


def test_label_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", f"--checkpoint={video_model(tmp_path, num_classes=3)}", "--label=3", "--device=cpu"])
    assert "label must be 0 to 2, got 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint=missing.ckpt"], "checkpoint must be an existing checkpoint file, got 'missing.ckpt'"),
        (["--checkpoint=MODEL", "-n", "0"], "n must be a whole number of 1 or more, got 0"),
        (["--checkpoint=MODEL", "--batch_size=0"], "batch_size must be a whole number of 1 or more, got 0"),
        (["--checkpoint=MODEL", "--temperature=-1"], "temperature must be a finite number of 0 or more, got -1"),
        (["--checkpoint=MODEL", "--top_p=2"], "top_p must lie in (0, 1]"),
        (["--checkpoint=MODEL", "--label=1"], "label must be left out: the model knows no classes, got 1"),
        (["--checkpoint=MODEL", "--tokenizer=TOKENIZER"], "tokenizer must know the model's 9 ids, but it knows 8"),
        (["--checkpoint=MODEL", "--tokenizer=missing.ckpt"], "checkpoint file, got 'missing.ckpt'"),
        (["--checkpoint=MODEL", "--length=0"], "length must be a whole number of 1 or more"),
        (["--checkpoint=MODEL", "--context_blocks=2"], "context_blocks must be 1 to 1, fewer than"),
        (["--checkpoint=MODEL", "--cfg_scale=2"], "cfg_scale must be 1 where condition gives no class"),
        (["--checkpoint=MODEL", "--given_frames=0"], "given_frames must be a whole number of 1 or more, got 0"),
        (["--checkpoint=MODEL", "--first_frames=a.mp4"], "first_frames needs tokenizer, which turns them into ids"),
        (
            ["--checkpoint=MODEL", "--tokenizer=TOKENIZER", "--first_frames=a.mp4"],
            "first_frames must be an existing video file",
        ),
        (["--n=1"], "checkpoint"),
    ],
)
def test_mistakes_end_with_a_message(
    options: list[str], message: str, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = video_model(tmp_path, vocab_size=9)
    options = [option.replace("MODEL", model).replace("TOKENIZER", tokenizer) for option in options]
    with pytest.raises(SystemExit) as info:
        main(["generate", *options, f"--output={tmp_path / 'out'}", "--device=cpu"])
    assert info.value.code == 2
    assert message in capsys.readouterr().err


def test_load_module_refuses_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "tests.helpers.cli_modules.TinyModel"}}, path)
    with pytest.raises(ValueError, match=r"must hold a VideoModel, got a tests\.helpers"):
        load_module(str(path), VideoModel)
