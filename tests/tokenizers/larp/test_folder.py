# SPDX-License-Identifier: Apache-2.0
"""Every layout of the LARP tokenizer against its formulas, written out in float64, and its `config.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from reco_lightning.tokenizers.larp.config import LARPConfig, config_from_json
from reco_lightning.tokenizers.larp.model import LARPTokenizer

SMALL = json.loads((Path(__file__).parents[2] / "data" / "larp" / "config.json").read_text())
T, P, S, N, V, C = 8, 4, 16, 10, 32, 6
DIMS, HEADS = {"encoder": 16, "decoder": 24}, {"encoder": 2, "decoder": 3}

LEARNED = {
    "learned_encoder_patch_pe": True,
    "learned_decoder_patch_query_embed": True,
    "learned_decoder_latent_pe": True,
}
TYPES = {
    "use_encoder_patch_token_type_embed": True,
    "use_encoder_latent_query_token_type_embed": True,
    "use_decoder_latent_token_type_embed": True,
}
LAYOUTS = {
    "release": {},
    "learned": LEARNED,
    "types": TYPES,
    "learned and types": LEARNED | TYPES,
    "no types": {"use_decoder_patch_query_token_type_embed": False},
    "fixed queries": {"learned_encoder_latent_query_embed": False, "encoder_query_gaussian_init": False},
    "patches of one frame": {"temporal_patch_size": 1, "decoder_temporal_patch_size": 1},
    "learned, patches of one frame": LEARNED | {"temporal_patch_size": 1, "decoder_temporal_patch_size": 1},
    "not stochastic": {"stochastic": False},
    "learned temperature": {"stochastic_temperature": -1},
    "no prior": {"prior_model": {"name": "none"}},
}


def config_of(options):
    config = json.loads(json.dumps(SMALL))
    codes = config["bottleneck"]["args"]["regularizer"]["args"]
    codes["codebook_size"] = V
    config["bottleneck"]["args"]["bottleneck_dim"] = C
    config |= {"input_size": S, "frame_num": T, "patch_size": P, "decoder_patch_size": P, "bottleneck_token_num": N}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_hidden_size": DIMS[side], f"{side}_num_heads": HEADS[side], f"{side}_depth": 2}
    for name, value in options.items():
        (codes if name in codes else config)[name] = value
    return config


def weights_of(config):
    """Random weights, with the names and shapes that the release has for such options."""
    f, h, t = config["temporal_patch_size"], S // P, T // config["temporal_patch_size"]
    d, e = DIMS["encoder"], DIMS["decoder"]
    shapes = {
        "encoder_latent_query_embed": (N, d),
        "decoder_latent_pe": (1, N, e),
        "x_embedder.proj.weight": (d, 3, P, P) if f == 1 else (d, 3, f, P, P),
        "x_embedder.proj.bias": (d,),
        "bottleneck.in_linear.weight": (C, d),
        "bottleneck.in_linear.bias": (C,),
        "bottleneck.out_linear.weight": (e, C),
        "bottleneck.out_linear.bias": (e,),
        "bottleneck.regularizer.embedding.weight": (V, C),
        "final_layer.norm_final.weight": (e,),
        "final_layer.norm_final.bias": (e,),
        "final_layer.linear.weight": (3 * f * P * P, e),
        "final_layer.linear.bias": (3 * f * P * P,),
        "prior_model.ln_f.weight": (7,),
    }
    if config["learned_encoder_patch_pe"]:
        shapes |= {"encoder_h_embed": (1, 1, h, 1, d), "encode_w_embed": (1, 1, 1, h, d)}
        shapes |= {"encoder_t_embed": (1, t, 1, 1, d)}
    else:
        shapes |= {"encoder_patch_pe": (1, t * h * h, d)}
    if config["learned_decoder_patch_query_embed"]:
        shapes |= {"decoder_h_embed": (1, 1, h, 1, e), "decoder_w_embed": (1, 1, 1, h, e)}
        shapes |= {"decoder_t_embed": (1, t, 1, 1, e)}
    else:
        shapes |= {"decoder_patch_query_embed": (1, t * h * h, e)}
    for name, width in (
        ("encoder_patch", d),
        ("encoder_latent_query", d),
        ("decoder_latent", e),
        ("decoder_patch_query", e),
    ):
        if config[f"use_{name}_token_type_embed"]:
            shapes[f"{name}_token_type_embed"] = (1, 1, width)
    codes = config["bottleneck"]["args"]["regularizer"]["args"]
    if codes["stochastic"] and codes["stochastic_temperature"] < 0:
        shapes["bottleneck.regularizer.stochastic_temperature_inv"] = ()
    for side, width in DIMS.items():
        for block in (f"{side}.blocks.{index}." for index in range(2)):
            shapes |= {
                f"{block}{name}": (width,) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
            }
            shapes |= {f"{block}attn.qkv.weight": (3 * width, width)}
            shapes |= {f"{block}attn.proj.weight": (width, width), f"{block}attn.proj.bias": (width,)}
            shapes |= {f"{block}mlp.fc1.weight": (4 * width, width), f"{block}mlp.fc1.bias": (4 * width,)}
            shapes |= {f"{block}mlp.fc2.weight": (width, 4 * width), f"{block}mlp.fc2.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    weights["encoder_latent_query_embed"] *= 10  # queries that ask for different ids
    weights["bottleneck.in_linear.bias"] *= 0.1
    return weights


class Reference:
    """The formulas, one row at a time where that is what tells a mistake; counts which weights it read."""

    def __init__(self, config, weights):
        self.config, self.weights, self.read = config, weights, set()

    def __call__(self, name):
        self.read.add(name)
        return self.weights[name].double()

    def linear(self, x, name, bias=True):
        return x @ self(f"{name}.weight").T + (self(f"{name}.bias") if bias else 0)

    def norm(self, x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self(f"{name}.weight") + self(
            f"{name}.bias"
        )

    def trunk(self, side, context, queries):
        x = torch.cat([context, queries.expand(len(context), -1, -1)], dim=1)
        width, size = DIMS[side], DIMS[side] // HEADS[side]
        for index in range(2):
            block = f"{side}.blocks.{index}"
            qkv = self.linear(self.norm(x, f"{block}.norm1", 1e-5), f"{block}.attn.qkv", bias=False)
            q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
            heads = []
            for start in range(0, width, size):
                part = slice(start, start + size)
                heads.append((q[..., part] @ k[..., part].mT / size**0.5).softmax(-1) @ v[..., part])
            x = x + self.linear(torch.cat(heads, -1), f"{block}.attn.proj")
            inner = self.linear(self.norm(x, f"{block}.norm2", 1e-5), f"{block}.mlp.fc1")
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            x = x + self.linear(inner, f"{block}.mlp.fc2")
        return x[:, context.shape[1] :]

    def typed(self, x, name):
        return x + self(f"{name}_token_type_embed") if self.config[f"use_{name}_token_type_embed"] else x

    def positions(self, learned, fixed, axes):
        if not self.config[learned]:
            return self(fixed)
        rows, columns, time = map(self, axes)
        grid = (time.shape[1], rows.shape[2], columns.shape[3])
        places = [
            rows[0, 0, r, 0] + columns[0, 0, 0, c] + time[0, t, 0, 0]
            for t in range(grid[0])
            for r in range(grid[1])
            for c in range(grid[2])
        ]
        return torch.stack(places)[None]

    def features(self, pixels):
        """Of pixels in [0, 1]."""
        weight, bias = self("x_embedder.proj.weight"), self("x_embedder.proj.bias")
        pixels = pixels.double()
        if weight.ndim == 4:
            frames = [F.conv2d(frame, weight, bias, stride=P) for frame in pixels.unbind(2)]
            patches = torch.stack(frames, dim=2)
        else:
            patches = F.conv3d(pixels, weight, bias, stride=weight.shape[2:])
        patches = patches.flatten(2).transpose(1, 2)
        axes = ("encoder_h_embed", "encode_w_embed", "encoder_t_embed")
        positions = self.positions("learned_encoder_patch_pe", "encoder_patch_pe", axes)
        patches = self.typed(patches + positions[:, : patches.shape[1]], "encoder_patch")
        queries = self.typed(self("encoder_latent_query_embed")[None], "encoder_latent_query")
        return self.linear(self.trunk("encoder", patches, queries), "bottleneck.in_linear")

    def codes(self):
        codes = self("bottleneck.regularizer.embedding.weight")
        return codes / codes.norm(dim=1, keepdim=True)

    def ids(self, features):
        unit = features / features.norm(dim=-1, keepdim=True)
        return (unit[:, :, None] - self.codes()).square().sum(-1).argmin(-1)

    def probabilities(self, features):
        options = self.config["bottleneck"]["args"]["regularizer"]["args"]
        if options["stochastic_temperature"] < 0:
            inverse = self("bottleneck.regularizer.stochastic_temperature_inv")
        else:
            inverse = 1 / options["stochastic_temperature"]
        unit = features / features.norm(dim=-1, keepdim=True)
        return (unit @ self.codes().T * inverse).softmax(-1)

    def pixels(self, ids, frames):
        f = self.config["temporal_patch_size"]
        t, h = frames // f, S // P
        latents = self.linear(self.codes()[ids], "bottleneck.out_linear") + self("decoder_latent_pe")
        axes = ("decoder_h_embed", "decoder_w_embed", "decoder_t_embed")
        queries = self.positions("learned_decoder_patch_query_embed", "decoder_patch_query_embed", axes)
        queries = self.typed(queries, "decoder_patch_query")[:, : t * h * h]
        x = self.trunk("decoder", self.typed(latents, "decoder_latent"), queries)
        x = self.linear(self.norm(x, "final_layer.norm_final", 1e-6), "final_layer.linear")
        video = torch.empty(len(ids), 3, frames, S, S, dtype=torch.float64)
        for place in range(t * h * h):
            time, row, column = place // (h * h), place // h % h, place % h
            patch = x[:, place].view(-1, f, P, P, 3).permute(0, 4, 1, 2, 3)
            rows, columns = slice(row * P, (row + 1) * P), slice(column * P, (column + 1) * P)
            video[:, :, time * f : (time + 1) * f, rows, columns] = patch
        return video


def load(folder, options):
    config = config_of(options)
    weights = weights_of(config)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return LARPTokenizer.from_pretrained(folder), Reference(config, weights)


@pytest.mark.parametrize("frames", [4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_its_formulas(tmp_path, layout, frames):
    tokenizer, reference = load(tmp_path, LAYOUTS[layout])
    pixels = torch.rand(2, 3, frames, S, S, generator=torch.Generator().manual_seed(1))
    features = reference.features(pixels)
    torch.testing.assert_close(tokenizer._features(2 * pixels - 1).double(), features, atol=2e-5, rtol=1e-4)
    ids = tokenizer.encode(2 * pixels - 1)
    assert ids.unique().numel() > 4
    assert torch.equal(ids, reference.ids(features))
    expected = 2 * reference.pixels(ids, frames) - 1
    torch.testing.assert_close(tokenizer.decode(ids, frames=frames).double(), expected, atol=2e-5, rtol=1e-4)
    if tokenizer.config.stochastic:
        likelihoods = tokenizer.bottleneck.regularizer.probabilities(features.float())
        torch.testing.assert_close(likelihoods.double(), reference.probabilities(features), atol=1e-5, rtol=1e-4)
    assert reference.read == reference.weights.keys() - {"prior_model.ln_f.weight"}


def test_a_fresh_tokenizer_has_the_layouts_weights():
    for options in LAYOUTS.values():
        config = config_of(options)
        fresh = LARPTokenizer(config_from_json(config)).state_dict()
        stored = {name: value for name, value in weights_of(config).items() if not name.startswith("prior_model.")}
        assert {name: value.shape for name, value in fresh.items()} == {n: v.shape for n, v in stored.items()}


def test_learned_positions_start_as_sines():
    fresh = LARPTokenizer(config_from_json(config_of(LEARNED)))
    row = fresh.decoder_h_embed[0, 0, 1, 0]
    torch.testing.assert_close(row[[0, 12]], torch.tensor([0.841471, 0.540302]))  # sine and cosine of 1


def test_what_a_config_leaves_out_is_the_published_class():
    vq = {"name": "vq", "args": {"codebook_size": 256, "l2_normalized": True}}
    config = config_from_json({"bottleneck": {"name": "bottleneck", "args": {"bottleneck_dim": 16, "regularizer": vq}}})
    expected = LARPConfig(
        encoder_depth=6,
        decoder_depth=6,
        use_decoder_patch_query_token_type_embed=False,
        codebook_size=256,
        stochastic=False,
        stochastic_temperature=1.0,
    )
    assert config == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surprise": 1, "other": 2}, "must hold the options of a LARP tokenizer alone, got other, surprise too"),
        ({"l2_normalized": False}, r"regularizer.args.l2_normalized must be True, got False"),
        ({"transformer_name": "another"}, "transformer_name must be 'transformer_encoder_parallel', got 'another'"),
        ({"encoder_name": "another"}, "encoder_name must be .*'transformer_encoder_parallel', got 'another'"),
        ({"decoder_patch_size": 8}, "decoder_patch_size must be 4, got 8"),
        ({"decoder_temporal_patch_size": 2}, "decoder_temporal_patch_size must be 4, got 2"),
        ({"in_channels": 1}, "in_channels must be 3, got 1"),
        ({"bottleneck": None}, "bottleneck must be an object with 'name' and 'args', got None"),
        ({"bottleneck": {"name": "bottleneck", "args": {}}}, "regularizer must be an object"),
        ({"input_size": 18}, "input_size must be a multiple of 4, got 18"),
        ({"frame_num": 6}, "frame_num must be a multiple of 4, got 6"),
        ({"encoder_depth": 0}, "encoder_depth must be a whole number of 1 or more, got 0"),
        ({"decoder_num_heads": 5}, "decoder_hidden_size must be a multiple of 5, got 24"),
        ({"stochastic_temperature": 0}, "stochastic_temperature must not be 0"),
    ],
)
def test_options_that_no_layout_has(options, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(config_of(options))


@pytest.mark.parametrize("name", ["bottleneck_dim", "codebook_size"])
def test_sizes_that_must_be_named(name):
    config = config_of({})
    inner = config["bottleneck"]["args"]
    (inner if name in inner else inner["regularizer"]["args"]).pop(name)
    with pytest.raises(ValueError, match=f"bottleneck must name {name}"):
        config_from_json(config)
