# SPDX-License-Identifier: Apache-2.0
"""Files of the OmniTokenizer release: what is loaded, what is left out by name, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reco_lightning.tokenizers.omnitokenizer.checkpoint import read_checkpoint, used_weights
from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig, config_from_weights
from reco_lightning.tokenizers.omnitokenizer.model import OmniTokenizer

DATA = Path(__file__).parents[2] / "data" / "omnitokenizer"
TINY = OmniTokenizerConfig(
    n_codes=32, embedding_dim=16, heads=4, dim_head=8, ff_width=20, twod_window_size=2, temporal_depth=2
)
REL = dataclasses.replace(TINY, spatial_pos="rel", temporal_patch_size=2)
VIDEO = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def native(config=TINY):
    torch.manual_seed(0)
    return OmniTokenizer(config)


def stored(config=TINY):
    """State dict of a tokenizer, with what a released file holds beside it."""
    weights = dict(native(config).state_dict())
    for key in json.loads((DATA / "shapes_joint_vq.json").read_text()):
        beside = not key.startswith(("encoder.", "decoder.", "pre_vq_conv.", "post_vq_conv.", "codebook.embeddings"))
        layer = "layers.2." not in key and "layers.3." not in key
        if beside or (layer and ("context_norm" in key or ("temporal" in key and "spatial_rel_pos_bias" in key))):
            weights[key] = torch.zeros(1)
    weights["video_perceptual_model.net.weight"] = weights["image_teacher.head.bias"] = torch.zeros(1)
    return weights


def options(config=TINY, **changes):
    """Training options as in the released files, misspelt."""
    known = {
        "spatial_depth": 4,
        "temporal_depth": config.temporal_depth,
        "enc_block": config.enc_block,
        "dec_block": config.dec_block,
        "spatial_pos": config.spatial_pos,
        "casual_in_temporal_transformer": True,
        "casual_in_peg": True,
        "l2_code": True,
        "use_vae": False,
        "patch_embed": "linear",
        "gen_upscale": None,
        "q_strides": "1111",
        "lr": 1e-4,
    }
    return {key: value for key, value in (known | changes).items() if value is not ...}


def save(path, weights, args=None):
    checkpoint = {"state_dict": weights, "epoch": 3, "callbacks": {}, "optimizer_states": [{"state": {}}]}
    if args is not None:
        checkpoint["hyper_parameters"] = {"args": argparse.Namespace(**args)}
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("config", [TINY, REL], ids=["joint", "image-only"])
def test_a_file_of_the_release_gives_its_tokenizer(tmp_path, config):
    tokenizer = OmniTokenizer.from_pretrained(save(tmp_path / "imagenet_k600.ckpt", stored(config), options(config)))
    original = native(config)
    assert tokenizer.config == config
    assert torch.equal(tokenizer.encode(VIDEO), original.encode(VIDEO))
    assert torch.equal(tokenizer.decode(tokenizer.encode(VIDEO)), original.decode(original.encode(VIDEO)))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in tokenizer.parameters())
    assert not tokenizer.training


@pytest.mark.parametrize("name", ["shapes_joint_vq", "shapes_image_only_vq"])
def test_the_released_shapes_tell_the_released_layouts(name):
    listing = json.loads((DATA / f"{name}.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in listing.items()}
    rel = {} if "joint" in name else {"temporal_patch_size": 2, "spatial_pos": "rel"}
    assert config_from_weights(used_weights(weights)) == OmniTokenizerConfig(**rel)


def test_a_state_dict_alone_is_enough(tmp_path):
    weights = native().state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        tokenizer = OmniTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.config == TINY
        assert torch.equal(tokenizer.encode(VIDEO), native().encode(VIDEO))


@pytest.mark.parametrize("flag", ["causal_in_temporal_transformer", "causal_in_peg"])
def test_both_spellings_are_read(flag):
    weights, misspelt = native().state_dict(), flag.replace("causal", "casual")
    for name in (flag, misspelt):
        assert getattr(config_from_weights(weights, {name: False}), flag) is False
        assert getattr(config_from_weights(weights, {name: True}), flag) is True
    with pytest.raises(ValueError, match=rf"options {flag} and {misspelt} are two spellings of one and must agree"):
        config_from_weights(weights, {flag: True, misspelt: False})


@pytest.mark.slow
def test_only_the_file_that_was_trained_so_gets_explicit_attention(tmp_path):
    for name, wanted in (("imagenet_only.ckpt", True), ("celebahq.ckpt", False)):
        path = save(tmp_path / name, stored(REL), options(REL))
        assert OmniTokenizer.from_pretrained(path).config.explicit_attention is wanted
        assert (
            OmniTokenizer.from_pretrained(path, explicit_attention=not wanted).config.explicit_attention is not wanted
        )


def test_missing_unknown_and_misshapen_keys_are_all_listed(tmp_path):
    weights = stored()
    del weights["decoder.to_pixels.0.bias"], weights["encoder.enc_spatial_transformer.layers.2.1.proj.weight"]
    weights["encoder.surprise"] = weights["ema.weight"] = torch.zeros(1)
    weights["codebook.M"] = torch.zeros(1)
    weights["pre_vq_conv.1.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"exactly the weights of OmniTokenizer") as error:
        OmniTokenizer.from_pretrained(save(tmp_path / "changed.ckpt", weights, options()))
    assert (
        "changed.ckpt must hold exactly the weights of OmniTokenizer. Missing: decoder.to_pixels.0.bias, "
        "encoder.enc_spatial_transformer.layers.2.1.proj.weight. Unknown: codebook.M, ema.weight, encoder.surprise. "
        "Of another shape: pre_vq_conv.1.bias (9,) instead of (8,)." in str(error.value)
    )


@pytest.mark.parametrize(
    ("stack", "last"), [("encoder.enc_spatial_transformer", 3), ("decoder.dec_temporal_transformer", 1)]
)
def test_a_lost_last_layer_is_missing_and_not_a_shallower_network(tmp_path, stack, last):
    weights = {key: value for key, value in stored().items() if not key.startswith(f"{stack}.layers.{last}.")}
    with pytest.raises(ValueError, match=rf"Missing: {stack}\.layers\.{last}\."):
        OmniTokenizer.from_pretrained(save(tmp_path / "short.ckpt", weights, options()))


def test_without_its_codes_nothing_can_be_told(tmp_path):
    weights = stored()
    del weights["codebook.embeddings"]
    with pytest.raises(
        ValueError, match=r"must hold the key codebook.embeddings, without which n_codes cannot be told"
    ):
        OmniTokenizer.from_pretrained(save(tmp_path / "x.ckpt", weights))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("imagenet_ucf_vae.ckpt", "a continuous VAE"),
        ("imagenet_k600_vae.ckpt", "a continuous VAE"),
        ("imagenet_class_lm.ckpt", "a language model"),
        ("ucf_class_lm.ckpt", "a language model"),
        ("k600_fp_lm.ckpt", "a language model"),
        ("latte_17frms.pt", "a diffusion model"),
    ],
)
def test_other_models_of_the_release_are_refused_by_name(tmp_path, name, kind):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is {kind}.*; the VQ tokenizers of the release are imagenet_ucf, "):
        OmniTokenizer.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "args", "kind"),
    [
        ({"pre_vq_conv.1.weight": torch.zeros(16, 16), "pre_vq_conv.1.bias": torch.zeros(16)}, {}, "a continuous VAE"),
        ({}, {"use_vae": True}, "a continuous VAE"),
        ("transformer.tok_emb.weight", {}, "a language model"),
        ("wte.weight", {}, "a language model"),
    ],
)
def test_other_models_under_another_name_are_refused_too(tmp_path, changes, args, kind):
    weights = {changes: torch.zeros(1)} if isinstance(changes, str) else stored() | changes
    with pytest.raises(ValueError, match=rf"mine\.ckpt is {kind}"):
        OmniTokenizer.from_pretrained(save(tmp_path / "mine.ckpt", weights, options(**args)))


def test_options_that_no_release_has_are_refused():
    weights = native().state_dict()
    for name, value in (("patch_embed", "cnn"), ("defer_spatial_pool", True), ("gen_upscale", 2)):
        with pytest.raises(
            ValueError, match=rf"option {name} must be .*, as in all released checkpoints, got {value!r}"
        ):
            config_from_weights(weights, {name: value})
    with pytest.raises(ValueError, match=r"option spatial_pos is 'rel', but the weights have no keys"):
        config_from_weights(weights, {"spatial_pos": "rel"})
    with pytest.raises(ValueError, match=r"option spatial_pos is 'rope', but the weights have keys"):
        config_from_weights(native(REL).state_dict(), {"spatial_pos": "rope"})


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_a_file_is_run(tmp_path):
    path = tmp_path / "harmful.ckpt"
    torch.save({"state_dict": stored(), "callbacks": {"x": _Harmful(tmp_path / "harmed")}}, path)
    with pytest.raises(
        ValueError, match=r"harmful.ckpt cannot be read without running code in it .*weights_only=False"
    ):
        OmniTokenizer.from_pretrained(path)
    assert not (tmp_path / "harmed").exists()


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.ckpt.*; download one of imagenet_ucf"):
        OmniTokenizer.from_pretrained(tmp_path / "nowhere.ckpt")
    (tmp_path / "a.ckpt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"a.ckpt cannot be read"):
        OmniTokenizer.from_pretrained(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"path must be a checkpoint file, got the folder .*\['a.ckpt'\]"):
        OmniTokenizer.from_pretrained(tmp_path)
    for content, message in (([1], "got a list"), ({"epoch": 1}, "but holds epoch"), ({}, "but holds nothing")):
        torch.save(content, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=message):
            OmniTokenizer.from_pretrained(tmp_path / "b.ckpt")


def test_safetensors_need_their_package(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"reco_lightning\[tokenizers\]"):
        OmniTokenizer.from_pretrained(tmp_path / "weights.safetensors")


def test_options_may_be_a_plain_mapping(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": stored(), "hyper_parameters": options(l2_code=False)}, path)
    assert read_checkpoint(path)[1]["q_strides"] == "1111"
    assert OmniTokenizer.from_pretrained(path).config.l2_code is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_codes": 0}, "n_codes must be a whole number of 1 or more, got 0"),
        ({"temporal_depth": -1}, "temporal_depth must be a whole number of 0 or more, got -1"),
        ({"enc_block": "ttaw"}, r'enc_block must hold one letter per layer, "t" .*got \'ttaw\'; pooling'),
        ({"spatial_pos": "sin"}, r'spatial_pos must be "rope" or "rel", got \'sin\''),
        ({"dim_head": 6}, r"dim_head must be a multiple of 4 with spatial_pos \"rope\", got 6"),
        ({"heads": 3}, "embedding_dim must be a multiple of heads .* got 16 and 3"),
        ({"heads": 6, "embedding_dim": 24, "explicit_attention": True}, "heads must be a power of two .* got 6"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
