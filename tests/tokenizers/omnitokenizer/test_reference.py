# SPDX-License-Identifier: Apache-2.0
"""`OmniTokenizer` against a slow second implementation in float64, in every layout.

The second implementation is a set of loops over the state dict. It gives the ids that were published for the small
weights in tests/data/omnitokenizer, which holds the encoder only; the layers of the decoder are the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig
from reco_lightning.tokenizers.omnitokenizer.model import OmniTokenizer

DATA = Path(__file__).parents[2] / "data" / "omnitokenizer"

BASE = OmniTokenizerConfig(
    n_codes=48,
    codebook_dim=4,
    embedding_dim=24,
    heads=4,
    dim_head=8,
    ff_width=20,
    patch_size=4,
    twod_window_size=2,
    enc_block="tw",
    dec_block="tt",
    temporal_depth=2,
)
LAYOUTS = {
    "joint": {},
    "image-only": {"temporal_patch_size": 2, "spatial_pos": "rel"},
    "image-only, explicit": {"temporal_patch_size": 2, "spatial_pos": "rel", "explicit_attention": True},
    "joint, explicit": {"explicit_attention": True},
    "eight heads, explicit": {"spatial_pos": "rel", "explicit_attention": True, "heads": 8},
    "attention looks ahead": {"causal_in_temporal_transformer": False},
    "convolution looks ahead": {"causal_in_peg": False},
    "features of any length": {"l2_code": False},
    "windows in the decoder": {"enc_block": "t", "dec_block": "wtw", "temporal_depth": 1},
    "windows of three": {"twod_window_size": 3, "patch_size": 2},
}


class Reference:
    """Loops in float64."""

    def __init__(self, weights, config):
        self.p = {key: value.double() for key, value in weights.items()}
        self.o = config

    def linear(self, x, name):
        out = x @ self.p[f"{name}.weight"].T
        return out + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else out

    def norm(self, x, scale, shift):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.p[scale] + self.p[shift]

    def layer_norm(self, x, name):
        return self.norm(x, f"{name}.weight", f"{name}.bias")

    def gamma_norm(self, x, name):
        return self.norm(x, f"{name}.gamma", f"{name}.beta")

    def position_conv(self, x, name, grid):
        weight, bias = self.p[f"{name}.dsconv.weight"], self.p[f"{name}.dsconv.bias"]
        memory = x.reshape(-1, math.prod(grid), x.shape[-1])
        out = bias.repeat(*memory.shape[:2], 1)
        lead = 2 if self.o.causal_in_peg else 1
        cells = list(itertools.product(*map(range, grid)))
        for n, (a, r, c) in enumerate(cells):
            for i, j, k in itertools.product(range(3), repeat=3):
                cell = (a + i - lead, r + j - 1, c + k - 1)
                if all(0 <= place < size for place, size in zip(cell, grid, strict=True)):
                    source = (cell[0] * grid[1] + cell[1]) * grid[2] + cell[2]
                    out[:, n] += memory[:, source] * weight[:, 0, i, j, k]
        return out.reshape(x.shape)

    def turned(self, x, width):
        turns = torch.zeros(x.shape[-2], x.shape[-1] // 2, dtype=torch.float64)
        for n, j in itertools.product(*map(range, turns.shape)):
            frequency = 10000 ** (-4 * (j // 2) / x.shape[-1])
            turns[n, j] = (n % width if j % 2 == 0 else n // width) * frequency
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)).flatten(-2)

    def score_bias(self, name, n, side, spatial):
        bias = torch.zeros(self.o.heads, n, n, dtype=torch.float64)
        if self.o.explicit_attention and not spatial:
            first = 2 ** -(2 ** -(math.log2(self.o.heads) - 3))
            for h, i, j in itertools.product(range(self.o.heads), range(n), range(n)):
                bias[h, i, j] = -abs(i - j) * first ** (h + 1)
        if self.o.explicit_attention and spatial and self.o.spatial_pos == "rel":
            for i, j in itertools.product(range(n), repeat=2):
                d = torch.tensor([i // side - j // side, i % side - j % side], dtype=torch.float64)
                x = d.sign() * (d.abs() + 1).log()
                for step in ("0.0", "1.0"):
                    x = F.leaky_relu(self.linear(x, f"{name}.spatial_rel_pos_bias.net.{step}"), 0.1)
                bias[:, i, j] = self.linear(x, f"{name}.spatial_rel_pos_bias.net.2")
        if self.o.causal_in_temporal_transformer and not spatial:
            for i, j in itertools.product(range(n), repeat=2):
                if j > i:
                    bias[:, i, j] = -math.inf
        return bias

    def attention(self, x, name, side, spatial):
        q = self.linear(self.gamma_norm(x, f"{name}.norm"), f"{name}.to_q")
        keys_values = self.linear(x, f"{name}.to_kv")
        inner, bias, out = q.shape[-1], self.score_bias(name, x.shape[1], side, spatial), []
        for head in range(self.o.heads):
            part = slice(head * self.o.dim_head, (head + 1) * self.o.dim_head)
            a, b, v = q[..., part], keys_values[..., :inner][..., part], keys_values[..., inner:][..., part]
            if spatial and self.o.spatial_pos == "rope":
                a, b = self.turned(a, side), self.turned(b, side)
            a = a / a.norm(dim=-1, keepdim=True) * self.p[f"{name}.q_scale"]
            b = b / b.norm(dim=-1, keepdim=True) * self.p[f"{name}.k_scale"]
            out.append((8 * a @ b.transpose(1, 2) + bias[head]).softmax(-1) @ v)
        return self.linear(torch.cat(out, -1), f"{name}.to_out")

    def window_attention(self, x, name, side):
        m, width = self.o.twod_window_size, x.shape[-1]
        dh = width // self.o.heads
        projected = self.linear(self.gamma_norm(x, f"{name}.norm"), f"{name}.qkv")
        table, out = self.p[f"{name}.relative_position_bias_table"], torch.zeros_like(x)
        offsets = [
            (i // m - j // m + m - 1) * (2 * m - 1) + i % m - j % m + m - 1 for i in range(m * m) for j in range(m * m)
        ]
        for top, left in itertools.product(range(0, side, m), repeat=2):
            places = [(top + i) * side + left + j for i in range(m) for j in range(m)]
            for head in range(self.o.heads):
                q, k, v = (projected[:, places, p * width + head * dh : p * width + (head + 1) * dh] for p in range(3))
                scores = q @ k.transpose(1, 2) * dh**-0.5 + table[offsets, head].view(m * m, m * m)
                out[:, places, head * dh : (head + 1) * dh] = scores.softmax(-1) @ v
        return self.linear(out, f"{name}.proj")

    def stack(self, x, name, blocks, spatial):
        batch, t, h, w, width = x.shape
        x = x.reshape(-1, h * w, width) if spatial else x.permute(0, 2, 3, 1, 4).reshape(-1, t, width)
        for i, letter in enumerate(blocks):
            layer = f"{name}.layers.{i}"
            if letter == "w":
                x = x + self.window_attention(x, f"{layer}.1", w)
            else:
                x = x + self.position_conv(x, f"{layer}.0", (t, h, w))
                x = x + self.attention(x, f"{layer}.1", w, spatial)
            value, gate = self.linear(self.layer_norm(x, f"{layer}.3.0"), f"{layer}.3.1").chunk(2, -1)
            x = x + self.linear(value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))), f"{layer}.3.4")
        x = self.gamma_norm(x, f"{name}.norm_out")
        return x.view(batch, t, h, w, width) if spatial else x.view(batch, h, w, t, width).permute(0, 3, 1, 2, 4)

    def patches(self, video, name, frames):
        p, (batch, _, t, height, width) = self.o.patch_size, video.shape
        x = torch.stack(
            [
                video[:, :, a : a + frames, r : r + p, c : c + p].flatten(1)
                for a, r, c in itertools.product(range(0, t, frames), range(0, height, p), range(0, width, p))
            ],
            dim=1,
        ).view(batch, t // frames, height // p, width // p, -1)
        return self.layer_norm(self.linear(self.layer_norm(x, f"{name}.1"), f"{name}.2"), f"{name}.3")

    def features(self, video):
        """(B, 3, T, H, W) in [-1, 1] to (B, t, h, w, C)."""
        video, o = video.double() / 2, self.o
        x = self.patches(video[:, :, :1], "encoder.to_patch_emb_first_frame", 1)
        if video.shape[2] > 1:
            x = torch.cat([x, self.patches(video[:, :, 1:], "encoder.to_patch_emb", o.temporal_patch_size)], dim=1)
        x = self.stack(x, "encoder.enc_spatial_transformer", o.enc_block, True)
        x = self.stack(x, "encoder.enc_temporal_transformer", "t" * o.temporal_depth, False)
        x = self.linear(x, "pre_vq_conv.1")
        return x / x.norm(dim=-1, keepdim=True) if o.l2_code else x

    def distances(self, video):
        """(B, t, h, w, V)."""
        return (self.features(video)[..., None, :] - self.p["codebook.embeddings"]).square().sum(-1)

    def decode(self, ids):
        o, p = self.o, self.o.patch_size
        x = self.linear(self.p["codebook.embeddings"][ids], "post_vq_conv.1")
        x = self.stack(x, "decoder.dec_temporal_transformer", "t" * o.temporal_depth, False)
        x = self.stack(x, "decoder.dec_spatial_transformer", o.dec_block, True)
        batch, t, h, w, _ = x.shape
        video = torch.zeros(batch, 3, 1 + (t - 1) * o.temporal_patch_size, h * p, w * p, dtype=torch.float64)
        for a, r, c in itertools.product(range(t), range(h), range(w)):
            name, frames = ("to_pixels", o.temporal_patch_size) if a else ("to_pixels_first_frame", 1)
            start = 1 + (a - 1) * frames if a else 0
            patch = self.linear(x[:, a, r, c], f"decoder.{name}.0").view(batch, 3, frames, p, p)
            video[:, :, start : start + frames, r * p : r * p + p, c * p : c * p + p] = patch
        return 2 * video


def randomised(config):
    """No zero bias, no unit scale, no unit code: each parameter has to be read to get the result right."""
    torch.manual_seed(0)
    tokenizer = OmniTokenizer(config)
    for name, value in tokenizer.state_dict().items():
        if value.is_floating_point() and not name.endswith("beta"):
            flat = value.ndim == 1
            noise = torch.randn_like(value) * (0.2 if flat else 1.0 / math.sqrt(value[0].numel()))
            value.copy_(noise + 1 if flat and not name.endswith("bias") else noise)
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("case", ["video_17x64", "video_9x64", "image_64"])
def test_the_reference_gives_the_published_ids(case):
    small = OmniTokenizerConfig(
        n_codes=256, embedding_dim=64, heads=4, dim_head=16, ff_width=170, twod_window_size=4, temporal_depth=2
    )
    reference, cases = Reference(load_file(DATA / "encoder.safetensors"), small), load_file(DATA / "ids.safetensors")
    video = cases[f"{case}.input"].permute(0, 4, 1, 2, 3).double() / 127.5 - 1
    assert torch.equal(reference.distances(video).argmin(-1), cases[f"{case}.ids"].long())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_layout_equals_the_reference(layout, blocks):
    config = dataclasses.replace(BASE, **LAYOUTS[layout])
    tokenizer = randomised(config)
    reference = Reference(tokenizer.state_dict(), config)
    side, frames = 2 * config.side_multiple, 1 + (blocks - 1) * config.temporal_patch_size
    side = max(side, 4 * config.patch_size)
    video = torch.rand(2, 3, frames, side, side) * 2 - 1
    ids, distances = tokenizer.encode(video), reference.distances(video)
    least = distances.topk(2, largest=False).values
    sure = least[..., 1] - least[..., 0] > 1e-4
    assert sure.double().mean() > 0.95
    assert torch.equal(ids[sure], distances.argmin(-1)[sure])
    assert ids.unique().numel() > 5
    torch.testing.assert_close(tokenizer.decode(ids).double(), reference.decode(ids), rtol=0, atol=5e-5)


def test_every_option_changes_the_result():
    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def decoded(**options):
        config = dataclasses.replace(BASE, **options)
        return randomised(config).decode(randomised(config).encode(video))

    results = [
        decoded(),
        decoded(explicit_attention=True),
        decoded(causal_in_temporal_transformer=False),
        decoded(causal_in_peg=False),
    ]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(results, 2))
    plain, explicit = (decoded(spatial_pos="rel", explicit_attention=choice) for choice in (False, True))
    assert (plain - explicit).abs().max() > 1e-3
