# SPDX-License-Identifier: Apache-2.0
"""Layers of the tokenizer: no frame of the output depends on a later frame of the input."""

from __future__ import annotations

import pytest
import torch

from reco_lightning.tokenizers.layers import CausalConv3d, FrameNorm, ResidualBlock, Unpatch, build_encoder, unpatch


@pytest.mark.parametrize(
    ("layer", "frames_in", "frames_out"),
    [
        (CausalConv3d(8, 8, (3, 3)), 5, 5),
        (CausalConv3d(8, 8, (4, 2), (4, 2)), 9, 3),
        (CausalConv3d(8, 8, (3, 3), (2, 1)), 5, 3),
        (FrameNorm(8, 8), 5, 5),
        (ResidualBlock(8, 3), 5, 5),
        (Unpatch(8, 8, time=4, space=2, kernel=(3, 3)), 3, 9),
        (build_encoder(spatial_stride=8, width=8, depth=1, code_dim=4), 9, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_future_does_not_reach_the_past(layer, frames_in, frames_out):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # also those that start at zero
    channels = next(layer.parameters()).shape[1] if not isinstance(layer, (FrameNorm, ResidualBlock, Unpatch)) else 8
    x = torch.randn(2, channels, frames_in, 8, 8)
    with torch.no_grad():
        out = layer(x)
        assert out.shape[2] == frames_out
        for kept in range(1, frames_in):
            changed = x.clone()
            changed[:, :, kept:] = torch.randn(2, channels, frames_in - kept, 8, 8)
            new = layer(changed)
            # output frame j sees input frames up to j * (frames in - 1) / (frames out - 1)
            same = sum(j * (frames_in - 1) <= (kept - 1) * (frames_out - 1) for j in range(frames_out))
            if frames_out > frames_in:
                same = 1 + (kept - 1) * 4
            torch.testing.assert_close(new[:, :, :same], out[:, :, :same], rtol=0, atol=1e-5)
            assert not torch.allclose(new[:, :, same:], out[:, :, same:])


def test_padding_repeats_the_first_frame():
    conv = CausalConv3d(1, 1, (3, 1))
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    assert conv(torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1, 1)).flatten().tolist() == [3.0, 4.0, 6.0]


def test_unpatch_puts_channels_where_they_belong():
    x = torch.arange(2 * 2 * 2 * 2).view(1, 8, 2, 1, 1)  # time 2, space 2; two latent frames
    # channel (time, row, column) of latent frame t holds 2 * channel + t; the first latent frame keeps its last time
    expected = torch.tensor([[[8, 10], [12, 14]], [[1, 3], [5, 7]], [[9, 11], [13, 15]]])
    assert torch.equal(unpatch(x, time=2, space=2)[0, 0], expected)


def test_residual_block_starts_as_the_identity():
    x = torch.randn(1, 8, 3, 4, 4)
    assert torch.equal(ResidualBlock(8, 3)(x), x)
