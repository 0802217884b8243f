# SPDX-License-Identifier: Apache-2.0
"""`load_tokenizer` tells what a path holds by its content, and runs no code that lies there."""

from __future__ import annotations

import argparse
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from reco_lightning import VideoModel, VideoTransformer
from reco_lightning.tokenizers import Emu3Tokenizer, VidTokTokenizer, load_tokenizer
from reco_lightning.tokenizers.loading import tokenizer_kind
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers import tiny_tokenizers as tiny
from tests.helpers.checkpoints import save


def folder_with(path, config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def frozen(tokenizer):
    parameters = list(tokenizer.parameters())
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return on_cpu and not tokenizer.training and not any(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("class_path", [None, "reco_lightning.tokenizers.vqvae.VQVAE"])
def test_a_lightning_checkpoint_under_any_name(tmp_path, class_path):
    own = tiny.vqvae()
    path = save(own, tmp_path / "config.json")
    if class_path:  # as a command line writes it
        stored = torch.load(path, weights_only=True)
        stored["hyper_parameters"]["_class_path"] = class_path
        torch.save(stored, path)
    tokenizer = load_tokenizer(path)
    assert type(tokenizer) is VQVAE
    assert frozen(tokenizer)
    video = tiny.clips(5, 32, 16)
    assert torch.equal(tokenizer.encode(video), own.encode(video))


@pytest.mark.slow
def test_folders_of_transformers_and_diffusers(tmp_path):
    emu3, vidtok = tiny.emu3_network(), tiny.vidtok_network()
    emu3.save_pretrained(tmp_path / "a.ckpt")
    vidtok.save_pretrained(tmp_path / "b")
    for path, kind, own in (("a.ckpt", Emu3Tokenizer, emu3), ("b", VidTokTokenizer, vidtok)):
        tokenizer = load_tokenizer(tmp_path / path)
        assert type(tokenizer) is kind
        assert frozen(tokenizer)
        video = tiny.clips(*((4, 16, 8) if kind is Emu3Tokenizer else (5, 16, 8)))
        assert torch.equal(tokenizer.encode(video), kind(own).encode(video))
        assert type(load_tokenizer(str(tmp_path / path))) is kind


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"state_dict": {"codebook.embeddings": torch.zeros(2, 2)}}, "OmniTokenizer"),
        ({"codebook.embeddings": torch.zeros(2, 2)}, "OmniTokenizer"),
        # its language models: OmniTokenizer says what they are
        ({"state_dict": {"wte": torch.zeros(2)}, "hyper_parameters": {"args": argparse.Namespace()}}, "OmniTokenizer"),
        ({"encoder.a": torch.zeros(1), "decoder.a": torch.zeros(1), "quantizer.a": torch.zeros(1)}, "VQVAE"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_kinds_of_files(tmp_path, stored, kind, zipped):
    torch.save(stored, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    assert tokenizer_kind(tmp_path / "x") == kind


def test_weights_alone_as_safetensors(tmp_path):
    save_file({"codebook.embeddings": torch.zeros(2, 2)}, tmp_path / "x", metadata={"a": "b"})
    assert tokenizer_kind(tmp_path / "x") == "OmniTokenizer"


def test_the_files_of_the_releases(tmp_path):
    tiny.save_omnitokenizer(tmp_path / "omni")
    tiny.save_larp(tmp_path / "larp")
    for path, own, size in (("omni", tiny.omnitokenizer(), (5, 32, 32)), ("larp", tiny.larp(), (16, 16, 16))):
        tokenizer = load_tokenizer(tmp_path / path)
        assert type(tokenizer) is type(own)
        assert frozen(tokenizer)
        assert torch.equal(tokenizer.encode(tiny.clips(*size)), own.encode(tiny.clips(*size)))
    (tmp_path / "larp" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no model\.safetensors in"):
        load_tokenizer(tmp_path / "larp")


def test_kinds_of_folders(tmp_path):
    larp = {"bottleneck": {"name": "bottleneck"}, "input_size": 32}
    assert tokenizer_kind(folder_with(tmp_path, larp)) == "LARPTokenizer"
    assert tokenizer_kind(folder_with(tmp_path, {"model_type": "emu3_vqgan"})) == "Emu3Tokenizer"
    assert tokenizer_kind(folder_with(tmp_path, {"_class_name": "AutoencoderVidTok"})) == "VidTokTokenizer"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {"model_type": "emu3", "vq_config": {}},
            r"another form \(model_type 'emu3'\).*save_pretrained its model\.vqmodel",
        ),
        ({"model_type": "Emu3VisionVQ"}, r"another form \(model_type 'Emu3VisionVQ'\)"),
        (
            {"vocab_size": 8192, "n_layer": 30, "cls_token_num": 1},
            "holds LARP's video model.*give the tokenizer that made",
        ),
        (
            {"_class_name": "AutoencoderKLWan"},
            r"holds the config\.json of AutoencoderKLWan; give a Lightning checkpoint",
        ),
        ({"b": 1, "a": 2}, r"holds a config\.json with the keys a, b; give"),
        ([1], r"holds a config\.json with a list, no object"),
    ],
)
def test_folders_of_something_else(tmp_path, config, found):
    with pytest.raises(ValueError, match=rf"{tmp_path.name}' holds .*") as info:
        load_tokenizer(folder_with(tmp_path, config))
    assert info.match(found)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds a folder without config\.json, with nothing; give a Lightning"):
        load_tokenizer(tmp_path)
    folder_with(tmp_path / "inner", {})
    with pytest.raises(ValueError, match=r"without config\.json, with inner; .*folder may lie deeper"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds a config\.json that is no JSON \(.*\).*download it again"):
        load_tokenizer(tmp_path)


def test_files_of_something_else(tmp_path):
    network = VideoTransformer(vocab_size=8, grid=(2, 2, 2), dim=32, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"holds a checkpoint of something else \(network\..*; give a Lightning"):
        load_tokenizer(save(VideoModel(network), tmp_path / "model.ckpt"))
    torch.save({"hyper_parameters": {"_class_path": "some.Model"}, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"holds a checkpoint of some\.Model \(nothing"):
        load_tokenizer(tmp_path / "x.ckpt")
    torch.save({"hyper_parameters": None, "state_dict": [1]}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"holds a checkpoint of something else \(nothing"):
        load_tokenizer(tmp_path / "x.ckpt")
    torch.save(torch.zeros(2), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds a Tensor; give"):
        load_tokenizer(tmp_path / "x.ckpt")


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "empty.ckpt").touch()
    for name in ("note.txt", "empty.ckpt"):
        with pytest.raises(
            ValueError, match=rf"{name}' holds a file that torch\.load.* does not read .*; give a Lightn"
        ):
            load_tokenizer(tmp_path / name)


def test_the_weights_of_a_folder(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a checkpoint of something else \(a, \.\.\.\); give .* AutoencoderVidTok$"):
        load_tokenizer(tmp_path / "model.safetensors")
    folder_with(tmp_path, {"_class_name": "AutoencoderVidTok"})
    with pytest.raises(ValueError, match=rf"the folder '.*{tmp_path.name}' may be meant"):
        load_tokenizer(tmp_path / "model.safetensors")


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"folder or checkpoint file, got 'hywang66/LARP' .*downloaded first"):
        load_tokenizer("hywang66/LARP")


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_of_the_file_is_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save(
        {"state_dict": {"codebook.embeddings": torch.zeros(1)}, "callbacks": Payload(str(trace))}, tmp_path / "x"
    )
    with pytest.raises(ValueError, match=r"holds a (posix|nt)\.mkdir, and reading that would run code.*: if you trust"):
        load_tokenizer(tmp_path / "x")
    assert not trace.exists()


def test_too_few_ids_for_the_model(tmp_path):
    path = save(tiny.vqvae(), tmp_path / "vqvae.ckpt")
    assert load_tokenizer(path, vocab_size=32).codebook_size == 32
    with pytest.raises(ValueError, match=r"must know the model's 33 ids, but it knows 32; .*vqvae\.ckpt'"):
        load_tokenizer(path, vocab_size=33)
