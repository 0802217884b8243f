# SPDX-License-Identifier: Apache-2.0
"""`reco explain`: the config of a fit in, the callback's choice and costs out, nothing run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reco_lightning.cli.entry_point import main


def config(folder: Path, *, callbacks: bool = True, clips: int = 8) -> str:
    """Writes the config of a small fit with keys that only `fit` has."""
    network = {"vocab_size": 16, "grid": [5, 2, 2], "dim": 32, "depth": 2, "heads": 2}
    sampler = {"class_path": "WindowSampler", "init_args": {"frame_blocks": 5, "tokens_per_block": 4}}
    content = {
        "model": {"class_path": "VideoModel", "init_args": {"network": network}},
        "data": {"class_path": "tests.helpers.cli_modules.TokenData", "init_args": {"clips": clips}},
        "trainer": {
            "accelerator": "gpu",  # of the training machine: explain needs none
            "default_root_dir": str(folder / "run"),
            "callbacks": [{"class_path": "ReCoCallback", "init_args": {"sampler": sampler}}] if callbacks else [],
        },
        "ckpt_path": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return f"--config={folder / 'config.yaml'}"


@pytest.mark.slow
def test_explain_prints_choice_and_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", config(tmp_path), "--model.network.depth=3"])
    out = capsys.readouterr().out
    assert "3 blocks 'network.blocks'" in out
    assert "mean over the sampler" in out
    assert not (tmp_path / "run").exists()


def test_explain_without_the_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["explain", config(tmp_path, callbacks=False)])
    assert info.value.code == 2
    assert "trainer.callbacks must hold a ReCoCallback" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_explain_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["explain", config(tmp_path, clips=0)])
    assert info.value.code == 2
    assert "at least one training batch" in capsys.readouterr().err


def test_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must hold a ReCoCallback"):
        main(["explain", config(tmp_path, callbacks=False)])
