# SPDX-License-Identifier: Apache-2.0
"""Shards that do not fit the model or the windows are refused before the first step, by the numbers that differ."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.data.tokens.compatibility import mismatches
from reco_lightning.data.tokens.manifest import Manifest
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import TokenShardWriter

GRID = (5, 2, 3)


def manifest(grid=GRID, **options):
    return Manifest(vocab_size=16, grid=grid, dtype="uint16", clips=8, **options)


def network(**options):
    return SimpleNamespace(**options)


@pytest.mark.parametrize(
    ("one", "samplers", "expected"),
    [
        (None, [], []),
        (network(), [], []),
        (network(vocab_size=16, grid=[5, 2, 3]), [WindowSampler(5, 6)], []),
        (network(vocab_size=17), [], ["the shards have vocab_size 16, the model 17"]),
        (network(grid=(5, 3, 2)), [], ["the shards have grid (5, 2, 3), the model (5, 3, 2)"]),
        (network(grid=(30,)), [], []),
        (network(grid=(29,)), [], ["the shards hold 30 ids a clip, the model 29"]),
        (network(num_tokens=30), [], []),
        (network(num_tokens=60), [], ["the shards hold 30 ids a clip, the model 60"]),
        (
            None,
            [WindowSampler(5, 6), WindowSampler(5, 4)],
            ["the shards hold 30 ids a clip, the sampler expects 20 (frame_blocks=5 x tokens_per_block=4)"],
        ),
        (
            None,
            [WindowSampler(3, 10)],
            ["the shards have 5 frame blocks of 6 ids, the sampler frame_blocks=3 x tokens_per_block=10"],
        ),
        (
            network(vocab_size=8, grid=(4, 2, 3)),
            [WindowSampler(4, 6)],
            [
                "the shards have vocab_size 16, the model 8",
                "the shards have grid (5, 2, 3), the model (4, 2, 3)",
                "the shards hold 30 ids a clip, the sampler expects 24 (frame_blocks=4 x tokens_per_block=6)",
            ],
        ),
    ],
)
def test_every_number_that_differs_is_named(one, samplers, expected):
    assert mismatches(manifest(), network=one, samplers=samplers) == expected


def test_ids_in_no_order_of_time_may_be_split_in_any_way():
    holistic = manifest((30,), frame_aligned=False)
    for blocks in (1, 3, 5, 30):
        assert (
            mismatches(
                holistic,
                network=network(grid=(30 // blocks, blocks, 1)),
                samplers=[WindowSampler(blocks, 30 // blocks, window_blocks=1)],
            )
            == []
        )
    assert mismatches(holistic, samplers=[WindowSampler(5, 5)]) == [
        "the shards hold 30 ids a clip, the sampler expects 25 (frame_blocks=5 x tokens_per_block=5)"
    ]
    unordered = manifest(frame_aligned=False)
    assert mismatches(unordered, samplers=[WindowSampler(3, 10)]) == []


class Late(VideoModel):
    """Makes its network when the trainer asks for it."""

    def configure_model(self):
        self.network = model(vocab_size=8).network

    def __init__(self):
        super().__init__(model().network)
        self.network = None


def model(vocab_size=16, grid=GRID):
    return VideoModel(VideoTransformer(vocab_size=vocab_size, grid=grid, dim=32, depth=2, heads=2))


def trainer(*callbacks):
    return L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


@pytest.fixture
def folder(tmp_path):
    with TokenShardWriter(tmp_path, vocab_size=16, grid=GRID) as writer:
        writer.write(np.random.default_rng(0).integers(0, 16, (8, *GRID)))
    return str(tmp_path)


def data(folder):
    return TokenDataModule(folder, batch_size=2, val_fraction=0.25, split="time")


@pytest.mark.parametrize(
    ("module", "sampler", "message"),
    [
        (model(vocab_size=17), WindowSampler(5, 6), "the shards have vocab_size 16, the model 17"),
        (model(grid=(5, 3, 2)), WindowSampler(5, 6), r"grid \(5, 2, 3\), the model \(5, 3, 2\)"),
        (
            model(),
            WindowSampler(5, 5),
            r"hold 30 ids a clip, the sampler expects 25 \(frame_blocks=5 x tokens_per_block=5",
        ),
        (model(), WindowSampler(6, 5), "5 frame blocks of 6 ids, the sampler frame_blocks=6 x tokens_per_block=5"),
        (Late(), WindowSampler(5, 6), "the shards have vocab_size 16, the model 8"),
    ],
)
def test_training_refuses_shards_that_do_not_fit(folder, module, sampler, message):
    with pytest.raises(ValueError, match=rf"folder must hold token shards that fit .*{message}.*\. Set the model and"):
        trainer(ReCoCallback(sampler)).fit(module, datamodule=data(folder))


def test_shards_that_fit_train_and_windows_count_in_training_alone(folder):
    one = trainer(ReCoCallback(WindowSampler(5, 6)))
    one.fit(model(), datamodule=data(folder))
    assert one.global_step == 1
    trainer(ReCoCallback(WindowSampler(4, 6))).validate(model(), datamodule=data(folder), verbose=False)
    with pytest.raises(ValueError, match="the shards have vocab_size 16, the model 17"):
        trainer().validate(model(vocab_size=17), datamodule=data(folder), verbose=False)
