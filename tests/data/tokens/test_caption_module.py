# SPDX-License-Identifier: Apache-2.0
"""Captions as ids, in training batches and as requests for videos."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from reco_lightning.data.tokens.caption_ids import caption_ids, load_text_tokenizer, trim_captions
from reco_lightning.data.tokens.caption_module import CaptionDataModule
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import ClipSource, TokenShardWriter
from reco_lightning.pipelines.predict.caption_requests import CaptionRequests
from tests.helpers.words import save_words

GRID = (2, 1, 2)
WORDS = ("a", "red", "square", "moves")
TEXTS = ("a red square", None, "red", "a square moves blue")


@pytest.fixture
def words(tmp_path):
    return save_words(tmp_path / "words", WORDS)


@pytest.fixture
def folder(tmp_path):
    """Twelve clips; clip i holds the ids 4 i to 4 i + 3 and the text i modulo 4."""
    with TokenShardWriter(tmp_path / "tokens", vocab_size=48, grid=GRID, shard_size=5) as writer:
        writer.write(
            np.arange(48).reshape(12, *GRID),
            np.zeros(12, dtype=np.int64),
            [ClipSource(f"{clip}.mp4", 0, 5) for clip in range(12)],
            captions=[TEXTS[clip % 4] for clip in range(12)],
        )
    return str(tmp_path / "tokens")


def test_ids_are_the_tokenizers_padded_in_front(words):
    ids = caption_ids(load_text_tokenizer(words), TEXTS)
    assert ids.tolist() == [[-1, 0, 1, 2], [-1, -1, -1, -1], [-1, -1, -1, 1], [0, 2, 3, 4]]
    assert caption_ids(load_text_tokenizer(words), TEXTS, max_tokens=2).tolist() == [[0, 1], [-1, -1], [-1, 1], [0, 2]]


def test_no_captions_at_all_have_no_columns(words):
    assert caption_ids(load_text_tokenizer(words), [None, None]).shape == (2, 0)
    assert trim_captions(torch.full((2, 3), -1)).shape == (2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_clip_comes_with_its_own_text(workers, folder, words):
    module = CaptionDataModule(folder, text_tokenizer=words, batch_size=3, num_workers=workers, val_fraction=0.25)
    module.setup("fit")
    expected = caption_ids(load_text_tokenizer(words), TEXTS)
    seen = []
    for batch in [*module.train_dataloader(), *module.val_dataloader()]:
        for tokens, caption in zip(batch["tokens"], batch["caption"], strict=True):
            clip = int(tokens[0]) // 4
            seen.append(clip)
            assert caption.tolist() == expected[clip % 4].tolist()
    assert sorted(seen) == list(range(12))


def test_batches_are_those_without_captions(folder, words):
    options = {"batch_size": 3, "val_fraction": 0.25, "seed": 5}
    modules = CaptionDataModule(folder, text_tokenizer=words, **options), TokenDataModule(folder, **options)
    for module in modules:
        module.setup("fit")
    for own, plain in zip(*(module.train_dataloader() for module in modules), strict=True):
        assert own["tokens"].equal(plain["tokens"])


def test_a_batch_is_cut_to_its_longest_caption(folder, words):
    module = CaptionDataModule(folder, text_tokenizer=words)
    batch = {"tokens": torch.zeros(2, 4), "caption": torch.tensor([[-1, -1, -1, 1], [-1, -1, 3, 2]])}
    assert module.on_before_batch_transfer(batch, 0)["caption"].tolist() == [[-1, 1], [3, 2]]
    assert module.on_before_batch_transfer([1], 0) == [1]


def test_shards_without_captions_are_refused(tmp_path, words):
    with TokenShardWriter(tmp_path / "plain", vocab_size=8, grid=GRID) as writer:
        writer.write(np.zeros((4, *GRID), dtype=np.int64), np.zeros(4, dtype=np.int64))
    with pytest.raises(ValueError, match="folder must hold token shards with captions"):
        CaptionDataModule(str(tmp_path / "plain"), text_tokenizer=words).setup("fit")


def test_requests_are_lines_of_a_file(tmp_path, words):
    path = tmp_path / "captions.txt"
    path.write_text("a red square\n\nred\n")
    module = CaptionRequests(str(path), text_tokenizer=words, videos_per_caption=2, batch_size=4, cfg_scale=2.0)
    module.setup("predict")
    batches = list(module.predict_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert batches[0]["caption"].tolist() == [[0, 1, 2], [0, 1, 2], [-1, -1, -1], [-1, -1, -1]]
    assert batches[1]["caption"].tolist() == [[1], [1]]
    assert batches[0]["options"]["cfg_scale"] == 2.0


@pytest.mark.parametrize(("text", "what"), [(None, "no such file"), ("", "is empty")])
def test_requests_without_lines_are_refused(text, what, tmp_path, words):
    path = tmp_path / "captions.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"a caption in each line, got .*{what}"):
        CaptionRequests(str(path), text_tokenizer=words).setup("predict")


@pytest.mark.parametrize("name", ["max_caption_tokens", "videos_per_caption", "batch_size"])
def test_bad_requests_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got 0"):
        CaptionRequests("captions.txt", text_tokenizer="words", **{name: 0})


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_caption_tokens must be a whole number of 1 or more"):
        CaptionDataModule("tokens", text_tokenizer="words", max_caption_tokens=0)
    with pytest.raises(ValueError, match=r"tokenizer.json or tokenizer.model, got '.*', which holds neither"):
        load_text_tokenizer(str(tmp_path))


def test_without_transformers_the_error_names_the_extra(monkeypatch, words):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"reco_lightning\[hf\]"):
        load_text_tokenizer(words)
