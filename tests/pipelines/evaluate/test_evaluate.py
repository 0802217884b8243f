# SPDX-License-Identifier: Apache-2.0
"""``reco evaluate``: the scores of one process and of two, of a whole run and of one that goes on, and by hand."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning import VideoModel, VideoTransformer, generate
from reco_lightning.cli.entry_point import main
from reco_lightning.data.tokens.caption_ids import caption_ids, load_text_tokenizer
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import TokenShards
from reco_lightning.data.video.clip import read_clip
from reco_lightning.metrics import frechet
from reco_lightning.metrics.clip_score import CLIP, clip_score
from reco_lightning.metrics.features import RandomConvFeatures
from reco_lightning.metrics.frechet import RandomFeatureDistance, frechet_video_distance
from reco_lightning.metrics.interval import IntervalPSNR
from reco_lightning.metrics.protocols import FVDProtocol
from reco_lightning.models.sampling.decoding import decode_videos
from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.models.text_video.lightning_module import TextVideoModel
from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.pipelines.evaluate.callback import EvaluateVideos
from reco_lightning.pipelines.evaluate.real_clips import RealClips
from reco_lightning.pipelines.tokenize.run import tokenize_folder
from reco_lightning.support.checkpoints import load_module
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.base import to_uint8
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers.checkpoints import save
from tests.helpers.processes import finish, launched
from tests.helpers.words import save_words
from tests.metrics.test_clip_score import folder as clip_folder  # noqa: F401  (a fixture)

GRID = (3, 2, 2)
FEW = pytest.mark.filterwarnings("ignore:.*(fewer|features).*:UserWarning")
pytestmark = [pytest.mark.slow, FEW]


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
        num_workers=0,
    )
    network = VideoTransformer(vocab_size=8, grid=GRID, dim=32, depth=2, heads=2, num_classes=2)
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    return folder, tokenizer, save(VideoModel(network), folder / "model.ckpt")


def evaluate(files, output, *options, processes=1, data=("--data=TokenDataModule",)):
    folder, tokenizer, model = files
    main(
        [
            "evaluate",
            f"--ckpt_path={model}",
            *data,
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


@pytest.mark.distributed
def test_two_processes_give_the_figures_of_one(files, alone, tmp_path):
    with launched("tests.pipelines.evaluate.test_evaluate", files[0], tmp_path / "out") as processes:
        text = finish(processes, 300)
    assert (tmp_path / "out" / "evaluation.json").is_file(), text[-3000:]
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
    ("options", "match"),
    [
        ({"n": 1}, "n must be a whole number of 2 or more"),
        ({"first_blocks": -1}, "first_blocks must be a whole number of 0"),
        ({"length": 9}, "videos must be the folder .* where length is given, got None with length=9"),
    ],
)
def test_refuses_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        EvaluateVideos("vq.ckpt", **options)


# -- longer videos than the model was trained on


#: Place, file, start and label of the clips of `longer` that go on for 17 frames; that at place 2 does not.
LONG = [(0, "a/0.mp4", 0, 0), (1, "a/0.mp4", 9, 0), (3, "b/2.mp4", 0, 1)]


@pytest.fixture(scope="module")
def longer(files, tmp_path_factory):
    """Videos of 26, 9 and 17 frames, and their four clips of 9 frames."""
    folder = tmp_path_factory.mktemp("longer")
    for number, (name, frames) in enumerate({"a/0.mp4": 26, "a/1.mp4": 9, "b/2.mp4": 17}.items()):
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        moving = np.random.default_rng(number).integers(0, 255, (frames, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
        write_video(folder / "videos" / name, moving.astype(np.uint8))
    options = {"frames": 9, "size": 16, "device": "cpu", "progress": False, "num_workers": 0}
    tokenize_folder(tokenizer=files[1], videos=str(folder / "videos"), output=str(folder / "tokens"), **options)
    return folder, *files[1:]


def rolled_out(longer, length, **options):
    """The scores' ingredients by hand: ids, generated and real videos, of the clips in `LONG`."""
    folder, tokenizer, model = longer
    places, names, starts, labels = (list(column) for column in zip(*LONG, strict=True))
    module, decoder = load_module(model, VideoModel), load_module(tokenizer, VQVAE)
    ids = generate(module, 3, condition=torch.tensor(labels), indices=places, length=length, **options)
    made = decode_videos(decoder, ids, GRID, context_blocks=options.get("context_blocks"))
    where = zip(names, starts, strict=True)
    read = [read_clip(folder / "videos" / name, start=at, frames=made.shape[1], size=16) for name, at in where]
    values = ids[:, : 4 * GRID[0]]
    loss = F.cross_entropy(module(values, torch.tensor(labels)).transpose(1, 2), values).item()
    return ids, made.permute(0, 4, 1, 2, 3), torch.from_numpy(np.stack(read)).permute(0, 4, 1, 2, 3), loss


def by_hand(metric, real, made):
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric.compute()


@pytest.fixture
def random_i3d(monkeypatch):
    monkeypatch.setattr(frechet, "fvd_extractor", lambda path, protocol: RandomConvFeatures())
    return "--evaluation.extractor=i3d.pt"


def test_longer_videos_are_scored_as_by_hand_and_clips_that_end_early_are_left_out(
    longer, random_i3d, tmp_path, capsys
):
    length = ["--evaluation.length=5", "--evaluation.context_blocks=1", f"--evaluation.videos={longer[0] / 'videos'}"]
    report = evaluate(longer, tmp_path, *length, random_i3d)
    ids, made, real, loss = rolled_out(longer, 5, context_blocks=1)
    assert (made.shape[2], real.shape[2]) == (17, 17)
    for row, (place, *_) in enumerate(LONG):
        assert np.array_equal(np.load(tmp_path / "ids" / f"{place:08d}.npy"), ids[row].numpy())
    scores, setting = report["scores"], report["setting"]
    fvd = frechet_video_distance(real, made, RandomConvFeatures(), FVDProtocol("whole", frames=17, ddof=0))
    assert scores["distance"]["value"] == pytest.approx(float(fvd), rel=1e-6)
    assert scores["distance"]["clips"] == {"real": 3, "generated": 3}
    assert scores["distance"]["protocol"].startswith("styleganv, whole videos (17 frames, ")
    expected = by_hand(IntervalPSNR((1, 2, 4, 8, 16)), real, made)
    for kind in ("real", "generated"):
        assert scores["interval_psnr"]["value"][kind] == pytest.approx(expected[kind].tolist(), rel=1e-6)
    assert scores["position_loss_generated"]["value"]["mean"] == pytest.approx(loss, rel=1e-5)
    assert len(scores["position_loss_generated"]["value"]["position"]) == 12
    assert (setting["length"], setting["frames"], setting["clips left out"]) == (5, 17, 1)
    assert (setting["generation"]["length"], setting["generation"]["context_blocks"]) == (5, 1)
    with pytest.raises(SystemExit):
        evaluate(longer, tmp_path, "--evaluation.length=4", *length[1:])
    assert "holds ids of another evaluation: length differ" in capsys.readouterr().err


def test_shorter_videos_have_losses_of_what_was_generated_alone(longer, tmp_path):
    options = ["--evaluation.length=2", f"--evaluation.videos={longer[0] / 'videos'}", "--evaluation.flow=false"]
    loss = evaluate(longer, tmp_path, *options)["scores"]["position_loss_generated"]["value"]
    ids = torch.from_numpy(np.stack([np.load(tmp_path / "ids" / f"{place:08d}.npy") for place in range(4)]))
    logits = load_module(longer[2], VideoModel)(ids, torch.tensor([0, 0, 0, 1]))
    assert ids.shape == (4, 8)
    assert loss["mean"] == pytest.approx(F.cross_entropy(logits.transpose(1, 2), ids).item(), rel=1e-5)
    assert loss["block"][2] is None


def test_a_length_that_no_two_videos_have_is_refused_with_the_first_file(longer, tmp_path, capsys):
    options = ["--evaluation.length=7", f"--evaluation.videos={longer[0] / 'videos'}"]
    with pytest.raises(SystemExit):
        evaluate(longer, tmp_path, *options)
    said = capsys.readouterr().err
    assert "length must leave 2 test clips or more whose videos go on for 25 frames, got 1 of 4" in said
    assert "a/0.mp4 needs 34 frames for the clip from frame 9 on, and has 26" in said
    assert not (tmp_path / "ids").exists()


@pytest.mark.parametrize(("wanted", "expected"), [(4, ([0, 1, 3], 1)), (3, ([0, 1, 3], 1)), (2, ([0, 1], 0))])
def test_processes_look_for_long_videos_together(longer, monkeypatch, wanted, expected):
    parts, barrier = {}, threading.Barrier(2)

    def find(rank):
        def reduce(found, reduce_op):
            parts[rank] = found
            barrier.wait(10)
            return parts[0] + parts[1]

        strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
        trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)
        clips = RealClips(TokenShards(longer[0] / "tokens"), str(longer[0] / "videos"), frames=17)
        return clips.long_enough(wanted, trainer)

    with ThreadPoolExecutor(2) as both:
        assert list(both.map(find, range(2))) == [expected] * 2
    assert [(parts[rank] > 0).tolist() for rank in range(2)] == [[True, False, True, False], [False, True, False, True]]


# -- text to video


CAPTIONS = ("a dog runs", "cat", "a cat")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three clips of 17 frames with captions, and a tiny model of text to video with random weights."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "videos").mkdir()
    for number in range(3):
        frames = np.random.default_rng(number).integers(0, 255, (17, 16, 16, 3), dtype=np.uint8)
        write_video(folder / "videos" / f"{number}.mp4", frames)
    lines = [json.dumps({"file": f"{number}.mp4", "caption": text}) for number, text in enumerate(CAPTIONS)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    tokenizer = save(VQVAE(codebook_size=8, width=8), folder / "vq.ckpt")
    options = {"frames": 17, "size": 16, "device": "cpu", "progress": False, "num_workers": 0}
    where = {"videos": str(folder / "videos"), "output": str(folder / "tokens")}
    tokenize_folder(tokenizer=tokenizer, captions=str(folder / "captions.jsonl"), **where, **options)
    save_words(folder / "words", ["a", "dog", "runs", "cat"])
    llama = {"model_type": "llama", "vocab_size": 5, "hidden_size": 16, "intermediate_size": 16}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 1.0}
    module = TextVideoModel(TextVideoNetwork(vocab_size=8, grid=(5, 2, 2), architecture=llama))
    module.configure_model()
    return folder, tokenizer, save(module, folder / "model.ckpt")


def evaluate_texts(texts, output, *options, **more):
    data = ["--data=CaptionDataModule", f"--data.text_tokenizer={texts[0] / 'words'}"]
    return evaluate(texts, output, *options, data=data, **more)


def test_videos_of_captions_are_scored_as_by_hand(texts, clip_folder, random_i3d, tmp_path):  # noqa: F811
    folder, tokenizer, model = texts
    options = (f"--evaluation.videos={folder / 'videos'}", f"--evaluation.clip={clip_folder}", random_i3d)
    report = evaluate_texts(texts, tmp_path, *options, "--evaluation.cfg_scale=2", "--evaluation.seed=3")
    module, decoder = load_module(model, TextVideoModel), load_module(tokenizer, VQVAE)
    ids = generate_from_text(module, CAPTIONS, tokenizer=str(folder / "words"), cfg_scale=2.0, seed=3)
    for number in range(3):
        assert np.array_equal(np.load(tmp_path / "ids" / f"{number:08d}.npy"), ids[number].numpy())
    made = decode_videos(decoder, ids, (5, 2, 2)).permute(0, 4, 1, 2, 3)
    read = [read_clip(folder / "videos" / f"{number}.mp4", start=0, frames=17, size=16) for number in range(3)]
    real = torch.from_numpy(np.stack(read)).permute(0, 4, 1, 2, 3)
    scores = report["scores"]
    fvd = frechet_video_distance(real[:, :, :16], made[:, :, :16], RandomConvFeatures(), "styleganv")
    assert scores["distance"]["value"] == pytest.approx(float(fvd), rel=1e-6)
    expected = clip_score(made, CAPTIONS, CLIP(clip_folder), frames=17)
    assert scores["clip_score"]["value"]["score"] == pytest.approx(float(expected.mean()), rel=1e-6)
    expected = by_hand(IntervalPSNR((1, 2, 4, 8, 16)), real, made)["generated"].tolist()
    assert scores["interval_psnr"]["value"]["generated"] == pytest.approx(expected, rel=1e-6)
    data = torch.stack([TokenShards(folder / "tokens")[number]["tokens"] for number in range(3)]).flatten(1)
    words = caption_ids(load_text_tokenizer(str(folder / "words")), list(CAPTIONS))
    for name, values in (("data", data), ("generated", ids)):
        logits = module(words, values)
        loss = F.cross_entropy(logits.transpose(1, 2), values + module.network.text_ids).item()
        assert scores[f"position_loss_{name}"]["value"]["mean"] == pytest.approx(loss, rel=1e-5)
    assert report["setting"]["generation"] == {
        **{"temperature": 1.0, "top_k": None, "top_p": None},
        **{"cfg_scale": 2.0, "seed": 3},
    }


@pytest.mark.parametrize("option", ["first_blocks", "length", "window_blocks", "context_blocks"])
def test_what_a_text_to_video_model_does_not_offer_is_refused_by_name(texts, tmp_path, option):
    folder, tokenizer, model = texts
    callback = EvaluateVideos(tokenizer, output=str(tmp_path), videos=str(folder / "videos"), **{option: 1})
    with pytest.raises(ValueError, match=f"{option} must be left out for a TextVideoModel, .* got 1"):
        callback.on_test_start(SimpleNamespace(world_size=1), load_module(model, TextVideoModel))


def test_modules_that_cannot_be_scored_are_refused(files):
    callback, module = EvaluateVideos(files[1]), load_module(files[2], VideoModel)
    module._device_mesh = object()  # what ModelParallelStrategy sets
    with pytest.raises(MisconfigurationException, match=r"whole model on every device.* in place of SimpleNamespace"):
        callback.on_test_start(SimpleNamespace(world_size=2, strategy=SimpleNamespace()), module)
    with pytest.raises(MisconfigurationException, match="a VideoModel or a TextVideoModel, got VQVAE"):
        callback.on_test_start(SimpleNamespace(world_size=1), load_module(files[1], VQVAE))


@pytest.mark.parametrize(("options", "most"), [({}, 2), ({"length": 9, "videos": "videos"}, 3)])
def test_refuses_more_first_blocks_than_there_are(files, options, most):
    callback = EvaluateVideos(files[1], first_blocks=4, **options)
    with pytest.raises(ValueError, match=f"first_blocks must be 0 to {most}, .* got 4"):
        callback.on_test_start(SimpleNamespace(world_size=1), load_module(files[2], VideoModel))


if __name__ == "__main__":  # one of two processes
    folder, output = map(Path, sys.argv[1:])
    evaluate(
        (folder, str(folder / "vq.ckpt"), str(folder / "model.ckpt")), output, "--trainer.strategy=ddp", processes=2
    )
