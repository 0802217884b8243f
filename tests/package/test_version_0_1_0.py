# SPDX-License-Identifier: Apache-2.0
"""What version 0.1.0 wrote is read: shards, checkpoints, and a run's config, in which modules have their old paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from packaging.version import Version

from reco_lightning import TextVideoModel, VideoModel
from reco_lightning.cli.entry_point import main
from reco_lightning.data.tokens.shards import ClipSource, TokenShards
from reco_lightning.support.checkpoints import load_module

pytestmark = pytest.mark.filterwarnings(
    "ignore:The loaded checkpoint was produced with Lightning v2.6.6, which is newer"
)

DATA = Path(__file__).parents[1] / "data" / "version_0_1_0"


def test_token_shards():
    shards = TokenShards(DATA / "tokens")
    shards.verify()
    written = np.random.default_rng(0).integers(0, 16, (4, 12))
    assert [shards[number]["tokens"].tolist() for number in range(4)] == written.tolist()
    assert [shards[number]["label"] for number in range(4)] == [0, 1, 0, 1]
    assert shards.source(3) == ClipSource("3.mp4", 0, 9)
    assert shards.classes == ("a", "b")


def test_a_checkpoint_gives_the_logits_of_0_1_0():
    model = load_module(str(DATA / "video_model.ckpt"), VideoModel)
    with np.load(DATA / "outputs.npz") as outputs, torch.no_grad():
        logits = model.network(torch.from_numpy(outputs["ids"]))
        np.testing.assert_allclose(logits.numpy(), outputs["logits"], atol=1e-5)


@pytest.mark.parametrize("load", [lambda path: load_module(path, TextVideoModel), TextVideoModel.load_from_checkpoint])
def test_a_class_that_moved_is_loaded_without_a_word(load):
    model = load(str(DATA / "text_video_model.ckpt"))
    assert model.network.grid == (3, 2, 2)
    stored = torch.load(DATA / "text_video_model.ckpt", weights_only=True)["state_dict"]
    assert stored
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.6"),
    reason="the config names an option that ModelCheckpoint has from 2.6 on",
)
@pytest.mark.filterwarnings("ignore:reco_lightning.* has moved to:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # its four clips leave none to validate with
def test_its_run_is_resumed_from_its_own_config(tmp_path, monkeypatch):
    shutil.copytree(DATA / "tokens", tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    run = ["fit", "--config", str(DATA / "config.yaml"), f"--ckpt_path={DATA / 'video_model.ckpt'}"]
    main([*run, "--trainer.max_steps=4"])
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
