# SPDX-License-Identifier: Apache-2.0
"""CLIP score with a tiny random CLIP on disk, against transformers' own forward and picture processor."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reco_lightning.metrics.clip_score import CLIP, CLIPScore, clip_pixels, clip_score
from reco_lightning.support.plots import frame_scores
from tests.helpers.metrics import joined, moving

SIZE = 30
TEXTS = ["a dog runs", "b"]


def save_tokenizer(folder):
    """CLIP's byte-pair files with letters and two words, written by hand."""
    letters = [chr(code) for code in range(33, 127)]
    merges = ["d o", "do g</w>", "r u", "ru n", "run s</w>"]
    entries = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {token: number for number, token in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    vocabulary = save_tokenizer(path)
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    text = common | ends | {"vocab_size": len(vocabulary), "max_position_embeddings": 12}
    vision = common | {"image_size": SIZE, "patch_size": 10}
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return CLIP(folder)


def videos():
    return torch.cat([moving(0, 3, 6, 9, size=48), 255 - moving(0, 1, 2, 3, size=48, seed=3)])[:, :, :, :40]


def picture_processor():
    """The one that needs no torchvision: the only one before transformers 5, a class of its own since."""
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (20, 35), (30, 30), (31, 90)])
def test_pictures_are_prepared_as_transformers_does(shape):
    frames = torch.randint(256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = picture_processor()(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pictures = list(frames.permute(0, 2, 3, 1).numpy())
    expected = torch.from_numpy(np.stack(processor(pictures, return_tensors="np")["pixel_values"]))
    found = clip_pixels(frames, SIZE)
    assert found.shape == expected.shape
    one_level = 1.01 / 255 / 0.26  # Pillow's weights have 22 bits
    assert (found - expected).abs().max() <= one_level
    assert (found - expected).abs().mean() < one_level / 100


def test_every_cosine_is_that_of_transformers(folder, encoder):
    network = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = clip_score(videos(), TEXTS, encoder, frames=4)
    assert found.shape == (2, 4)
    assert found.dtype == torch.float64
    for number, (video, text) in enumerate(zip(videos(), TEXTS, strict=True)):
        ids = tokenizer([text], return_tensors="pt")  # alone: no padding
        with torch.no_grad():
            output = network(**ids, pixel_values=clip_pixels(video.transpose(0, 1), SIZE))
        cosines = output.logits_per_image[:, 0] / network.logit_scale.exp()
        torch.testing.assert_close(found[number].float(), cosines, atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-4


def test_the_tokenizer_knows_words(encoder):
    ids = encoder.tokenizer(["a dog runs"])["input_ids"][0]
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        "a</w>",
        "dog</w>",
        "runs</w>",
        "<|endoftext|>",
    ]


def test_scored_frames_are_evenly_spaced(encoder):
    video = videos()[:1]
    every = clip_score(video, ["a"], encoder, frames=4)
    assert torch.allclose(clip_score(video, ["a"], encoder, frames=2), every[:, [0, 3]])
    assert torch.allclose(clip_score(video, ["a"], encoder, frames=1), every[:, [0]])


def test_too_long_a_text_is_cut_off(encoder):
    longest = 12 - 2  # start and end take their places
    cut = clip_score(videos()[:1], ["a " * longest], encoder, frames=1)
    assert torch.allclose(clip_score(videos()[:1], ["a " * longest + "dog " * 50], encoder, frames=1), cut)


def test_the_metric_is_the_mean_and_two_processes_agree(folder):
    one, first, second = (CLIPScore(folder, frames=3) for _ in range(3))
    one.update(videos(), TEXTS)
    found = one.compute()
    cosines = clip_score(videos(), TEXTS, one.encoder, frames=3)
    torch.testing.assert_close(found["frame"], cosines.mean(0))
    assert found["score"].item() == pytest.approx(cosines.mean().item(), rel=1e-9)
    first.update(videos()[:1], TEXTS[:1])
    second.update(videos()[1:], TEXTS[1:])
    together = joined(first, second)
    assert all(torch.allclose(together[name], found[name], rtol=1e-6) for name in found)
    record = one.record()
    assert record["value"]["score"] == found["score"].item()
    assert first.record()["clips"] == record["clips"] == {"generated": 2}
    assert (record["frames"], record["weights"]) == (3, one.encoder.weights_hash)
    assert len(one.encoder.weights_hash) == 64


def test_weights_enter_no_checkpoint_and_change_the_hash(folder):
    metric = CLIPScore(folder, frames=1)
    assert not metric.state_dict()
    assert not list(metric.parameters())
    assert not any(parameter.requires_grad for parameter in metric.encoder.network.parameters())
    other = CLIP(folder)
    assert other.weights_hash == metric.encoder.weights_hash
    changed = CLIP(folder)
    changed.network.visual_projection.weight.data[0, 0] += 1
    assert changed.weights_hash != other.weights_hash
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(videos(), TEXTS)
    assert copy.compute()["frame"].item() == copy.compute()["score"].item()  # torchmetrics drops an axis of one
    assert len(copy.plot()[1].lines[0].get_xdata()) == 1


def test_a_folders_own_normalisation_is_taken(folder, tmp_path, encoder):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    frames = videos()[0].transpose(0, 1)
    own = CLIP(tmp_path)
    with torch.no_grad():
        pixels = clip_pixels(frames, SIZE, mean=(0, 0, 0), std=(1, 1, 1))
        assert 0 <= pixels.min() < pixels.max() <= 1
        expected = own.network.visual_projection(own.network.vision_model(pixel_values=pixels).pooler_output)
    found = own.pictures(frames, torch.device("cpu"))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, encoder.pictures(frames, torch.device("cpu")))


def test_the_curve_by_frame(folder):
    metric = CLIPScore(folder, frames=3)
    metric.update(videos(), TEXTS)
    fig, ax = metric.plot()
    assert fig is ax.figure
    assert list(ax.lines[0].get_ydata()) == pytest.approx(metric.compute()["frame"].tolist())
    assert "cosine" in ax.get_ylabel()


def test_a_figure_needs_frames():
    for wrong in ({}, {"ReCo": []}):
        with pytest.raises(ValueError, match="scores must hold runs of one frame or more each, got numbers of frames"):
            frame_scores(wrong, y_label="CLIP score (cosine)")


def test_refusals(folder, tmp_path, encoder):
    with pytest.raises(
        ValueError, match=r"folder must hold a CLIP network of transformers, got .* with no config\.json"
    ):
        CLIPScore(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="with one of type 'bert'; download one, such as"):
        CLIPScore(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(
        ValueError, match=r"folder must hold CLIP's tokenizer beside its weights, got .* without tokeniz"
    ):
        CLIPScore(tmp_path)
    with pytest.raises(ValueError, match="frames must be a whole number of 1 or more, got 0"):
        CLIPScore(folder, frames=0)
    with pytest.raises(ValueError, match="frames must lie from 1 to 4, the length of the videos, got 5"):
        clip_score(videos(), TEXTS, encoder, frames=5)
    with pytest.raises(ValueError, match="texts must be a list of one text for each of 2 videos, got 1"):
        clip_score(videos(), TEXTS[:1], encoder, frames=1)
    with pytest.raises(ValueError, match="for each of 2 videos, got one string"):
        clip_score(videos(), "ab", encoder, frames=1)
    with pytest.raises(ValueError, match="videos must be uint8"):
        clip_score(videos().float(), TEXTS, encoder, frames=1)


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'CLIPScore needs transformers: pip install "reco_lightning\[hf\]"'):
        CLIP(folder)
