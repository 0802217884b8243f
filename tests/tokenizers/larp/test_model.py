# SPDX-License-Identifier: Apache-2.0
"""`LARPTokenizer` against vectors of the published code: ids, clips, likelihoods, tables, and what ids are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from reco_lightning.data.tokens.shards import TokenShards
from reco_lightning.data.tokens.writer import TokenShardWriter
from reco_lightning.tokenizers import LARPTokenizer, VideoTokenizer, load_tokenizer
from reco_lightning.tokenizers.base import to_unit_range
from reco_lightning.tokenizers.larp.config import LARPConfig
from reco_lightning.tokenizers.larp.layers import code_scores
from reco_lightning.tokenizers.larp.tables import patch_positions, sine_table

DATA = Path(__file__).parents[2] / "data" / "larp"
CASES = ("video_16x32", "video_8x32_short")


@pytest.fixture(scope="module")
def tokenizer():
    return LARPTokenizer.from_pretrained(DATA)


def vectors(case):
    """The case's tensors and its clips, (B, 3, T, 32, 32) in [-1, 1]."""
    stored = load_file(DATA / f"{case}.safetensors")
    return stored, to_unit_range(stored["input_uint8_bthwc"])


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_published_code(tokenizer, case):
    stored, video = vectors(case)
    ids = tokenizer.encode(video)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(video), *tokenizer.grid(*video.shape[2:])) == (len(video), 48)
    assert torch.equal(ids, stored["indices"])
    torch.testing.assert_close(tokenizer._features(video), stored["projected_z"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_decoded_clips_are_those_of_the_published_code(tokenizer, case):
    stored, video = vectors(case)
    frames = video.shape[2]
    decoded = tokenizer.decode(stored["indices"], frames=frames)
    assert decoded.shape == video.shape
    expected = 2 * stored["recon_of_last_clip"] - 1
    torch.testing.assert_close(decoded[-1][:, stored["recon_frames"]], expected, atol=2e-5, rtol=0)
    assert expected.abs().max() > 3  # there is something to clamp
    assert torch.equal(tokenizer.decode(stored["indices"], clamp=True, frames=frames), decoded.clamp(-1, 1))


@pytest.mark.parametrize("case", CASES)
def test_likelihoods_are_those_of_the_published_code_and_draws_follow_them(tokenizer, case):
    stored, video = vectors(case)
    expected = stored["probs_first4"]
    quantiser = tokenizer.bottleneck.regularizer
    torch.testing.assert_close(quantiser.probabilities(stored["projected_z"][:, :4]), expected, atol=2e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    drawn = quantiser(stored["projected_z"][:1, :1].expand(1, 4000, -1), generator)
    share = torch.bincount(drawn.flatten(), minlength=256) / 4000
    assert (share - expected[0, 0]).abs().max() < 0.04
    again = [tokenizer.encode(video, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], stored["indices"])


def test_tables_that_can_be_computed_are_those_stored():
    stored = load_file(DATA / "model.safetensors")
    for name, table in (
        ("encoder_patch_pe", patch_positions((4, 4, 4), 64)),
        ("decoder_patch_query_embed", patch_positions((4, 4, 4), 96)),
        ("decoder_latent_pe", sine_table(96, 48)),
    ):
        torch.testing.assert_close(table[None], stored[name], atol=3e-7, rtol=0)


def test_the_release_has_these_weights():
    """Names and shapes of `hywang66/LARP-L-long-tokenizer`, written out."""
    n, d = 1024, 768
    block = {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
    }
    expected = {
        "encoder_latent_query_embed": (n, d),
        "encoder_patch_pe": (1, n, d),
        "decoder_latent_pe": (1, n, d),
        "decoder_patch_query_embed": (1, n, d),
        "decoder_patch_query_token_type_embed": (1, 1, d),
        "x_embedder.proj.weight": (d, 3, 4, 8, 8),
        "x_embedder.proj.bias": (d,),
        "bottleneck.in_linear.weight": (16, d),
        "bottleneck.in_linear.bias": (16,),
        "bottleneck.out_linear.weight": (d, 16),
        "bottleneck.out_linear.bias": (d,),
        "bottleneck.regularizer.embedding.weight": (8192, 16),
        "final_layer.norm_final.weight": (d,),
        "final_layer.norm_final.bias": (d,),
        "final_layer.linear.weight": (d, d),
        "final_layer.linear.bias": (d,),
        **{f"{side}.blocks.{i}.{k}": v for side in ("encoder", "decoder") for i in range(12) for k, v in block.items()},
    }
    with torch.device("meta"):
        tokenizer = LARPTokenizer()
    assert {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()} == expected
    assert len(expected) == 280
    assert tokenizer.grid(16, 128, 128) == (1024,)


def test_frozen_in_evaluation_mode_and_without_graphs(tokenizer):
    parent = nn.ModuleDict({"tokenizer": tokenizer}).train()
    assert parent.training
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    _, video = vectors("video_8x32_short")
    assert not tokenizer.encode(video.requires_grad_()).requires_grad
    assert not tokenizer.decode(tokenizer.encode(video)).requires_grad
    assert isinstance(tokenizer, VideoTokenizer)
    assert not tokenizer.frame_aligned


def test_a_clip_has_the_same_ids_in_every_batch(tokenizer):
    stored, video = vectors("video_16x32")
    assert torch.equal(tokenizer.encode(video[1:]), stored["indices"][1:])
    many = torch.cat([video] * 50)  # more rows than are compared at once
    assert torch.equal(tokenizer.encode(many), torch.cat([stored["indices"]] * 50))


@pytest.mark.slow
def test_compiles_whole(tokenizer):
    torch._dynamo.reset()
    stored, video = vectors("video_8x32_short")
    encode = torch.compile(tokenizer.encode, fullgraph=True, backend="aot_eager")
    decode = torch.compile(tokenizer.decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(encode(video), stored["indices"])
    torch.testing.assert_close(decode(stored["indices"]), tokenizer.decode(stored["indices"]), atol=2e-5, rtol=0)


def test_bfloat16_weights_and_autocast(tokenizer):
    stored, video = vectors("video_16x32")
    half = LARPTokenizer.from_pretrained(DATA).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tokenizer.encode(video)
    for ids in (half.encode(video), half.encode(video.bfloat16()), mixed):
        assert (ids == stored["indices"]).float().mean() > 0.8  # codes that lie close are told apart by rounding
    decoded = half.decode(stored["indices"])
    assert decoded.dtype == torch.bfloat16
    assert (decoded - tokenizer.decode(stored["indices"])).abs().mean() < 0.05


def test_codes_are_compared_in_float32_whatever_is_around():
    features, codes = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.eye(16)
    expected = features / features.norm(dim=-1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = code_scores(features, 3 * codes)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)


def test_ids_are_holistic(tokenizer):
    """Later frames change ids all along the row, and one id changes all frames."""
    stored, video = vectors("video_16x32")
    other = video.clone()
    other[:, :, 12:] = -other[:, :, 12:]
    moved = F.normalize(tokenizer._features(video), dim=-1) - F.normalize(tokenizer._features(other), dim=-1)
    quarters = moved.norm(dim=-1).mean(dim=0).view(4, 12).mean(dim=1)
    assert quarters.min() > 0.5 * quarters.max() > 0
    ids = stored["indices"].clone()
    ids[:, 0] = (ids[:, 0] + 1) % 256
    frames = (tokenizer.decode(ids) - tokenizer.decode(stored["indices"])).abs().mean(dim=(0, 1, 3, 4))
    assert frames.min() > 0.2 * frames.max() > 0


def test_first_frames_know_nothing_of_those_after_them(tokenizer):
    _, video = vectors("video_16x32")
    other = video.clone()
    other[:, :, 5:] = 0.3
    alone = tokenizer.encode_first_frames(video)
    assert torch.equal(alone, tokenizer.encode_first_frames(other, frames=5))
    by_hand = torch.cat([video[:, :, :5], *[video[:, :, 4:5]] * 11], dim=2)
    assert torch.equal(alone, tokenizer.encode(by_hand))
    assert not torch.equal(tokenizer.encode(video), tokenizer.encode(other))
    assert torch.equal(tokenizer.encode_first_frames(video, 16), tokenizer.encode(video))
    with pytest.raises(ValueError, match="frames must be 1 to 8, got 9 of a clip of 8"):
        tokenizer.encode_first_frames(video[:, :, :8], 9)


def test_its_folder_is_loaded_as_any_tokenizers(tokenizer):
    loaded = load_tokenizer(DATA, vocab_size=256)
    assert isinstance(loaded, LARPTokenizer)
    assert loaded.codebook_size == 256


def test_token_shards_hold_its_ids(tokenizer, tmp_path):
    stored, video = vectors("video_16x32")
    grid = tokenizer.grid(*video.shape[2:])
    with TokenShardWriter(tmp_path, vocab_size=256, grid=grid, frame_aligned=tokenizer.frame_aligned) as writer:
        writer.write(tokenizer.encode(video))
    shards = TokenShards(tmp_path)
    assert not shards.manifest.frame_aligned
    assert np.array_equal(np.stack([shards[index]["tokens"] for index in range(2)]).reshape(2, 48), stored["indices"])


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    weights = load_file(DATA / "model.safetensors")
    assert any(key.startswith("prior_model.") for key in weights)  # which are left out, as the other tests show
    del weights["x_embedder.proj.bias"], weights["encoder.blocks.1.norm1.weight"]
    weights["surprise"] = torch.zeros(1)
    weights["decoder_latent_pe"] = weights["decoder_latent_pe"][:, :5].clone()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((DATA / "config.json").read_text())
    with pytest.raises(
        ValueError,
        match=r"Missing: encoder.blocks.1.norm1.weight, x_embedder.proj.bias. Unknown: surprise. "
        r"Of another shape: decoder_latent_pe \(1, 5, 96\) instead of \(1, 48, 96\)",
    ):
        LARPTokenizer.from_pretrained(tmp_path)


def test_folders_that_hold_no_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in .*; download the model"):
        LARPTokenizer.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be a JSON file, but cannot be read"):
        LARPTokenizer.from_pretrained(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object, got a list"):
        LARPTokenizer.from_pretrained(tmp_path)
    config.write_text(json.dumps({"n_layer": 2, "vocab_size": 8}))
    with pytest.raises(ValueError, match=r"got LARP's video model .*LARPTransformer.from_pretrained"):
        LARPTokenizer.from_pretrained(tmp_path)
    config.write_text((DATA / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"there is no model.safetensors in"):
        LARPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"must be a safetensors file, but cannot be read"):
        LARPTokenizer.from_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "reco_lightning\[tokenizers\]"'):
        LARPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 32, 16), "width must be 32 pixels, got 16; resize or crop the clips to 32 x 32"),
        ((1, 3, 16, 64, 32), "height must be 32 pixels, got 64"),
        ((1, 3, 17, 32, 32), "frames must be a multiple of 4 up to 16, got 17"),
        ((1, 3, 20, 32, 32), "frames must be a multiple of 4 up to 16, got 20"),
        ((1, 4, 16, 32, 32), r"video must be floating point of shape \(B, 3, T, H, W\)"),
    ],
)
def test_clips_that_do_not_fit(tokenizer, shape, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(torch.zeros(shape))


def test_ids_that_do_not_fit(tokenizer):
    for ids in (torch.zeros(1, 47, dtype=torch.long), torch.zeros(48, dtype=torch.long), torch.zeros(1, 48)):
        with pytest.raises(ValueError, match=r"ids must be integers of shape \(B, 48\)"):
            tokenizer.decode(ids)
    for wrong in (-1, 256):
        with pytest.raises(
            ValueError, match=f"ids must be 0 to 255, got {min(wrong, 0)} to {max(wrong, 0)}; were they"
        ):
            tokenizer.decode(torch.tensor([[wrong] + [0] * 47]))
    with pytest.raises(ValueError, match="frames must be a multiple of 4 up to 16, got 6"):
        tokenizer.decode(torch.zeros(1, 48, dtype=torch.long), frames=6)


def test_ids_are_not_drawn_without_a_distribution():
    sizes = {"input_size": 16, "bottleneck_token_num": 4, "encoder_hidden_size": 8, "decoder_hidden_size": 8}
    depths = {"encoder_depth": 1, "decoder_depth": 1, "encoder_num_heads": 2, "decoder_num_heads": 2}
    tokenizer = LARPTokenizer(LARPConfig(stochastic=False, codebook_size=8, **sizes, **depths))
    with pytest.raises(ValueError, match="generator must be None for a tokenizer without stochastic ids"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16, 16), generator=torch.Generator())
