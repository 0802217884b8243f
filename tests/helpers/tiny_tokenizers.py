# SPDX-License-Identifier: Apache-2.0
"""Tokenizers small enough for tests: random weights, the structure of the real ones."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from diffusers import AutoencoderVidTok
from safetensors.torch import save_file
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from reco_lightning.tokenizers.larp.config import LARPConfig
from reco_lightning.tokenizers.larp.model import LARPTokenizer
from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig
from reco_lightning.tokenizers.omnitokenizer.model import OmniTokenizer
from reco_lightning.tokenizers.vqvae import VQVAE

_LARP = LARPConfig(
    input_size=16,
    bottleneck_token_num=12,
    encoder_hidden_size=16,
    decoder_hidden_size=16,
    encoder_depth=1,
    decoder_depth=1,
    encoder_num_heads=2,
    decoder_num_heads=2,
    codebook_size=64,
)


def vqvae() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(codebook_size=32, width=8)


def omnitokenizer() -> OmniTokenizer:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 32, "heads": 2, "dim_head": 16, "ff_width": 32, "twod_window_size": 2}
    return OmniTokenizer(OmniTokenizerConfig(n_codes=64, **sizes))


def save_omnitokenizer(path) -> None:
    """As the release stores it, without what only training needs."""
    torch.save({"state_dict": omnitokenizer().state_dict()}, path)


def larp() -> LARPTokenizer:
    torch.manual_seed(0)
    tokenizer = LARPTokenizer(_LARP)
    for parameter in tokenizer.parameters():  # the usual start gives nearly the same id everywhere
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter)
    return tokenizer


def save_larp(folder) -> None:
    """As the hub stores it."""
    folder.mkdir()
    sizes = asdict(_LARP)
    codes = {name: sizes.pop(name) for name in ("codebook_size", "stochastic", "stochastic_temperature")}
    quantiser = {"name": "vq", "args": {**codes, "l2_normalized": True}}
    sizes["bottleneck"] = {"args": {"bottleneck_dim": sizes.pop("bottleneck_dim"), "regularizer": quantiser}}
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(larp().state_dict(), folder / "model.safetensors")


def emu3_network() -> Emu3VQVAE:
    torch.manual_seed(0)
    return Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=64,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[1],
            hidden_size=32,
            attention_dropout=0.5,
        )
    )


def vidtok_network(*, causal: bool = True, regularizer: str = "fsq", codebook_size: int = 512) -> AutoencoderVidTok:
    torch.manual_seed(0)
    return AutoencoderVidTok(
        ch=8,
        ch_mult=[1, 1, 1],
        z_channels=3,
        double_z=regularizer == "kl",
        num_res_blocks=1,
        dropout=0.5,
        regularizer=regularizer,
        codebook_size=codebook_size,
        is_causal=causal,
    )


def clips(frames: int, height: int, width: int, *, batch: int = 2) -> torch.Tensor:
    """(B, 3, T, H, W) in [-1, 1]: moving waves and noise, every frame another, H and W told apart."""
    generator = torch.Generator().manual_seed(1)
    t, y, x = (torch.linspace(0, 6.0, size) for size in (frames, height, width))
    waves = torch.sin(t.view(-1, 1, 1) + 2 * y.view(1, -1, 1) - x.view(1, 1, -1))
    noise = torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1
    return 0.5 * waves + 0.5 * noise
