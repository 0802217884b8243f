# SPDX-License-Identifier: Apache-2.0
"""`OmniTokenizer`: published ids, the leak between frames, frozen inference, and sizes that it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from reco_lightning.tokenizers.base import VideoTokenizer, to_unit_range
from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig
from reco_lightning.tokenizers.omnitokenizer.model import OmniTokenizer, nearest_code

DATA = Path(__file__).parents[2] / "data" / "omnitokenizer"
SMALL = OmniTokenizerConfig(
    n_codes=256, embedding_dim=64, heads=4, dim_head=16, ff_width=170, twod_window_size=4, temporal_depth=2
)
TINY = OmniTokenizerConfig(n_codes=32, embedding_dim=16, heads=2, dim_head=8, ff_width=16, twod_window_size=2)
RELEASED = {
    "joint_vq": OmniTokenizerConfig(),
    "image_only_vq": OmniTokenizerConfig(temporal_patch_size=2, spatial_pos="rel"),
}


@pytest.fixture(scope="module")
def tokenizer():
    """The published small weights; those of the decoder, which are not stored here, are random."""
    torch.manual_seed(0)
    tokenizer = OmniTokenizer(SMALL)
    left = tokenizer.load_state_dict(load_file(DATA / "encoder.safetensors"), strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith("decoder.") for key in left.missing_keys)
    return tokenizer


@pytest.fixture(scope="module")
def cases():
    return load_file(DATA / "ids.safetensors")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return OmniTokenizer(TINY)


@pytest.mark.parametrize("case", ["video_17x64", "video_9x64", "image_64", "image_128"])
def test_published_ids_in_every_position(tokenizer, cases, case):
    ids = tokenizer.encode(to_unit_range(cases[f"{case}.input"]))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, cases[f"{case}.ids"].long())


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_layouts_have_the_released_keys_and_shapes(name):
    listing = json.loads((DATA / f"shapes_{name}.json").read_text())
    head_input = (
        r"codebook\.(N|z_avg|codebook_usage)|.*\.context_norm\..*|.*_temporal_transformer\..*spatial_rel_pos_bias.*"
    )
    wanted = {
        key: tuple(shape)
        for key, shape in listing.items()
        if re.match(r"encoder|decoder|pre_vq_conv|post_vq_conv|codebook", key) and not re.fullmatch(head_input, key)
    }
    with torch.device("meta"):
        tokenizer = OmniTokenizer(RELEASED[name])
    assert {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()} == wanted
    assert tokenizer.grid(17, 256, 256) == (1 + 16 // tokenizer.temporal_stride, 32, 32)
    assert tokenizer.codebook_size == 8192


def test_members(tiny):
    assert isinstance(tiny, VideoTokenizer)
    assert (tiny.codebook_size, tiny.temporal_stride, tiny.spatial_stride) == (32, 4, 8)
    assert tiny.frame_aligned
    assert not tiny.causal


def test_ids_of_the_first_frames_of_a_clip_know_the_frames_after_them(tokenizer, cases):
    video = to_unit_range(cases["video_17x64.input"])
    other = video.clone()
    other[:, :, 13:] = -other[:, :, 13:]
    whole, whole_of_other = tokenizer.encode(video), tokenizer.encode(other)
    leaked = (whole != whole_of_other).flatten(2).float().mean(dim=2)[0]
    assert leaked.shape == (5,)
    assert (leaked > 0.5).all()  # four frames of seventeen changed, and so did most ids of all five latent frames
    for frames in (1, 5, 9, 13):
        alone = tokenizer.encode_first_frames(video, frames)
        assert torch.equal(alone, tokenizer.encode_first_frames(other, frames))
        assert torch.equal(alone, tokenizer.encode(video[:, :, :frames]))
        published = cases["video_17x64.ids"][:, : alone.shape[1]]
        assert (alone != published).float().mean() > 0.5  # cutting the ids of the clip is no substitute


def test_the_first_frames_have_to_exist(tiny):
    video = torch.zeros(1, 3, 9, 16, 16)
    for frames in (0, 13):
        with pytest.raises(ValueError, match=rf"frames must be 1 to 9, the length of the clips, got {frames}"):
            tiny.encode_first_frames(video, frames)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ a multiple of 4 .*, got 4; use 1 or 5"):
        tiny.encode_first_frames(video, 4)


def test_it_builds_no_graph_and_stays_frozen(tiny):
    model = nn.ModuleDict({"tokenizer": tiny, "head": nn.Linear(1, 1)}).train()
    assert model["head"].training
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    video = torch.zeros(1, 3, 5, 16, 16, requires_grad=True)
    ids = tiny.encode(video)
    assert not tiny.decode(ids).requires_grad
    tiny.requires_grad_(True)
    assert not tiny.decode(ids).requires_grad
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())


def test_clamp(tiny):
    tiny.decoder.to_pixels[0].weight.mul_(20)
    ids = torch.arange(12).view(1, 3, 2, 2)
    video = tiny.decode(ids)
    assert video.shape == (1, 3, 9, 16, 16)
    assert video.abs().max() > 1
    assert torch.equal(tiny.decode(ids, clamp=True), video.clamp(-1, 1))


def test_half_precision(tokenizer, cases):
    video, published = to_unit_range(cases["video_9x64.input"]), cases["video_9x64.ids"].long()
    with torch.autocast("cpu", torch.bfloat16):
        assert (tokenizer.encode(video) == published).float().mean() > 0.9
    half = OmniTokenizer(SMALL).to(torch.bfloat16)
    half.load_state_dict(tokenizer.state_dict())
    ids = half.encode(video)
    assert (ids == published).float().mean() > 0.9
    decoded = half.decode(published)
    assert decoded.dtype == torch.bfloat16
    exact = tokenizer.decode(published)
    assert (decoded - exact).square().mean() < 0.01 * exact.var()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rope", "rel"])
def test_compiles_as_one_graph(layout):
    torch.manual_seed(0)
    sizes = {"embedding_dim": 16, "heads": 2, "dim_head": 8, "ff_width": 16, "twod_window_size": 2, "temporal_depth": 1}
    config = OmniTokenizerConfig(
        n_codes=32, enc_block="tw", dec_block="t", spatial_pos=layout, explicit_attention=layout == "rel", **sizes
    )
    tokenizer = OmniTokenizer(config)
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    ids = tokenizer.encode(video)
    assert torch.equal(torch.compile(tokenizer.encode, fullgraph=True, backend="eager")(video), ids)
    features = torch.randn(2, 2, 2, 2, 16)
    compiled = torch.compile(tokenizer.decoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), tokenizer.decoder(features))


def test_the_nearest_code_is_by_distance_and_the_first_of_equals():
    codes = torch.tensor([[9.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]])
    assert nearest_code(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), codes).tolist() == [1, 2]
    features = torch.randn(
        3, 2048, 4, generator=torch.Generator().manual_seed(0)
    )  # more rows than are compared at once
    codes = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest_code(features, codes), torch.cdist(features.double(), codes.double()).argmin(-1))


def test_sizes_that_cannot_be_encoded(tiny):
    for shape, message in (
        ((1, 3, 4, 16, 16), r"frames must be 1 \+ a multiple of 4 .*, got 4; use 1 or 5"),
        ((1, 3, 5, 24, 24), r"height must be a multiple of 16 pixels, got 24; resize or crop the clips to 16 or 32"),
        ((1, 3, 5, 16, 8), r"width must be a multiple of 16 pixels, got 8"),
        ((1, 3, 5, 32, 16), r"height and width must be equal, got 32 and 16; .* to 16 x 16"),
        ((1, 3, 16, 16), r"video must be floating point of shape \(B, 3, T, H, W\).* shape \(1, 3, 16, 16\)"),
        ((1, 1, 5, 16, 16), r"video must be floating point of shape \(B, 3, T, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"video must be floating point .* got torch.uint8"):
        tiny.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8))


def test_ids_that_cannot_be_decoded(tiny):
    with pytest.raises(ValueError, match=r"ids must be 0 to 31, got 0 to 32"):
        tiny.decode(torch.tensor([0, 1, 2, 32]).view(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"flat ids \(B, N\) need .view\(B, \*grid\)"):
        tiny.decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="height and width must be equal, got 16 and 32"):
        tiny.decode(torch.zeros(1, 1, 2, 4, dtype=torch.long))
