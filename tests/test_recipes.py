# SPDX-License-Identifier: Apache-2.0
"""Every packaged recipe parses as it stands, agrees with itself, and runs when made small."""

from __future__ import annotations

import copy
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from reco_lightning.cli import main, recipes
from reco_lightning.data.tokens import ClipSource, TokenShardWriter
from reco_lightning.media import write_video

NAMES = sorted(recipes())
GRID = (5, 2, 2)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipes()[name].read_text())


def callback(recipe: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(c["init_args"] for c in recipe["trainer"]["callbacks"] if c["class_path"] == kind)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Shards of 16 clips of the small grid."""
    ids = np.random.default_rng(0).integers(0, 16, (16, *GRID))
    with TokenShardWriter(tmp_path / "tokens", vocab_size=16, grid=GRID) as writer:
        writer.write(ids, np.zeros(16, dtype=np.int64), [ClipSource(f"{i}.mp4", 0, 17) for i in range(16)])
    return tmp_path / "tokens"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four short clips of noise."""
    (tmp_path / "videos").mkdir()
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{number}.mp4", frames)
    return tmp_path / "videos"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_opens_with_its_launch_command(name: str) -> None:
    head = recipes()[name].read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"#   reco fit --config recipe:{name} " in head


@pytest.mark.parametrize("name", NAMES)
def test_recipe_parses_in_a_fresh_process_and_names_real_arguments(name: str, tmp_path: Path) -> None:
    # in this process other tests have imported the classes that the short names stand for
    command = [sys.executable, "-m", "reco_lightning", "fit", "--config", f"recipe:{name}", "--print_config"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["model"]["class_path"].startswith("reco_lightning.")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_logs_to_wandb_offline_and_keeps_slashes_out_of_file_names(name: str) -> None:
    recipe = load(name)
    assert recipe["trainer"]["logger"]["class_path"] == "WandbLogger"
    assert recipe["trainer"]["logger"]["init_args"]["offline"] is True
    assert callback(recipe, "ModelCheckpoint")["auto_insert_metric_name"] is False


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_commented_loggers_are_one_line_each(name: str, logger: str) -> None:
    lines = [line for line in recipes()[name].read_text().splitlines() if f"# logger: {{class_path: {logger}" in line]
    assert len(lines) == 1
    parsed = yaml.safe_load(lines[0].replace("# ", "", 1))
    assert parsed["logger"]["init_args"]["save_dir"] == load(name)["trainer"]["logger"]["init_args"]["save_dir"]


def test_reco_differs_from_its_baseline_in_the_callback_alone() -> None:
    reco, baseline = load("reco"), load("baseline")
    reco["trainer"]["callbacks"] = [c for c in reco["trainer"]["callbacks"] if c["class_path"] != "ReCoCallback"]
    assert reco["trainer"].pop("logger") != baseline["trainer"].pop("logger")
    assert reco == baseline


def test_window_sampler_fits_the_grid() -> None:
    recipe = load("reco")
    grid = recipe["model"]["init_args"]["network"]["init_args"]["grid"]
    sampler = callback(recipe, "ReCoCallback")["sampler"]["init_args"]
    assert (sampler["frame_blocks"], sampler["tokens_per_block"]) == (grid[0], prod(grid[1:]))


def run_small(recipe: dict[str, Any], folder: Path) -> None:
    recipe = copy.deepcopy(recipe)
    recipe["trainer"] |= {
        "fast_dev_run": 2,
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "precision": "32-true",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    main(["fit", f"--config={path}"])


@pytest.mark.parametrize("name", ["baseline", "reco"])
@pytest.mark.parametrize("classes", [0, 3])
def test_token_recipe_runs(name: str, classes: int, tokens: Path, tmp_path: Path) -> None:
    recipe = load(name)
    recipe["model"]["init_args"]["network"]["init_args"] |= {
        "vocab_size": 16, "grid": list(GRID), "dim": 32, "depth": 2, "heads": 2, "num_classes": classes,
    }  # fmt: skip
    recipe["data"]["init_args"] |= {"folder": str(tokens), "batch_size": 4, "val_fraction": 0.25}
    if name == "reco":
        callback(recipe, "ReCoCallback")["sampler"]["init_args"]["tokens_per_block"] = 4
    run_small(recipe, tmp_path)


def test_vqvae_recipe_runs(videos: Path, tmp_path: Path) -> None:
    recipe = load("vqvae")
    recipe["data"]["init_args"] |= {
        "root": str(videos), "frames": 5, "size": 32, "batch_size": 2, "num_workers": 0, "val_fraction": 0.25,
    }  # fmt: skip
    run_small(recipe, tmp_path)
