# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, and what they print is true."""

from __future__ import annotations

import copy
import runpy
import threading
from pathlib import Path

import pytest
import torch
import wandb
from lightning.fabric import Fabric
from lightning.pytorch.loggers import WandbLogger

EXAMPLES = Path(__file__).parents[2] / "examples"
TRIED_HERE = {"your_module", "own_module", "fabric_loop", "wandb_sweep"}
# what other libraries say in a user's script is no failure of it
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def load(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_your_module_learns_with_and_without_the_callback(capsys):
    losses = load("your_module")["main"](steps=120)
    assert losses.keys() == {"plain", "reco"}
    assert all(loss < 0.6 for loss in losses.values())  # all tokens alike: 2.8 nats; always background: 0.4 and more
    assert "engine 'frozen'" in capsys.readouterr().out


def test_own_module_learns_and_logs_the_window(capsys):
    logged = load("own_module")["main"](steps=240)
    assert logged.keys() == {"train/accuracy", "val/loss", "val/last_block"}
    # the palette known and the movement not: log 4 = 1.39 nats and 1/4 of the tokens; both known: 1.39 / 5 and all
    assert logged["val/loss"] < 1.2
    assert logged["train/accuracy"] > 0.4
    assert f"after 240 steps: train/accuracy {logged['train/accuracy']:.3f}, val/loss" in capsys.readouterr().out


def test_fabric_loop_learns(capsys):
    loss = load("fabric_loop")["main"](steps=240)
    assert loss < 1.6  # the movement not known: log 8 = 2.08 nats; known: 2.08 / 5
    assert f"validation loss after 240 steps: {loss:.3f}" in capsys.readouterr().out


def test_fabric_changes_neither_loss_nor_gradients():
    example = load("fabric_loop")
    plain = example["WindowLoss"]()
    wrapped, fabric = copy.deepcopy(plain), Fabric(accelerator="cpu")
    model, tokens = fabric.setup(wrapped), example["moving_pictures"](4)
    for step in range(2):
        losses = plain(tokens, step), model(tokens, step)
        losses[0].backward()
        fabric.backward(losses[1])
        assert torch.equal(*losses)
    for (name, one), other in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs that were started, offline in a folder that goes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    started, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **start: started.append(init(**start)) or started[-1])
    return started


def test_wandb_sweep_tries_every_setting_offline(runs, monkeypatch, capsys):
    logged, log = {}, WandbLogger.log_metrics

    def record(logger, metrics, step=None):
        logged.setdefault(logger.experiment.id, {}).update(metrics)
        log(logger, metrics, step)

    monkeypatch.setattr(WandbLogger, "log_metrics", record)
    trials = load("wandb_sweep")["main"](steps=100)
    settings = [
        {"continuity_weight": weight, "first_window_prob": first} for weight in (0.0, 0.1) for first in (0.25, 0.5)
    ]
    assert [setting for setting, _ in trials] == [{name: run.config[name] for name in settings[0]} for run in runs]
    assert [setting for setting, _ in trials] == settings
    assert {run.group for run in runs} == {"offline-sweep"}
    losses = [loss for _, loss in trials]
    assert [logged[run.id]["val/loss"] for run in runs] == pytest.approx(losses)
    assert min(losses) < 1.9  # the movement not known: log 8 = 2.08 nats
    assert len(set(losses)) == len(losses)
    assert f"best: {settings[losses.index(min(losses))]}" in capsys.readouterr().out


def test_wandb_sweep_is_made_or_taken_part_in(runs, monkeypatch):
    example, made, ids = load("wandb_sweep"), [], []
    setting = {"continuity_weight": 0.1, "first_window_prob": 0.25}
    init = wandb.init

    def agent(sweep, function):
        """The service gives the run its setting, and the agent calls the function in a thread."""
        ids.append(sweep)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(wandb, "init", lambda **start: init(config=setting, **start))
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()
        monkeypatch.setattr(wandb, "init", init)
        monkeypatch.delenv("WANDB_MODE")

    monkeypatch.setattr(wandb, "sweep", lambda sweep, project: made.append((sweep, project)) or "team/reco-sweep/new")
    monkeypatch.setattr(wandb, "agent", agent)
    monkeypatch.delenv("WANDB_MODE")
    for given in (None, "team/reco-sweep/old"):
        (trial,) = example["main"](steps=2, agent=given)
        assert trial[0] == setting
    assert made == [(example["SWEEP"], "reco-sweep")]
    assert ids == ["team/reco-sweep/new", "team/reco-sweep/old"]
    assert len(runs) == 2


def test_every_example_is_tried():
    elsewhere = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")} - {"examples"}
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == TRIED_HERE | elsewhere
    for page in (EXAMPLES / "README.md", EXAMPLES.parent / "docs" / "add_to_your_module.md"):
        assert not [name for name in names if f"{name}.py" not in page.read_text()]
