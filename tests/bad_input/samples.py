# SPDX-License-Identifier: Apache-2.0
"""Valid arguments for the table of bad input: small networks, clips and files, each made once."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reco_lightning as rl
from reco_lightning import metrics
from reco_lightning.data.tokens.writer import TokenShardWriter
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.larp.config import LARPConfig
from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig
from reco_lightning.tokenizers.vqvae import VQVAE
from reco_lightning.windowing.mixin import ReCoMixin
from tests.bad_input.strategies import tensors
from tests.helpers.checkpoints import save
from tests.helpers.tiny_tokenizers import emu3_network, vidtok_network
from tests.helpers.words import save_words

__all__ = [
    "CLIPS", "FEATURES", "LLAMA", "RAW", "SMALL", "WRONG_CLIPS", "WRONG_FEATURES", "Encoder", "Mixed", "batch",
    "emu3", "fixed", "flat", "flow_manifest", "folder", "i3d", "ids_file", "larp_config", "model_file", "network",
    "new_folder", "nothing", "omni_config", "script_file", "text_file", "text_network", "token_folder", "tokenizer",
    "videos", "vidtok", "vqvae_file", "words",
]  # fmt: skip


@lru_cache
def folder() -> Path:
    """A place for small files that the whole table shares."""
    return Path(tempfile.mkdtemp(prefix="bad-input-"))


@lru_cache
def videos() -> str:
    write_video(folder() / "videos" / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8))
    return str(folder() / "videos")


@lru_cache
def ids_file() -> str:
    np.save(folder() / "ids.npy", np.zeros((2, 1), np.int64))
    return str(folder() / "ids.npy")


@lru_cache
def network() -> rl.VideoTransformer:
    return rl.VideoTransformer(**SMALL, num_classes=2)


@lru_cache
def i3d() -> metrics.InceptionI3D:
    with torch.device("meta"):
        return metrics.InceptionI3D()


@lru_cache
def flat() -> metrics.RandomConvFeatures:
    return metrics.RandomConvFeatures(width=2)


emu3, vidtok = lru_cache(emu3_network), lru_cache(vidtok_network)


def new_folder() -> str:
    return tempfile.mkdtemp(dir=folder())


SMALL = {"vocab_size": 8, "grid": (2, 1, 2), "dim": 12, "depth": 1, "heads": 1}
CLIPS = torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)
RAW = tensors(CLIPS.float(), CLIPS[0])
WRONG_CLIPS = tensors(CLIPS.float(), CLIPS[0], CLIPS[:, :2])
FEATURES = torch.arange(6.0).view(3, 2)
WRONG_FEATURES = tensors(FEATURES[0], FEATURES[None], FEATURES[:, :1])


class Mixed(ReCoMixin, torch.nn.Module):
    """What `init_reco` is called on."""


def nothing() -> dict[str, Any]:
    return {}


def fixed(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(arguments)


def larp_config() -> LARPConfig:
    sizes = {"input_size": 8, "bottleneck_token_num": 1, "encoder_hidden_size": 8, "decoder_hidden_size": 8}
    heads = {"encoder_num_heads": 1, "decoder_num_heads": 1, "encoder_depth": 1, "decoder_depth": 1}
    return LARPConfig(**sizes, **heads, codebook_size=4)


def omni_config() -> OmniTokenizerConfig:
    sizes = {"embedding_dim": 16, "heads": 1, "dim_head": 16, "ff_width": 8, "twod_window_size": 2}
    return OmniTokenizerConfig(n_codes=4, enc_block="t", dec_block="t", temporal_depth=1, **sizes)


@lru_cache
def vqvae_file() -> str:
    return save(VQVAE(codebook_size=4, width=8), folder() / "vqvae.ckpt")


@lru_cache
def script_file() -> str:
    path = folder() / "features.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 advises torch.export
        torch.jit.script(torch.nn.Identity()).save(path)
    return str(path)


def batch() -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(1, 4, dtype=torch.long), "label": torch.zeros(1, dtype=torch.long)}


class Encoder:
    """A picture and text encoder that needs no weights."""

    weights_hash = "none"

    def pictures(self, frames, device):
        return torch.ones(len(frames), 2)

    def texts(self, texts, device):
        return torch.ones(len(texts), 2)


def flow_manifest() -> dict[str, Any]:
    path = folder() / "flow.json"
    metrics.MotionManifest({"a": 1.0}, size=(8, 8), frames=2, stride=1).save(path)
    return {"path": str(path)}


LLAMA = {"model_type": "llama", "vocab_size": 3, "hidden_size": 8, "intermediate_size": 8}
LLAMA |= {"num_hidden_layers": 1, "num_attention_heads": 1}


@lru_cache
def text_network() -> rl.TextVideoNetwork:
    found = rl.TextVideoNetwork(6, (2, 1, 2), architecture=LLAMA)
    found.build()
    return found


@lru_cache
def words() -> str:
    return save_words(folder() / "words", ["a", "cat"])


@lru_cache
def token_folder() -> str:
    with TokenShardWriter(folder() / "tokens", vocab_size=8, grid=(2, 1, 2)) as writer:
        writer.write(np.zeros((2, 2, 1, 2), np.int64))
    return str(folder() / "tokens")


@lru_cache
def model_file() -> str:
    return save(VideoModel(network()), folder() / "model.ckpt")


@lru_cache
def tokenizer() -> VQVAE:
    return VQVAE(codebook_size=8, width=8).eval()


def text_file(name: str, content: str) -> str:
    (folder() / name).write_text(content)
    return str(folder() / name)
