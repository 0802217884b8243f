# SPDX-License-Identifier: Apache-2.0
"""The table of bad input: every public callable with valid arguments, and for each argument values that are wrong."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from hypothesis import strategies as st

import reco_lightning as rl
from reco_lightning import metrics
from reco_lightning.data.token_module import TokenDataModule
from reco_lightning.data.token_writer import TokenShardWriter
from reco_lightning.data.video import probe, read_clip
from reco_lightning.data.video_folder import VideoFolder
from reco_lightning.data.video_module import VideoDataModule
from reco_lightning.draws import check_sampling
from reco_lightning.media import video_grid, video_strip, write_video
from reco_lightning.mixin import ReCoMixin
from reco_lightning.models.larp import LARPTransformer
from reco_lightning.models.video_model import VideoModel
from reco_lightning.prediction import GenerationRequests, VideoWriter
from reco_lightning.tokenize import pick_device, tokenize_folder
from reco_lightning.tokenizers import Emu3Tokenizer, LARPTokenizer, OmniTokenizer, VidTokTokenizer, load_tokenizer
from reco_lightning.tokenizers.base import latent_grid, to_uint8, to_unit_range
from reco_lightning.tokenizers.larp_config import LARPConfig
from reco_lightning.tokenizers.omnitokenizer_config import OmniTokenizerConfig
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers.checkpoints import save
from tests.helpers.tiny_tokenizers import emu3_network, vidtok_network

__all__ = ["ENTRIES", "UNCHECKED", "Entry", "received"]

Wrong = st.SearchStrategy[Any]


@dataclass(frozen=True)
class Entry:
    """One public callable.

    Args:
        name: Its public name.
        call: Takes keyword arguments.
        valid: Makes arguments with which the call succeeds; None where that takes files of a release.
        wrong: For each argument the values that it must refuse.
        said: What an error calls an argument, where that is not its name.
    """

    name: str
    call: Callable[..., Any]
    valid: Callable[[], Mapping[str, Any]] | None
    wrong: Mapping[str, Wrong]
    said: Mapping[str, str] = field(default_factory=dict)


def received(value: Any) -> list[str]:
    """What an error may say of a value: itself, or for objects their class, and of tensors dtype or shape."""
    kind = type(value).__name__
    found = [repr(value)[:200], f"got {kind}", f"got a {kind}"]
    if isinstance(value, str) and "." in value:  # a file, named by its whole path
        found.append(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [*found, str(value.dtype), str(tuple(value.shape))]
    if isinstance(value, (list, tuple)):  # the wrong item, or their number
        found += [f"got {item!r}" for item in (*value, len(value))]
    if isinstance(value, dict):
        found += [f"got {item!r}" for pair in value.items() for item in pair]
    return found


ODD = [None, "", "three", b"3", [3], {"a": 3}, {3}, object, 1j]
NAN, INFINITY = float("nan"), float("inf")


def values(*pinned: Any) -> Wrong:
    return st.sampled_from(pinned)


def whole(least: int | None = None, most: int | None = None, *, optional: bool = False) -> Wrong:
    """What is no whole number from `least` to `most`."""
    parts = [
        values(*(value for value in ODD if not (optional and value is None)), True, False, 2.0, NAN, INFINITY, 2**63),
        st.text(max_size=3),
        st.floats(),
        st.lists(st.integers(), max_size=2),
    ]
    if least is not None:
        parts.append(values(least - 1, -(2**40)))
    if most is not None:
        parts.append(values(most + 1, 2**40))
    return st.one_of(*parts)


def number(
    least: float | None = None, most: float | None = None, *, open_ends: str = "", optional: bool = False
) -> Wrong:
    """What is no finite number from `least` to `most`; `open_ends` names those that do not belong: "l", "m" or both."""
    parts = [
        values(
            *(value for value in ODD if not (optional and value is None)),
            True,
            False,
            NAN,
            INFINITY,
            -INFINITY,
            10**400,
        ),
        st.text(max_size=3),
        st.lists(st.floats(), max_size=2),
    ]
    if least is not None:
        parts.append(st.floats(max_value=least, exclude_max="l" not in open_ends, allow_infinity=False))
    if most is not None:
        parts.append(st.floats(min_value=most, exclude_min="m" not in open_ends, allow_infinity=False))
    return st.one_of(*parts)


def choice(*, optional: bool = False) -> Wrong:
    """What is the name of nothing."""
    found = [value for value in ODD if not (optional and value is None) and value is not object]
    return st.one_of(values(*found, 0, 1.5, True), st.text(min_size=1, max_size=3).map(lambda text: f"no {text}"))


SWITCH = values("true", "", 0, 1, 1.0, None, [True])
SEED = whole()
PATH = values(None, 3, 2.5, True, b"a", [], "", object)
MAYBE_PATH = values(3, 2.5, True, b"a", [], "", object)
TEXT = values(None, 3, 2.5, b"a", ["a"])
PAIR = values(None, 3, "ab", (1,), (1, 2, 3), (0, 8), (8, -1), (8, 2.5), (8, True), ("8", 8))
SIZE = values(None, "ab", (1,), (1, 2, 3), (0, 8), (8, 2.5), (True, 8), 0, -4, 2.5, True, NAN)
GRID = values(None, 3, "abc", (2,), (2, 2), (0, 2, 2), (2, 2, -1), (2, 2.5, 2), (2, True, 2), ("2", 2, 2), {2, 3, 4})
INTERVALS = values(None, 3, "12", [], [0], [-1, 2], [1.5], [True], ["1"])
NO_TENSOR = values(None, 3, "clip", [1, 2], np.zeros(3))
PROTOCOL = choice()


def tensors(*others: torch.Tensor) -> Wrong:
    return st.one_of(NO_TENSOR, values(*others))


SAMPLING: dict[str, Wrong] = {
    "temperature": number(0),
    "top_k": whole(1, optional=True),
    "top_p": number(0, 1, open_ends="l", optional=True),
    "cfg_scale": number(0),
    "seed": SEED,
}
BLOCKS = whole(1, optional=True)


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


def _none() -> dict[str, Any]:
    return {}


def _fixed(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(arguments)


def _larp() -> LARPConfig:
    sizes = {"input_size": 8, "bottleneck_token_num": 1, "encoder_hidden_size": 8, "decoder_hidden_size": 8}
    heads = {"encoder_num_heads": 1, "decoder_num_heads": 1, "encoder_depth": 1, "decoder_depth": 1}
    return LARPConfig(**sizes, **heads, codebook_size=4)


def _omni() -> OmniTokenizerConfig:
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


def _batch() -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(1, 4, dtype=torch.long), "label": torch.zeros(1, dtype=torch.long)}


class Encoder:
    """A picture and text encoder that needs no weights."""

    weights_hash = "none"

    def pictures(self, frames, device):
        return torch.ones(len(frames), 2)

    def texts(self, texts, device):
        return torch.ones(len(texts), 2)


def _flow_manifest() -> dict[str, Any]:
    path = folder() / "flow.json"
    metrics.MotionManifest({"a": 1.0}, size=(8, 8), frames=2, stride=1).save(path)
    return {"path": str(path)}


ENTRIES: tuple[Entry, ...] = (
    Entry("Window", rl.Window, _fixed(start=0, stop=2), {"start": whole(0, 1), "stop": whole(1)}),
    Entry(
        "WindowSampler",
        rl.WindowSampler,
        _fixed(frame_blocks=4, tokens_per_block=2),
        {
            "frame_blocks": whole(1),
            "tokens_per_block": whole(1),
            "window_blocks": whole(1, 4),
            "stride_blocks": number(0, open_ends="l"),
            "first_window_prob": number(0, 1, open_ends="l", optional=True),
            "seed": SEED,
            "schedule": values("ab", 3, [1], {2.0: 1}, {0.5: 0}, {0.5: "a"}, {0.5: 9}, {"a": 1}),
        },
    ),
    Entry(
        "ReCoCallback",
        rl.ReCoCallback,
        lambda: {"sampler": rl.WindowSampler(4, 2)},
        {
            "sampler": values(None, 3, "sampler", (4, 2)),
            "continuity_weight": number(0),
            "continuity_norm": choice(),
            "context": choice(),
            "windows_per_batch": whole(1),
            "continuity_lag": whole(1),
            "continuity_schedule": choice(),
            "continuity_balanced": SWITCH,
            "attached_blocks": whole(0),
            "attached_share": number(0, 1, open_ends="l"),
            "loss_aware": number(0),
            "engine": choice(),
            "network": values(3, b"a", ["a"], True),
            "blocks": values(3, b"a", ["a"], True),
            "head": values(3, b"a", ["a"], True),
            "prefix_tokens": whole(0, optional=True),
            "verify": SWITCH,
        },
    ),
    Entry(
        "ReCoMixin",
        lambda **arguments: Mixed().init_reco(**arguments),
        lambda: {"sampler": rl.WindowSampler(4, 2), "blocks": "blocks", "head": "head", "prefix_tokens": 1},
        {
            "sampler": values(None, 3, "sampler"),
            "blocks": TEXT,
            "head": TEXT,
            "prefix_tokens": whole(0),
            "continuity_weight": number(0),
            "continuity_norm": choice(),
            "context": choice(),
            "windows_per_batch": whole(1),
            "verify": SWITCH,
        },
    ),
    Entry(
        "continuity_loss",
        rl.continuity_loss,
        _fixed(hidden=torch.zeros(1, 4, 2)),
        {"hidden": tensors(torch.zeros(4, 2)), "norm": choice(), "lag": whole(1, 3)},
    ),
    Entry(
        "VideoTransformer",
        rl.VideoTransformer,
        _fixed(**SMALL),
        {
            "vocab_size": whole(1),
            "grid": GRID,
            "dim": whole(1),
            "depth": whole(1),
            "heads": whole(1),
            "hidden_dim": whole(1, optional=True),
            "num_classes": whole(0),
            "start_token": SWITCH,
            "dropout": number(0, 1, open_ends="m"),
        },
    ),
    Entry(
        "LARPTransformer",
        LARPTransformer,
        _fixed(vocab_size=8, video_tokens=4, num_classes=2, dim=8, depth=1, heads=1, hidden_dim=8),
        {
            **{name: whole(1) for name in ("vocab_size", "video_tokens", "dim", "depth", "heads")},
            **{name: whole(1, optional=True) for name in ("kv_heads", "hidden_dim")},
            **{name: whole(0) for name in ("condition_tokens", "num_classes")},
            **{
                f"{name}_dropout": number(0, 1, open_ends="m")
                for name in ("token", "attention", "residual", "feed_forward")
            },
            "norm_eps": number(0, open_ends="l"),
            "learned_positions": SWITCH,
        },
    ),
    Entry(
        "VideoModel",
        VideoModel,
        lambda: {"network": network()},
        {
            "network": values(None, 3, "network", torch.nn.Linear(1, 1)),
            "learning_rate": number(0, open_ends="l"),
            "weight_decay": number(0),
            "betas": values(None, 0.9, "ab", (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), ("a", "b"), (True, 0.9)),
            "warmup_steps": whole(0),
            "label_dropout": number(0, 1, open_ends="m"),
        },
    ),
    Entry(
        "generate",
        rl.generate,
        lambda: {"model": network(), "n": 1, "condition": 1},
        {
            **SAMPLING,
            "model": values(None, 3, "network"),
            "n": whole(1),
            "condition": values("a", 2.5, True, 2, -1, torch.zeros(1), torch.zeros(3, dtype=torch.long)),
            "first_tokens": st.one_of(
                values(3, "a", [1]), values(torch.zeros(1, 1), torch.zeros(1, 9).long(), torch.tensor([[8]]))
            ),
            "indices": values(3, "a", [], [1, 2], [0.5], [True]),
            "length": BLOCKS,
            "window_blocks": whole(1, 2, optional=True),
            "context_blocks": whole(1, 1, optional=True),
            "batch_size": whole(1),
            "cache": SWITCH,
            "compile": values(None, 3, 2.5, []),
        },
    ),
    Entry(
        "explain",
        rl.explain,
        lambda: {
            "module": VideoModel(rl.VideoTransformer(**SMALL | {"grid": (4, 1, 2)})),
            "batch": {"tokens": torch.zeros(1, 8, dtype=torch.long), "label": torch.zeros(1, dtype=torch.long)},
            "callback": rl.ReCoCallback(rl.WindowSampler(4, 2)),
        },
        {"module": values(None, 3, torch.nn.Linear(1, 1)), "callback": values(None, 3, "callback")},
    ),
    Entry(
        "PositionLossProfile",
        rl.PositionLossProfile,
        _none,
        {"every_n_epochs": whole(1), "batches": whole(1, optional=True), "generated": whole(0), "seed": SEED},
    ),
    Entry(
        "SampleVideos",
        rl.SampleVideos,
        _none,
        {
            **SAMPLING,
            "tokenizer": MAYBE_PATH,
            "every_n_epochs": whole(1),
            "every_n_steps": whole(1, optional=True),
            "n": whole(1),
            "label": whole(0, optional=True),
            "length": BLOCKS,
            "window_blocks": BLOCKS,
            "fps": number(0, 1000, open_ends="l"),
        },
    ),
    Entry(
        "EvaluateVideos",
        rl.EvaluateVideos,
        _fixed(tokenizer="vqvae.ckpt"),
        {
            **SAMPLING,
            "tokenizer": PATH,
            "output": PATH,
            "n": whole(2, optional=True),
            "videos": MAYBE_PATH,
            "extractor": MAYBE_PATH,
            "protocol": PROTOCOL,
            "clip": MAYBE_PATH,
            "flow": SWITCH,
            "first_blocks": whole(0),
            "window_blocks": BLOCKS,
        },
    ),
    Entry(
        "GenerationRequests",
        GenerationRequests,
        _fixed(n=2),
        {
            **SAMPLING,
            "n": whole(1),
            "labels": values(3, "12", [], [-1], [0.5], [True], {1}),
            "prefix": st.one_of(MAYBE_PATH, values("nothing.npy")),
            "first_tokens": st.one_of(MAYBE_PATH, values("nothing.npy")),
            "length": BLOCKS,
            "window_blocks": BLOCKS,
            "context_blocks": BLOCKS,
            "batch_size": whole(1),
        },
    ),
    Entry(
        "VideoWriter",
        VideoWriter,
        _none,
        {"tokenizer": MAYBE_PATH, "output": PATH, "fps": number(0, 1000, open_ends="l")},
    ),
    Entry(
        "check_sampling",
        check_sampling,
        _none,
        {**SAMPLING, "length": BLOCKS},
    ),
    Entry(
        "VQVAE",
        VQVAE,
        _fixed(codebook_size=4, width=8),
        {
            "codebook_size": whole(2),
            "spatial_stride": st.one_of(whole(), values(0, 4, 12)),
            "width": st.one_of(whole(8), values(12)),
            "depth": whole(1),
            "code_dim": whole(2),
            "learning_rate": number(0, open_ends="l"),
            "weight_decay": number(0),
            "warmup_steps": whole(0),
            "decay_steps": whole(1, optional=True),
            "mse_weight": number(0),
            "gradient_weight": number(0),
            "commitment_weight": number(0),
            "codebook_decay": number(0, 1, open_ends="m"),
            "dead_code_threshold": number(0),
            "seed": SEED,
        },
    ),
    Entry("LARPTokenizer", LARPTokenizer, lambda: {"config": _larp()}, {"config": values(3, "config", {"a": 1})}),
    Entry(
        "LARPConfig",
        LARPConfig,
        _none,
        {
            "codebook_size": whole(1),
            "encoder_depth": whole(1),
            "stochastic": SWITCH,
            "stochastic_temperature": number(),
        },
    ),
    Entry("OmniTokenizer", OmniTokenizer, lambda: {"config": _omni()}, {"config": values(3, "config", {"a": 1})}),
    Entry(
        "OmniTokenizerConfig",
        OmniTokenizerConfig,
        _none,
        {
            "n_codes": whole(1),
            "temporal_depth": whole(0),
            "enc_block": TEXT,
            "spatial_pos": choice(),
            "l2_code": SWITCH,
        },
    ),
    Entry(
        "Emu3Tokenizer",
        Emu3Tokenizer,
        lambda: {"model": emu3()},
        {
            "model": values(None, 3, "emu3", torch.nn.Linear(1, 1)),
            "image_mean": st.one_of(number(), values((0.5, 0.5), (0.5, 0.5, "a"))),
            "image_std": st.one_of(number(0, open_ends="l"), values((0.5, 0.5), (0.5, 0.5, 0.0))),
        },
    ),
    Entry(
        "VidTokTokenizer",
        VidTokTokenizer,
        lambda: {"model": vidtok()},
        {"model": values(None, 3, "vidtok", torch.nn.Linear(1, 1))},
    ),
    Entry(
        "load_tokenizer",
        load_tokenizer,
        lambda: {"source": vqvae_file()},
        {"source": st.one_of(PATH, values("nothing.ckpt", "/dev/null")), "vocab_size": whole(None, 4, optional=True)},
        {"source": "tokenizer", "vocab_size": "ids"},
    ),
    Entry(
        "to_unit_range",
        to_unit_range,
        _fixed(clips=torch.zeros(1, 1, 2, 2, 3).byte()),
        {"clips": RAW},
    ),
    Entry("to_uint8", to_uint8, _fixed(video=torch.zeros(1, 3, 1, 2, 2)), {"video": tensors(CLIPS, torch.zeros(3))}),
    Entry(
        "latent_grid",
        lambda **arguments: latent_grid(**arguments, temporal_stride=4, spatial_stride=8),
        _fixed(frames=5, height=8, width=8),
        {"frames": whole(1), "height": whole(8), "width": whole(8)},
    ),
    Entry(
        "VideoFolder",
        VideoFolder,
        lambda: {"root": videos(), "frames": 2},
        {
            "root": st.one_of(PATH, values("nowhere")),
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
            "clip_step": whole(1, optional=True),
            "on_error": choice(),
            "extensions": values(None, 3, ".mp4", ["mp4"], [3], [None]),
            "cache": SWITCH,
            "layout": choice(),
            "split": values(3, 2.5, b"train", ["train"]),
            "index": st.one_of(MAYBE_PATH, values("nothing.jsonl")),
        },
    ),
    Entry(
        "VideoDataModule",
        VideoDataModule,
        lambda: {"root": videos()},
        {
            "root": PATH,
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
            "clip_step": whole(1, optional=True),
            "on_error": choice(),
            "extensions": values(None, 3, ".mp4", ["mp4"], [3]),
            "cache": SWITCH,
            "batch_size": whole(1),
            "num_workers": whole(0),
            "start_method": choice(optional=True),
            "val_fraction": number(0, 1, open_ends="m"),
            "seed": SEED,
            "layout": choice(),
            "split": values(3, 2.5, b"train", ["train"]),
            "index": MAYBE_PATH,
        },
    ),
    Entry(
        "TokenDataModule",
        TokenDataModule,
        _fixed(folder="tokens"),
        {
            "folder": PATH,
            "batch_size": whole(1),
            "num_workers": whole(0),
            "val_fraction": number(0, 1, open_ends="m"),
            "split": choice(),
            "shuffle": SWITCH,
            "seed": SEED,
            "split_seed": SEED,
            "drop_last": SWITCH,
            "strict_resume": SWITCH,
            "verify": SWITCH,
        },
    ),
    Entry(
        "TokenShardWriter",
        TokenShardWriter,
        lambda: {"folder": new_folder(), "vocab_size": 8, "grid": (2, 1, 2)},
        {
            "folder": PATH,
            "vocab_size": whole(1, 2**32),
            "grid": GRID,
            "tokenizer": TEXT,
            "tokenizer_sha256": TEXT,
            "classes": values(None, 3, "ab"),
            "video": values(3, "ab", [1]),
            "shard_size": whole(1),
            "overwrite": SWITCH,
            "frame_aligned": SWITCH,
            "workspace": MAYBE_PATH,
        },
    ),
    Entry("probe", probe, lambda: {"path": f"{videos()}/a.mp4"}, {"path": st.one_of(PATH, values("nothing.mp4"))}),
    Entry(
        "read_clip",
        read_clip,
        lambda: {"path": f"{videos()}/a.mp4", "start": 0, "frames": 2, "size": 16},
        {
            "path": st.one_of(PATH, values("nothing.mp4")),
            "start": whole(0),
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
        },
    ),
    Entry("pick_device", pick_device, _fixed(device="cpu"), {"device": choice()}),
    Entry(
        "tokenize_folder",
        tokenize_folder,
        lambda: {
            "tokenizer": vqvae_file(),
            "videos": videos(),
            "output": new_folder(),
            "frames": 5,
            "size": 16,
            "device": "cpu",
            "progress": False,
        },
        {
            "tokenizer": values(None, 3, "", "nothing.ckpt"),
            "videos": st.one_of(PATH, values("nowhere")),
            "output": PATH,
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
            "clip_step": whole(1, optional=True),
            "captions": MAYBE_PATH,
            "batch_size": whole(1),
            "num_workers": whole(0),
            "device": choice(),
            "devices": whole(-1),
            "strategy": values(None, 3, 2.5),
            "shard_size": whole(1),
            "overwrite": SWITCH,
            "progress": SWITCH,
            "layout": choice(),
            "split": values(3, b"train", ["train"]),
            "index": MAYBE_PATH,
        },
    ),
    Entry(
        "write_video",
        write_video,
        lambda: {"path": folder() / "b.mp4", "frames": np.zeros((2, 16, 16, 3), np.uint8)},
        {
            "path": st.one_of(PATH, values("b.avi")),
            "frames": values(np.zeros(2), np.zeros((2, 16, 16, 3)), np.zeros((16, 16, 3), np.uint8)),
            "fps": number(0, 1000, open_ends="l"),
        },
    ),
    Entry(
        "video_grid",
        video_grid,
        _fixed(clips=np.zeros((2, 1, 2, 2, 3), np.uint8), columns=1),
        {"clips": values(np.zeros(2), np.zeros((2, 2))), "columns": whole(1)},
    ),
    Entry(
        "video_strip",
        video_strip,
        _fixed(frames=np.zeros((2, 2, 2, 3), np.uint8)),
        {"frames": values(np.zeros(2), np.zeros((2, 2))), "count": whole(1)},
    ),
    Entry("RandomConvFeatures", metrics.RandomConvFeatures, _none, {"seed": whole(), "width": whole(1)}),
    Entry(
        "RandomFeatureDistance",
        metrics.RandomFeatureDistance,
        _none,
        {"frames": whole(1, optional=True), "seed": whole()},
    ),
    Entry(
        "TorchScriptFeatures",
        metrics.TorchScriptFeatures,
        lambda: {"path": script_file()},
        {
            "path": st.one_of(PATH, values("nothing.pt", "/dev/null")),
            "protocol": PROTOCOL,
            "width": whole(1),
            "batch_size": whole(1),
        },
    ),
    Entry(
        "FrechetVideoDistance",
        metrics.FrechetVideoDistance,
        lambda: {"extractor": flat()},
        {
            "extractor": values(None, 3, [], "nothing.pt"),
            "protocol": PROTOCOL,
            "width": whole(1, optional=True),
            "few": choice(),
        },
    ),
    Entry(
        "PolynomialVideoMMD",
        metrics.PolynomialVideoMMD,
        lambda: {"extractor": flat()},
        {
            "extractor": values(None, 3, "weights.pt"),
            "frames": whole(1, optional=True),
            "width": whole(1, optional=True),
            "unbiased": SWITCH,
        },
    ),
    Entry(
        "frechet_distance",
        metrics.frechet_distance,
        _fixed(real=FEATURES, generated=FEATURES),
        {"real": WRONG_FEATURES, "generated": WRONG_FEATURES, "ddof": whole(0, 1)},
        {"real": "features", "generated": "features"},
    ),
    Entry(
        "polynomial_mmd",
        metrics.polynomial_mmd,
        _fixed(real=FEATURES, generated=FEATURES),
        {"real": WRONG_FEATURES, "generated": WRONG_FEATURES, "unbiased": SWITCH},
        {"real": "features", "generated": "features"},
    ),
    Entry(
        "frechet_video_distance",
        metrics.frechet_video_distance,
        lambda: {
            "real": CLIPS.repeat(1, 1, 6, 1, 1)[:, :, :16],
            "generated": CLIPS.repeat(1, 1, 6, 1, 1)[:, :, :16],
            "extractor": flat(),
        },
        {
            "real": WRONG_CLIPS,
            "generated": WRONG_CLIPS,
            "extractor": values(None, 3, "weights.pt"),
            "protocol": PROTOCOL,
        },
        {"real": "clips", "generated": "clips"},
    ),
    Entry(
        "fvd_extractor",
        metrics.fvd_extractor,
        lambda: {"path": script_file(), "protocol": "styleganv"},
        {"path": st.one_of(PATH, values("nothing.pt", "/dev/null")), "protocol": PROTOCOL},
    ),
    Entry("fvd_protocol", metrics.fvd_protocol, _fixed(protocol="styleganv"), {"protocol": PROTOCOL}),
    Entry(
        "FVDProtocol",
        metrics.FVDProtocol,
        _fixed(name="own", frames=16),
        {
            "name": TEXT,
            "frames": whole(9),
            "clips": whole(1),
            "resize": choice(),
            "output": choice(),
            "ddof": whole(0, 1),
            "norm_epsilon": number(0, open_ends="l"),
            "place": choice(),
        },
    ),
    Entry("InceptionI3D", metrics.InceptionI3D, _none, {"norm_epsilon": number(0, open_ends="l")}),
    Entry(
        "I3DFeatures",
        metrics.I3DFeatures,
        lambda: {"network": i3d(), "weights": "none"},
        {"network": values(None, 3, torch.nn.Linear(1, 1)), "protocol": PROTOCOL, "batch_size": whole(1)},
    ),
    Entry(
        "load_i3d",
        lambda **arguments: metrics.load_i3d(**{"path": "nowhere"} | arguments),
        None,
        {
            "path": st.one_of(PATH, values("nothing.pt", "/dev/null")),
            "protocol": PROTOCOL,
            "batch_size": whole(1),
        },
    ),
    Entry("IntervalPSNR", metrics.IntervalPSNR, _none, {"intervals": INTERVALS, "pairs": choice()}),
    Entry("IntervalOpticalFlow", metrics.IntervalOpticalFlow, _none, {"intervals": INTERVALS, "pairs": choice()}),
    *(
        Entry(
            call.__name__,
            call,
            _fixed(videos=CLIPS, intervals=(1, 2)),
            {"videos": WRONG_CLIPS, "intervals": st.one_of(INTERVALS, values([3])), "pairs": choice()},
        )
        for call in (metrics.interval_psnr, metrics.interval_optical_flow)
    ),
    Entry("mean_flow", metrics.mean_flow, _fixed(videos=CLIPS), {"videos": WRONG_CLIPS, "size": PAIR.filter(bool)}),
    Entry(
        "MotionGroups",
        metrics.MotionGroups,
        lambda: {"metric": torchmetrics.MeanMetric()},
        {"metric": values(None, 3, "fvd"), "size": PAIR, "min_count": whole(1)},
    ),
    Entry(
        "MotionManifest.load",
        metrics.MotionManifest.load,
        _flow_manifest,
        {"path": st.one_of(PATH, values("nothing.json", "/dev/null"))},
    ),
    Entry(
        "measure_motion",
        metrics.measure_motion,
        lambda: {"clips": [("a", CLIPS[0])]},
        {"clips": values([]), "size": PAIR, "stride": whole(1)},
    ),
    Entry(
        "motion_group",
        metrics.motion_group,
        _fixed(flow=torch.zeros(2)),
        {"flow": NO_TENSOR},
    ),
    Entry(
        "PositionLoss",
        metrics.PositionLoss,
        _fixed(num_tokens=4, tokens_per_block=2),
        {"num_tokens": whole(1), "tokens_per_block": whole(1, 4)},
    ),
    Entry(
        "measure_position_loss",
        metrics.measure_position_loss,
        lambda: {"model": network(), "batches": [_batch()]},
        {
            "model": values(None, 3, "network"),
            "batches": values(None, 3),
            "metric": values(3, "loss"),
        },
    ),
    Entry(
        "generated_batches",
        lambda **arguments: list(metrics.generated_batches(**arguments)),
        lambda: {"model": network(), "batches": [_batch()]},
        {
            **{name: wrong for name, wrong in SAMPLING.items() if name != "cfg_scale"},
            "model": values(None, 3, "network"),
            "batches": values(None, 3),
            "given_blocks": whole(0, 1),
            "first_index": whole(0),
        },
    ),
    Entry("CLIP", metrics.CLIP, None, {"folder": st.one_of(PATH, values("nowhere"))}),
    Entry(
        "CLIPScore",
        metrics.CLIPScore,
        lambda: {"encoder": Encoder(), "frames": 2},
        {"encoder": values(None, 3, b"a", [], "nowhere.clip"), "frames": whole(1)},
    ),
    Entry(
        "convert_i3d",
        lambda **arguments: metrics.convert_i3d(**{"checkpoint": "nowhere", "output": "i3d.pt"} | arguments),
        None,
        {"checkpoint": st.one_of(PATH, values("nowhere")), "output": PATH, "allow_unknown": SWITCH},
    ),
)
"""Every public callable that takes plain values, tensors or paths."""

UNCHECKED: dict[tuple[str, str], str] = {
    **{("Window", name): "made by the sampler, thousands a run" for name in ("start", "stop")},
}
"""Arguments whose constructor lets some wrong value pass, or fail in Python's own words, with the reason."""
