# SPDX-License-Identifier: Apache-2.0
"""Ranges, grids and fingerprints of tokenizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reco_lightning.support.fingerprint import fingerprint
from reco_lightning.tokenizers.base import VideoTokenizer, latent_grid, to_uint8, to_unit_range


def test_every_pixel_value_comes_back():
    clips = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 2, 8, 16, 3)
    video = to_unit_range(clips)
    assert (video.shape, video.dtype) == ((1, 3, 2, 8, 16), torch.float32)
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(to_uint8(video), clips)
    assert torch.equal(to_uint8(video.bfloat16()).unique(), to_uint8(video.bfloat16().float()).unique())


def test_values_out_of_range_are_clipped_not_wrapped():
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 2, 1, 1)).flatten().tolist() == [0, 255]


def test_range_errors():
    with pytest.raises(
        ValueError, match=r"clips must be uint8 of shape \(B, T, H, W, C\), got torch.float32 of shape \(1,"
    ):
        to_unit_range(torch.zeros(1, 1, 1, 1, 3))
    with pytest.raises(ValueError, match=r"clips must be uint8 .* got torch.uint8 of shape \(1, 1, 1, 3\)"):
        to_unit_range(torch.zeros(1, 1, 1, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"video must be floating point .* got torch.uint8"):
        to_uint8(torch.zeros(1, 3, 1, 1, 1, dtype=torch.uint8))


def test_grid():
    strides = {"temporal_stride": 4, "spatial_stride": 16}
    assert latent_grid(1, 16, 32, **strides) == (1, 1, 2)
    assert latent_grid(17, 256, 128, **strides) == (5, 16, 8)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ a multiple of 4 .*, got 16; use 13 or 17"):
        latent_grid(16, 16, 16, **strides)
    with pytest.raises(ValueError, match=r"frames must be .*, got 0; use 1 or 5"):
        latent_grid(0, 16, 16, **strides)
    with pytest.raises(ValueError, match=r"height must be a multiple of 16 pixels, got 40; .* to 32 or 48"):
        latent_grid(1, 40, 16, **strides)
    with pytest.raises(ValueError, match=r"width must be a multiple of 16 pixels, got 8; .* to 16 or 32"):
        latent_grid(1, 16, 8, **strides)


def test_fingerprint_tells_weights_apart_whatever_their_dtype():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    assert fingerprint(one) != fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(two)
    assert len(fingerprint(one.bfloat16())) == 64
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint("no module") == ""


def test_protocol_is_met_by_shape_alone():
    class Own:
        codebook_size, temporal_stride, spatial_stride, frame_aligned = 8, 4, 8, True

        def grid(self, frames, height, width): ...

        def encode(self, video): ...

        def decode(self, ids, *, clamp=False): ...

    assert isinstance(Own(), VideoTokenizer)
    del Own.decode
    assert not isinstance(Own(), VideoTokenizer)
