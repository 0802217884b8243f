# SPDX-License-Identifier: Apache-2.0
"""`Emu3Tokenizer` against the network of transformers, called by hand with what it gets wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from reco_lightning.tokenizers.emu3 import Emu3Tokenizer
from tests.helpers import tiny_tokenizers as tiny

pytestmark = pytest.mark.third_party


@pytest.fixture(scope="module")
def network():
    return tiny.emu3_network()


@pytest.fixture
def folder(network, tmp_path):
    network.save_pretrained(tmp_path)
    return tmp_path


def library_ids(network, video, size):
    """One (t, h, w) for each clip, as transformers gives them; its version 4 did not wrap the list."""
    made = network.encode(video.transpose(1, 2), [size] * len(video))
    return list(getattr(made, "image_tokens", made))


def nearest_codes(network, video):
    """Ids (B, t, h, w) by the network's parts and a plain search: no crop is involved."""
    with torch.no_grad():
        features = network.quant_conv(network.encoder(video.transpose(1, 2)).transpose(1, 2)).movedim(1, -1)
        return torch.cdist(
            features, network.quantize.embedding.weight, compute_mode="donot_use_mm_for_euclid_dist"
        ).argmin(-1)


def test_ids_and_clips_are_the_librarys(network):
    tokenizer, video = Emu3Tokenizer(network), tiny.clips(8, 16, 16)
    with torch.no_grad():
        # square, and short enough that the crop along (t, h) removes nothing
        expected = torch.stack(library_ids(network, video, (16, 16)))
        decoded = network.decode(expected).transpose(1, 2)
    ids = tokenizer.encode(video)
    assert torch.equal(ids, expected)
    assert ids.unique().numel() > 16
    assert torch.equal(tokenizer.decode(ids), decoded)
    assert decoded.abs().max() > 1  # there is something to clamp
    assert torch.equal(tokenizer.decode(ids, clamp=True), decoded.clamp(-1, 1))


def test_sides_that_differ_keep_all_their_ids(network):
    video = tiny.clips(8, 32, 16)
    with torch.no_grad():
        cropped = library_ids(network, video, (32, 16))
    assert cropped[0].shape == (2, 8, 8)  # half of the rows are gone
    ids = Emu3Tokenizer(network).encode(video)
    assert ids.shape == (2, 2, 16, 8)
    assert torch.equal(ids, nearest_codes(network, video))


def test_frames_beyond_whole_blocks_are_refused_not_dropped(network):
    tokenizer = Emu3Tokenizer(network)
    with torch.no_grad():
        dropped = library_ids(network, tiny.clips(5, 16, 16), (16, 16))
    assert dropped[0].shape[0] == 1
    with pytest.raises(ValueError, match="frames must be a multiple of 4, got 5; take clips of 4 or 8"):
        tokenizer.encode(tiny.clips(5, 16, 16))
    with pytest.raises(ValueError, match=r"frames must be a multiple of 4, got 1; take clips of 4$"):
        tokenizer.grid(1, 16, 16)
    with pytest.raises(
        ValueError, match=r"height must be a multiple of 2 pixels, got 15; resize or crop .* to 14 or 16"
    ):
        tokenizer.grid(4, 15, 16)
    with pytest.raises(
        ValueError, match=r"width must be a multiple of 2 pixels, got 17; resize or crop .* to 16 or 18"
    ):
        tokenizer.grid(4, 16, 17)


def test_a_folder_gives_the_same_ids(network, folder):
    video = tiny.clips(4, 16, 8)
    tokenizer = Emu3Tokenizer.from_pretrained(folder)
    assert torch.equal(tokenizer.encode(video), Emu3Tokenizer(network).encode(video))
    assert (tokenizer.codebook_size, tokenizer.temporal_stride, tokenizer.spatial_stride) == (64, 4, 2)
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_another_normalisation_is_read_from_the_folder(network, folder):
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": mean.tolist(), "image_std": std.tolist()})
    )
    tokenizer, video = Emu3Tokenizer.from_pretrained(folder), tiny.clips(4, 16, 16)
    shape = (3, 1, 1, 1)
    normalised = ((video + 1) / 2 - mean.view(shape)) / std.view(shape)  # from [0, 1], as the image processor does it
    ids = tokenizer.encode(video)
    assert torch.equal(ids, nearest_codes(network, normalised))
    assert not torch.equal(ids, nearest_codes(network, video))
    with torch.no_grad():
        expected = (network.decode(ids).transpose(1, 2) * std.view(shape) + mean.view(shape)) * 2 - 1
    torch.testing.assert_close(tokenizer.decode(ids), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if name != "quantize.embedding.weight"}
    save_file(kept | {"extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other weights .*'missing_keys': \['quantize\.embedding\.weight'\].*'extra'"):
        Emu3Tokenizer.from_pretrained(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds an Emu3VQVAE that does not load: .*model\.safetensors"):
        Emu3Tokenizer.from_pretrained(folder)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"folder must hold the config\.json of a transformers Emu3VQVAE, got '.*none'"
    ):
        Emu3Tokenizer.from_pretrained(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "emu3"}')
    with pytest.raises(ValueError, match=r"write model\.model\.vqmodel with save_pretrained"):
        Emu3Tokenizer.from_pretrained(tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs transformers: pip install "reco_lightning\[hf\]"'):
        Emu3Tokenizer.from_pretrained(tmp_path)


def test_what_is_no_clip_and_no_ids(network):
    tokenizer = Emu3Tokenizer(network)
    with pytest.raises(ValueError, match=r"video must be floating point of shape \(B, 3, T, H, W\).*got torch\.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"ids must be integers of shape \(B, t, h, w\), got .*\(1, 64\); flat ids"):
        tokenizer.decode(torch.zeros(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match="ids must be 0 to 63, got 0 to 64; were they made by another tokenizer"):
        tokenizer.decode(torch.tensor([[[[0, 64]]]]))
