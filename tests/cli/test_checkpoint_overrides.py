# SPDX-License-Identifier: Apache-2.0
"""What the user states against what a checkpoint holds, and the saved config."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR, SequentialLR

from reco_lightning.cli.checkpoint_overrides import (
    GivenOptimizerOptions,
    changed_values,
    explicit_arguments,
    merge_group,
)
from reco_lightning.cli.entry_point import main
from reco_lightning.support.checkpoints import checkpoint_model
from tests.helpers.cli_modules import TinyData, TinyModel, TinyNetwork


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ([], (None, None)),
        (["fit", "--model", "A"], ("A", None)),
        (["fit", "--model=A", "--model=pkg.B"], ("pkg.B", None)),
        (["fit", "--model.class_path=A"], ("A", None)),
        (["fit", '--model={"class_path": "A"}'], ("A", None)),
        (["fit", "--model.learning_rate=1", "--ckpt_path", "x.ckpt"], (None, "x.ckpt")),
        (["fit", "--ckpt_path"], (None, None)),
        (["fit", "--config=[not yaml", "--model=A"], ("A", None)),
    ],
)
def test_stated(args: list[str], found: tuple[str | None, str | None]) -> None:
    assert explicit_arguments(args) == found


def test_stated_reads_config_files_in_order(tmp_path: Path) -> None:
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump({"class_path": "InModelFile"}))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"ckpt_path": "in_config.ckpt", "model": {"class_path": "InConfig"}}))
    assert explicit_arguments(["fit", f"--config={config}"]) == ("InConfig", "in_config.ckpt")
    assert explicit_arguments(["fit", "--model=A", "-c", str(config), "--ckpt_path=flag.ckpt"]) == (
        "InConfig",
        "flag.ckpt",
    )
    assert explicit_arguments(["fit", f"--config={config}", "--model=A"]) == ("A", "in_config.ckpt")
    assert explicit_arguments(["fit", f"--model={model}"]) == ("InModelFile", None)
    config.write_text(yaml.safe_dump({"model": "model_of_another_kind"}))
    assert explicit_arguments(["fit", f"--config={config}"]) == ("model_of_another_kind", None)


def test_checkpoint_model(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    made = {"_class_path": "a.B", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save({"hyper_parameters": made | {"width": 3}}, path)
    assert checkpoint_model(path) == {"class_path": "a.B", "init_args": {"width": 3}}
    torch.save({"hyper_parameters": {"width": 3}}, path)
    assert checkpoint_model(path) is None
    torch.save({"state_dict": {}}, path)
    assert checkpoint_model(path) is None


def test_changed_values() -> None:
    stored = {"a": 1, "b": {"c": [1, 2], "d": 3}, "only_stored": 0}
    assert changed_values(stored, {"a": 1, "b": {"c": [1, 2], "d": 3}}) == {}
    assert changed_values(stored, {"a": 2, "b": {"c": [1], "d": 3}, "only_used": 0}) == {
        "a": (1, 2),
        "b.c": ([1, 2], [1]),
    }
    assert changed_values({"betas": (0.9, 0.95)}, {"betas": [0.9, 0.95]}) == {}


def test_merge_group() -> None:
    assert merge_group({"params": [1], "lr": 0.1, "wd": 0}, {"params": [2], "lr": 0.5, "wd": 1}) == {"lr": 0.5, "wd": 1}
    assert merge_group({"lr": 0.05, "initial_lr": 0.1}, {"lr": 0.0, "initial_lr": 1.0}) == {
        "lr": 0.5,
        "initial_lr": 1.0,
    }
    assert merge_group({"lr": 0.0, "initial_lr": 0.0}, {"lr": 0.5, "initial_lr": 0.5}) == {"lr": 0.5, "initial_lr": 0.5}


class Sequential(TinyModel):
    """A schedule made of two."""

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        parts = [LambdaLR(optimizer, lambda step: 0.5), LambdaLR(optimizer, lambda step: 1 / (1 + step))]
        schedule = SequentialLR(optimizer, parts, milestones=[2])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance of")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch's own SequentialLR
def test_given_options_hold_in_a_schedule_of_schedules(tmp_path: Path) -> None:
    def run(rate: float, steps: int, path: Path | None = None) -> list[float]:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[GivenOptimizerOptions()] if path else [],
        )
        TinyModel.ran.clear()
        module = Sequential(TinyNetwork(2), learning_rate=rate)
        del module.hparams["network"]  # built by hand, it is no plain value
        trainer.fit(module, TinyData(), ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(tmp_path / "x.ckpt")
        return list(TinyModel.ran)

    whole = run(1.0, 6)
    run(0.1, 4)
    assert run(1.0, 6, tmp_path / "x.ckpt") == pytest.approx(whole[4:])


def test_saved_config_is_the_whole_run(tmp_path: Path) -> None:
    arguments = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "max_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        },
        "model": {
            "class_path": "tests.helpers.cli_modules.TinyModel",
            "init_args": {
                "network": {"class_path": "tests.helpers.cli_modules.TinyNetwork", "init_args": {"width": 2}}
            },
        },
        "data": {"class_path": "tests.helpers.cli_modules.TinyData"},
    }
    first = tmp_path / "given.json"
    first.write_text(json.dumps(arguments))
    main(["fit", f"--config={first}"])
    main(["fit", f"--config={tmp_path / 'config.yaml'}"])  # a saved config is itself a config
    assert yaml.safe_load((tmp_path / "config-1.yaml").read_text()) == yaml.safe_load(
        (tmp_path / "config.yaml").read_text()
    )
