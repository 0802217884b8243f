# SPDX-License-Identifier: Apache-2.0
"""What every tokenizer has to be: the promises of `VideoTokenizer`, kept by all with random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from reco_lightning.tokenizers import Emu3Tokenizer, VideoTokenizer, VidTokTokenizer
from tests.helpers import tiny_tokenizers as tiny

#: How each is built, and (T, H, W) of a clip for it; H and W differ wherever they may.
CASES = {
    "vqvae": (tiny.vqvae, (9, 32, 16)),
    "omnitokenizer": (tiny.omnitokenizer, (9, 32, 32)),
    "larp": (tiny.larp, (16, 16, 16)),
    "emu3": (lambda: Emu3Tokenizer(tiny.emu3_network()), (8, 16, 8)),
    "vidtok": (lambda: VidTokTokenizer(tiny.vidtok_network()), (9, 16, 8)),
    "vidtok-blockwise": (lambda: VidTokTokenizer(tiny.vidtok_network(causal=False)), (16, 16, 8)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """The tokenizer, two clips for it, and their ids."""
    build, size = CASES[request.param]
    tokenizer, video = build(), tiny.clips(*size)
    return tokenizer, video, tokenizer.encode(video)


def test_it_has_the_members(case):
    assert isinstance(case[0], VideoTokenizer)


def test_ids_have_the_shape_and_range_that_were_promised(case):
    tokenizer, video, ids = case
    grid = tokenizer.grid(*video.shape[2:])
    assert ids.dtype == torch.int64
    assert ids.shape == (2, *grid)
    assert len(grid) == (3 if tokenizer.frame_aligned else 1)
    assert 0 <= ids.min() <= ids.max() < tokenizer.codebook_size
    assert ids.unique().numel() > 4
    assert not torch.equal(ids[0], ids[1])


def test_a_batch_is_its_clips(case):
    tokenizer, video, ids = case
    assert torch.equal(torch.cat([tokenizer.encode(clip[None]) for clip in video]), ids)
    alone = torch.cat([tokenizer.decode(one[None]) for one in ids])
    together = tokenizer.decode(ids)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5 * float(together.abs().max()))


def test_decoding_gives_a_clip_of_the_same_shape(case):
    tokenizer, video, ids = case
    decoded = tokenizer.decode(ids)
    assert decoded.shape == video.shape
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    assert torch.equal(tokenizer.decode(ids, clamp=True), decoded.clamp(-1, 1))


def test_no_graph_is_built_and_no_random_number_drawn(case):
    tokenizer, video, ids = case
    state = torch.get_rng_state()
    with torch.enable_grad():
        asked = video.clone().requires_grad_(True)
        made = tokenizer.encode(asked)
        decoded = tokenizer.decode(made)
    assert torch.equal(made, ids)
    assert not made.requires_grad
    assert not decoded.requires_grad
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_its_parent_changes_nothing(case):
    tokenizer, video, ids = case
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    decoded = tokenizer.decode(ids)
    parent = nn.ModuleList([tokenizer]).train()
    assert parent.training
    assert torch.equal(tokenizer.encode(video), ids)
    assert torch.equal(tokenizer.decode(ids), decoded)
    after = tokenizer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_half_precision(case):
    tokenizer, video, ids = case
    half = copy.deepcopy(tokenizer).bfloat16()
    made = half.encode(video.bfloat16())
    assert made.dtype == torch.int64
    assert made.shape == ids.shape
    assert 0 <= made.min() <= made.max() < tokenizer.codebook_size
    decoded = half.decode(made)
    assert decoded.shape == video.shape
    assert decoded.dtype == torch.bfloat16
    assert decoded.isfinite().all()


def test_narrower_integers_decode_too(case):
    tokenizer, _, ids = case
    assert torch.equal(tokenizer.decode(ids.int()), tokenizer.decode(ids))


def test_sizes_that_do_not_fit_are_named(case):
    tokenizer, video, _ = case
    frames, height, width = video.shape[2:]
    with pytest.raises(ValueError, match=f"frames must .*got {frames + 1}"):
        tokenizer.grid(frames + 1, height, width)
    with pytest.raises(ValueError, match=f"height must .*got {height + 1}"):
        tokenizer.grid(frames, height + 1, width)
    with pytest.raises(ValueError, match=f"width must .*got {width + 1}"):
        tokenizer.encode(torch.zeros(1, 3, frames, height, width + 1))
