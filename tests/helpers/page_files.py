# SPDX-License-Identifier: Apache-2.0
"""Files that the pages' blocks begin with: clips of noise, and tiny networks under the names of real ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, Emu3Config, Emu3ForConditionalGeneration

from reco_lightning import VideoModel, VideoTransformer
from reco_lightning.metrics import InceptionI3D
from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.larp.config import LARPConfig
from reco_lightning.tokenizers.larp.model import LARPTokenizer
from tests.helpers import tiny_tokenizers
from tests.helpers.checkpoints import save

VOCABULARY, GRID = 32, (5, 4, 4)  # of `vqvae.ckpt` with clips of 17 frames of 32 x 32


def save_all() -> None:
    """Writes everything to the current folder."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    for name in ("cats/a", "cats/b", "dogs/a", "dogs/b"):
        path = Path("videos", f"{name}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, draw.integers(0, 255, (51, 32, 32, 3), dtype=np.uint8))
    save(tiny_tokenizers.vqvae(), "vqvae.ckpt")
    network = VideoTransformer(vocab_size=VOCABULARY, grid=GRID, dim=32, depth=2, heads=2, num_classes=3)
    save(VideoModel(network), "last.ckpt")
    tiny_tokenizers.save_omnitokenizer("imagenet_k600.ckpt")
    save_larp()
    save_clip(Path("clip-vit-base-patch32"))
    save_emu3(Path("Emu3-Chat-hf"))
    torch.save(InceptionI3D(norm_epsilon=1e-3).state_dict(), "i3d_rgb_scratch.pt")


def save_larp() -> None:
    """The releases' clips, ids and codebooks, in networks that are narrow and shallow."""
    heads = {f"{part}_num_heads": 2 for part in ("encoder", "decoder")}
    narrow = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("depth", 1), ("hidden_size", 16))
    }
    sizes = asdict(LARPConfig(**narrow, **heads))
    weights = {"larp-tokenizer": LARPTokenizer(LARPConfig(**narrow, **heads)).state_dict()}
    codes = {name: sizes.pop(name) for name in ("codebook_size", "stochastic", "stochastic_temperature")}
    quantiser = {"name": "vq", "args": {**codes, "l2_normalized": True}}
    sizes["bottleneck"] = {"args": {"bottleneck_dim": sizes.pop("bottleneck_dim"), "regularizer": quantiser}}
    configs = {"larp-tokenizer": sizes}
    network = {"dim": 32, "n_layer": 1, "n_head": 2, "multiple_of": 8}
    for folder, layout, more in (
        ("larp-ar", {}, {}),
        ("larp-ar-fp", {"condition_tokens": 1024, "num_classes": 0}, {"frame_prediction": True, "cls_token_num": 1025}),
    ):
        weights[folder] = LARPTransformer(dim=32, depth=1, heads=2, hidden_dim=88, **layout).state_dict()
        configs[folder] = network | more
    for folder, config in configs.items():
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(weights[folder], Path(folder, "model.safetensors"))


def save_clip(folder: Path) -> None:
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "vocab_size": len(tokens)}
    vision = common | {"image_size": 32, "patch_size": 8}
    text = common | ends | {"max_position_embeddings": 77}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)


def save_emu3(folder: Path) -> None:
    """The whole model of transformers around a tiny tokenizer."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Emu3Config(
        vq_config=tiny_tokenizers.emu3_network().config.to_dict(),
        text_config=text | {"num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0},
        vocabulary_map={"<image>": 100},
    )
    Emu3ForConditionalGeneration(config).save_pretrained(folder)
