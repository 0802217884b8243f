# SPDX-License-Identifier: Apache-2.0
"""``reco evaluate``: the scores of one process and of two, of a whole run and of one that goes on, and by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reco_lightning import VideoModel, VideoTransformer, generate
from reco_lightning.checkpoints import load_module
from reco_lightning.cli import main
from reco_lightning.data.token_module import TokenDataModule
from reco_lightning.data.tokens import TokenShards
from reco_lightning.decoding import decode_videos
from reco_lightning.evaluation import EvaluateVideos
from reco_lightning.media import write_video
from reco_lightning.metrics.frechet import RandomFeatureDistance
from reco_lightning.tokenize import tokenize_folder
from reco_lightning.tokenizers.base import to_uint8
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers.checkpoints import save

GRID = (3, 2, 2)
ROOT = Path(__file__).parents[1]
FEW = pytest.mark.filterwarnings("ignore:.*(fewer|features).*:UserWarning")
pytestmark = FEW


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five clips in two classes, their tokens, and a model with its tokenizer."""
    folder = tmp_path_factory.mktemp("evaluation")
    for number in range(5):
        frames = np.random.default_rng(number).integers(0, 255, (1, 16, 16, 3)).repeat(9, axis=0).astype(np.uint8)
        (folder / "videos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        write_video(folder / "videos" / "ab"[number % 2] / f"{number}.mp4", np.roll(frames, number, axis=2))
    torch.manual_seed(0)
    tokenizer = save(VQVAE(codebook_size=8, width=8), folder / "vq.ckpt")
    tokenize_folder(
        tokenizer=tokenizer,
        videos=str(folder / "videos"),
        output=str(folder / "tokens"),
        frames=9,
        size=16,
        device="cpu",
        progress=False,
    )
    network = VideoTransformer(vocab_size=8, grid=GRID, dim=32, depth=2, heads=2, num_classes=2)
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    return folder, tokenizer, save(VideoModel(network), folder / "model.ckpt")


def evaluate(files, output, *options, processes=1):
    folder, tokenizer, model = files
    main(
        [
            "evaluate",
            f"--ckpt_path={model}",
            "--data=TokenDataModule",
            f"--data.folder={folder / 'tokens'}",
            "--data.val_fraction=0",
            "--data.batch_size=2",
            f"--evaluation.tokenizer={tokenizer}",
            f"--evaluation.output={output}",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={processes}",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={output}",
            "--trainer.enable_progress_bar=false",
            *options,
        ]
    )
    return json.loads((Path(output) / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    return output, evaluate(files, output)


def test_scores_are_those_of_the_same_videos_scored_by_hand(files, alone):
    folder, tokenizer, model = files
    _, report = alone
    shards, module = TokenShards(folder / "tokens"), load_module(model, VideoModel)
    tokens = torch.stack([shards[i]["tokens"] for i in range(5)])
    labels = torch.stack([shards[i]["label"] for i in range(5)])
    ids = generate(module, 5, condition=labels)
    decoder = load_module(tokenizer, VQVAE)
    with torch.inference_mode():
        real = to_uint8(decoder.decode(tokens.view(-1, *GRID), clamp=True)).permute(0, 4, 1, 2, 3)
        made = decode_videos(decoder, ids, GRID).permute(0, 4, 1, 2, 3)
        losses = [F.cross_entropy(module(x, labels).transpose(1, 2), x).item() for x in (tokens, ids)]
    distance = RandomFeatureDistance()
    distance.update(real, real=True)
    distance.update(made, real=False)
    scores = report["scores"]
    assert scores["distance"]["value"] == pytest.approx(float(distance.compute()), rel=1e-6)
    assert scores["distance"]["clips"] == {"real": 5, "generated": 5}
    assert scores["position_loss_data"]["value"]["mean"] == pytest.approx(losses[0], rel=1e-5)
    assert scores["position_loss_generated"]["value"]["mean"] == pytest.approx(losses[1], rel=1e-5)
    steps = real[:, :, 1:].double() - real[:, :, :-1].double()
    first = [10 * np.log10(255**2 / max(mse, 1e-5)) for mse in steps.square().mean(dim=(1, 3, 4)).flatten().tolist()]
    assert scores["interval_psnr"]["value"]["real"][0] == pytest.approx(np.minimum(first, 100).mean(), rel=1e-6)


def test_two_processes_give_the_figures_of_one(files, alone, tmp_path):
    script = (
        "from tests.test_evaluation import evaluate\nimport sys, pathlib\nfolder = pathlib.Path(sys.argv[1])\n"
        "evaluate((folder, str(folder / 'vq.ckpt'), str(folder / 'model.ckpt')), sys.argv[2], '--trainer.strategy=ddp',"
        " processes=2)"
    )
    (tmp_path / "two.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "two.py"), str(files[0]), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "out" / "evaluation.json").is_file(), done.stderr[-3000:]
    own, other = alone[1]["scores"], json.loads((tmp_path / "out" / "evaluation.json").read_text())["scores"]
    assert own.keys() == other.keys()
    for name in own:
        assert own[name]["clips"] == other[name]["clips"]
        for a, b in zip(numbers(own[name]["value"]), numbers(other[name]["value"]), strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-6, nan_ok=True), name


def numbers(value):
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float("nan") if value is None else value]


def test_an_interrupted_evaluation_goes_on_with_the_ids_it_has(files, alone, tmp_path):
    output, report = alone
    (tmp_path / "ids").mkdir()
    for name in ("settings.json", "00000000.npy", "00000003.npy"):
        (tmp_path / "ids" / name).write_bytes((output / "ids" / name).read_bytes())
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").glob("*.npy")}
    assert evaluate(files, tmp_path)["scores"] == report["scores"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list((tmp_path / "ids").glob("*.npy"))) == 5


def test_ids_of_another_evaluation_are_refused(files, alone, capsys):
    with pytest.raises(SystemExit):
        evaluate(files, alone[0], "--evaluation.temperature=0.5")
    assert "holds ids of another evaluation: temperature differ" in capsys.readouterr().err


def test_the_report_has_every_score_with_what_it_rests_on_and_a_figure_for_each_curve(alone):
    output, report = alone
    text = (output / "evaluation.md").read_text()
    for name in report["scores"]:
        assert f"| {name} | " in text
    assert "no FVD: random convolutions" in text
    assert report["setting"]["real clips"] == "reconstructions by the tokenizer"
    figures = {path.stem for path in output.glob("*.png")}
    assert figures == set(report["scores"]) - {"distance", "position_loss_data"}
    assert not any(len(path.read_bytes()) < 1000 for path in output.glob("*.png"))


def test_real_clips_can_be_those_of_the_files_and_first_blocks_are_kept(files, tmp_path):
    folder = files[0]
    report = evaluate(files, tmp_path, f"--evaluation.videos={folder / 'videos'}", "--evaluation.first_blocks=1")
    assert report["setting"]["real clips"] == f"files in {folder / 'videos'}"
    shards = TokenShards(folder / "tokens")
    for number in range(5):
        ids = np.load(tmp_path / "ids" / f"{number:08d}.npy")
        assert np.array_equal(ids[:4], shards[number]["tokens"][:4].numpy())
    # still pictures: the files' own clips do not move, whatever the tokenizer makes of them
    assert report["scores"]["interval_psnr"]["value"]["real"][0] > 30


def test_a_checkpoint_of_a_module_with_the_callback_holds_no_extractor(files, tmp_path):
    folder, tokenizer, model = files
    module = load_module(model, VideoModel)
    callback = EvaluateVideos(tokenizer, output=str(tmp_path), flow=False, n=2)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    trainer.test(module, TokenDataModule(str(folder / "tokens"), val_fraction=0, batch_size=2), verbose=False)
    assert trainer.callback_metrics["test/random_feature_distance"] >= 0
    save(module, tmp_path / "again.ckpt")
    stored = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == torch.load(model, weights_only=True)["state_dict"].keys()


@pytest.mark.parametrize(
    ("options", "match"), [({"n": 1}, "n must be 2 clips or more"), ({"first_blocks": -1}, "first_blocks must be 0")]
)
def test_refuses_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        EvaluateVideos("vq.ckpt", **options)
