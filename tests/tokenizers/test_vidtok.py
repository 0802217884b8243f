# SPDX-License-Identifier: Apache-2.0
"""`VidTokTokenizer` against the network of diffusers, called by hand with what it gets wrong."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from reco_lightning.tokenizers.vidtok import VidTokTokenizer
from tests.helpers import tiny_tokenizers as tiny

pytestmark = pytest.mark.third_party


@pytest.fixture(scope="module")
def causal():
    return tiny.vidtok_network().eval()


@pytest.fixture(scope="module")
def blockwise():
    return tiny.vidtok_network(causal=False).eval()


def test_causal_ids_are_those_of_the_padded_clip(causal):
    tokenizer, video = VidTokTokenizer(causal), tiny.clips(17, 16, 8)
    with torch.no_grad():
        short = causal.encode(video)[1]  # its own encode does not pad
        assert short.shape == (2, 4, 4, 2)
        assert causal.decode(short, decode_from_indices=True).shape[2] == 13
        expected = causal.encode(torch.cat([video[:, :, :1]] * 3 + [video], dim=2))[1]
        decoded = causal.decode(expected, decode_from_indices=True)
        complete = causal(video).sample  # forward pads
    ids = tokenizer.encode(video)
    assert ids.shape == (2, 5, 4, 2)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.long())
    assert ids.unique().numel() > 8
    assert torch.equal(tokenizer.decode(ids), decoded)
    assert torch.equal(decoded, complete)


def test_a_causal_clip_begins_with_the_ids_of_its_beginning(causal):
    tokenizer, video = VidTokTokenizer(causal), tiny.clips(17, 16, 8)
    ids = tokenizer.encode(video)
    for frames, blocks in ((1, 1), (5, 2), (13, 4)):
        assert torch.equal(tokenizer.encode(video[:, :, :frames]), ids[:, :blocks])
    assert tokenizer.decode(ids[:, :1]).shape == (2, 3, 1, 16, 8)


def test_the_other_kind_takes_whole_blocks_of_sixteen_frames(blockwise):
    tokenizer, video = VidTokTokenizer(blockwise), tiny.clips(16, 16, 8)
    with torch.no_grad():
        quantised, expected = blockwise.encode(video)
        decoded = blockwise.decode(quantised)
        lossy = blockwise.encode(tiny.clips(20, 16, 8))[1]
        assert lossy.shape[1] == 5
        assert blockwise.decode(lossy, decode_from_indices=True).shape[2] == 16  # four frames are gone
    ids = tokenizer.encode(video)
    assert torch.equal(ids, expected.long())
    assert torch.equal(tokenizer.decode(ids), decoded)
    assert tokenizer.grid(32, 16, 8) == (8, 4, 2)
    with pytest.raises(ValueError, match="frames must be a multiple of 16, got 20; take clips of 16 or 32"):
        tokenizer.encode(tiny.clips(20, 16, 8))
    with pytest.raises(
        ValueError, match="ids must have a multiple of 4 latent frames, got 5; the last 1 would be lost"
    ):
        tokenizer.decode(lossy)


def test_half_precision_decodes(causal):
    tokenizer = VidTokTokenizer(copy.deepcopy(causal)).bfloat16()
    ids = tokenizer.encode(tiny.clips(5, 16, 8))
    with pytest.raises(RuntimeError, match="should be the same"), torch.no_grad():
        tokenizer.model.decode(ids, decode_from_indices=True)
    video = tokenizer.decode(ids)
    assert video.dtype == torch.bfloat16
    assert video.isfinite().all()


def test_nothing_is_kept_of_the_last_clip(causal):
    tokenizer = VidTokTokenizer(copy.deepcopy(causal))
    caching = [module for module in tokenizer.modules() if hasattr(module, "causal_cache")]
    assert len(caching) > 10
    ids = tokenizer.encode(tiny.clips(5, 16, 8))
    assert all(module.causal_cache is None for module in caching)
    tokenizer.decode(ids)
    assert all(module.causal_cache is None for module in caching)


def test_the_number_of_ids_is_that_of_the_codes():
    assert VidTokTokenizer(tiny.vidtok_network(codebook_size=600)).codebook_size == 8**3


def test_the_continuous_kind_is_refused():
    with pytest.raises(ValueError, match="model must have regularizer \"fsq\", got 'kl', which gives no ids"):
        VidTokTokenizer(tiny.vidtok_network(regularizer="kl"))


@pytest.mark.parametrize("kind", ["causal", "blockwise"])
def test_a_folder_gives_the_same_ids(kind, request, tmp_path):
    network = request.getfixturevalue(kind)
    network.save_pretrained(tmp_path)
    tokenizer = VidTokTokenizer.from_pretrained(tmp_path)
    video = tiny.clips(17 if kind == "causal" else 16, 16, 8)
    assert torch.equal(tokenizer.encode(video), VidTokTokenizer(network).encode(video))
    assert (tokenizer.codebook_size, tokenizer.temporal_stride, tokenizer.spatial_stride) == (512, 4, 4)
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_weights_that_do_not_fit_are_refused(causal, tmp_path):
    causal.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if name != "encoder.conv_in.conv.bias"}
    save_file(kept | {"extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds other weights .*'encoder\.conv_in\.conv\.bias'.*'extra'"):
        VidTokTokenizer.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="holds an AutoencoderVidTok that does not load"):
        VidTokTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"folder must hold the config\.json of a diffusers AutoencoderVidTok"):
        VidTokTokenizer.from_pretrained(tmp_path / "none")


def test_without_diffusers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs diffusers: pip install "reco_lightning\[tokenizers\]"'):
        VidTokTokenizer.from_pretrained(tmp_path)
