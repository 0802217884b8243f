# SPDX-License-Identifier: Apache-2.0
"""The command line: dispatch, errors, recipes, and LightningCLI's closed traps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from reco_lightning import __version__
from reco_lightning.cli.entry_point import COMMANDS, Command, main, resolve_recipes
from reco_lightning.support.checkpoints import checkpoint_model
from tests.helpers.cli_modules import TinyModel

pytestmark = pytest.mark.third_party

# A resumed run of these tests has a folder of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")

TINY = "tests.helpers.cli_modules."


def tiny(folder: Path, *extra: str, subcommand: str = "fit", model: bool = True, steps: int = 2) -> list[str]:
    """The arguments of a two-step run in `folder`."""
    trainer = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "tiny"}},
    }
    if subcommand == "fit":
        trainer["max_steps"] = steps
    args = [subcommand, f"--trainer={json.dumps(trainer)}", f"--data={TINY}TinyData"]
    return [*args, *([f"--model={TINY}TinyModel", "--model.network.width=3"] if model else []), *extra]


@pytest.fixture
def ran() -> list[float]:
    """Learning rates of every training step that the test runs."""
    TinyModel.ran.clear()
    return TinyModel.ran


@pytest.fixture
def checkpoint(tmp_path: Path, ran: list[float]) -> Path:
    """A checkpoint after two steps with learning rate 0.01."""
    main(tiny(tmp_path / "first", "--model.learning_rate=0.01"))
    assert ran == [0.01, 0.01]
    ran.clear()
    return next((tmp_path / "first").rglob("*.ckpt"))


def hparams(path: Path) -> dict:
    return torch.load(path, weights_only=True)["hyper_parameters"]


# -- dispatch


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--help"])
    assert info.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for command in COMMANDS:
        assert f"{command.name} {command.summary}" in out
    assert [c.name for c in COMMANDS] == [
        "fit",
        "validate",
        "test",
        "predict",
        "tokenize",
        "generate",
        "evaluate",
        "convert-i3d",
        "demo",
        "benchmark",
        "study",
        "plan",
        "explain",
        "recipes",
    ]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom reco_lightning.cli.entry_point import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'lightning', 'wandb', 'decord', 'av') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reco_lightning", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"reco_lightning {__version__}"


@pytest.mark.parametrize("command", [c.name for c in COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main([command, "--help"])
    assert info.value.code == 0
    assert f"reco {command}" in " ".join(capsys.readouterr().out.replace("[options] ", "").split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: reco"),
        (["fitt"], "unknown command 'fitt'. Did you mean 'fit'? One of: fit, validate"),
        (["--config", "x.yaml", "fit"], "the command comes first, its options after it, got '--config'"),
        (["fit", "--modle.learning_rate", "1"], "recognized arguments: --modle.learning_rate"),
        (["fit", f"--model={TINY}TinyModel", "--model.lerning_rate=1"], "lerning_rate"),
        (["fit", "--model=NoSuchModel"], "NoSuchModel"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (["fit", "--config", "recipe:recoo"], "got 'recoo'. Did you mean 'reco'"),
        (["fit", "--config=recipe:nothing"], "recipe must be one that `reco recipes ls` lists, got 'nothing'. A file"),
        (["explain", "-c", "recipe:table4/ffs-110-reco"], "Did you mean 'table4/ffs-110m-reco' or"),
        (["tokenize", "--config=recipe:vqvae"], "recipe vqvae has nothing for reco tokenize, only seed_everything"),
        (["recipes"], "ACTION"),
        (["recipes", "show", "recoo"], "got 'recoo'. Did you mean 'reco'"),
        (["fit", "--ckpt_path"], "ckpt_path"),
        (["generate", "--checkpont=x"], "checkpont"),
        (["demo", "--steps=many"], "steps"),
        (["tokenize", "--no_such=1"], "no_such"),
        (["explain", "--no_such=1"], "no_such"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(args)
    assert info.value.code == 2
    assert message in capsys.readouterr().err


# -- commands that are functions


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `record` beside the others."""
    command = Command("record", "Prints.", "tests.helpers.cli_modules:record", aliases=(("-n", "--n"),))
    monkeypatch.setattr("reco_lightning.cli.entry_point.COMMANDS", (*COMMANDS, command))


@pytest.mark.usefixtures("record")
@pytest.mark.parametrize(
    ("args", "printed"),
    [
        (["--path=x"], "x False 1"),
        (["--path", "x", "--quick", "-n", "3"], "x True 3"),
        (["--quick", "false", "--path=x"], "x False 1"),
        (["--path=x", "--n=2", "--quick"], "x True 2"),
    ],
)
def test_a_function_is_a_command(args: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["record", *args])
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.usefixtures("record")
def test_a_function_takes_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("path: x\nn: 5\n")
    main(["record", f"--config={tmp_path / 'c.yaml'}", "--n=6"])
    assert capsys.readouterr().out.strip() == "x False 6"


@pytest.mark.usefixtures("record")
def test_a_function_needs_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["record"])
    assert info.value.code == 2
    assert "path" in capsys.readouterr().err


@pytest.mark.usefixtures("record")
def test_an_error_from_outside_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="from outside the package"):
        main(["record", "--path=fail"])


# -- recipes


def test_recipes_resolve_to_files_and_other_arguments_pass(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: {init_args: {learning_rate: 0.5}}\n")
    args = ["--config", "recipe:reco", f"--config={own}", "-c", "recipe:method/baseline.yaml", "--data.folder=x"]
    resolved = resolve_recipes("fit", args, str(tmp_path))
    assert [*resolved[2:4], resolved[-1]] == [f"--config={own}", "-c", "--data.folder=x"]
    assert [Path(resolved[place]).name for place in (1, 4)] == ["reco.yaml", "method-baseline.yaml"]
    assert yaml.safe_load(Path(resolved[1]).read_text())["model"]["class_path"] == "VideoModel"


def test_a_recipe_gives_each_command_its_part(tmp_path: Path) -> None:
    for command, keys in (("fit", {"model", "data"}), ("tokenize", {"tokenizer", "frames"}), ("generate", {"output"})):
        (tmp_path / command).mkdir()
        (_, path) = resolve_recipes(command, ["--config", "recipe:reco"], str(tmp_path / command))
        assert keys <= yaml.safe_load(Path(path).read_text()).keys()


@pytest.mark.usefixtures("record")
def test_a_file_with_compose_is_merged_and_removed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "base.yaml").write_text("path: x\nn: 5\n")
    (tmp_path / "own.yaml").write_text("compose: [base.yaml]\nn: 7\n")
    main(["record", "--config", str(tmp_path / "own.yaml")])
    assert capsys.readouterr().out.strip() == "x False 7"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_recipe_wins_over_the_checkpoint_and_flags_over_both(
    checkpoint: Path, tmp_path: Path, ran: list[float]
) -> None:
    model = {"class_path": f"{TINY}TinyModel", "init_args": {"learning_rate": 0.25, "momentum": 0.5}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"compose": ["method/baseline"], "model": model}))
    args = [f"--config={tmp_path / 'own.yaml'}", "--model.momentum=0.75", f"--ckpt_path={checkpoint}"]
    main(tiny(tmp_path / "b", *args, model=False, steps=3))
    assert ran == [0.25]
    stored = hparams(next((tmp_path / "b").rglob("*.ckpt")))
    assert (stored["momentum"], stored["network"]["init_args"]["width"]) == (0.75, 3)


# -- fit, validate, test, predict


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_lightning_subcommands_run(subcommand: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny(tmp_path, subcommand=subcommand))
    assert (tmp_path / "tiny" / "version_0" / "config.yaml").is_file()


def test_short_class_names_resolve(tmp_path: Path, ran: list[float]) -> None:
    args = [arg.replace(TINY, "") for arg in tiny(tmp_path)]
    main(args)
    assert ran == [0.1, 0.1]


def test_a_flag_wins_over_the_checkpoint(checkpoint: Path, tmp_path: Path, ran: list[float]) -> None:
    main(tiny(tmp_path / "b", f"--ckpt_path={checkpoint}", "--model.learning_rate=0.5", steps=4))
    assert ran == [0.5, 0.5]
    assert hparams(next((tmp_path / "b").rglob("*.ckpt")))["learning_rate"] == 0.5


def test_a_config_file_wins_over_the_checkpoint(checkpoint: Path, tmp_path: Path, ran: list[float]) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(
        yaml.safe_dump({"model": {"class_path": f"{TINY}TinyModel", "init_args": {"learning_rate": 0.25}}})
    )
    main(tiny(tmp_path / "b", f"--config={config}", f"--ckpt_path={checkpoint}", model=False, steps=3))
    assert ran == [0.25]


def test_what_is_not_stated_comes_from_the_checkpoint(checkpoint: Path, tmp_path: Path, ran: list[float]) -> None:
    main(tiny(tmp_path / "b", f"--ckpt_path={checkpoint}", model=False, steps=3))  # neither class nor width is given
    assert ran == [0.01]
    assert hparams(next((tmp_path / "b").rglob("*.ckpt")))["network"]["init_args"]["width"] == 3


def test_a_checkpoint_path_inside_a_config_file(checkpoint: Path, tmp_path: Path, ran: list[float]) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump({"ckpt_path": str(checkpoint)}))
    main(tiny(tmp_path / "b", f"--config={config}", "--model.momentum=0.5", steps=3))
    assert ran == [0.01]


@pytest.mark.parametrize(
    ("network", "name"),
    [({"vocab_size": 4, "architecture": {}}, "TextVideoModel"), ({"vocab_size": 4, "dim": 8}, "VideoModel"), (4, None)],
)
def test_which_model_a_checkpoint_without_a_class_holds(network: object, name: str | None, tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"network": network}}, tmp_path / "a.ckpt")
    found = checkpoint_model(tmp_path / "a.ckpt")
    assert (found and found["class_path"].rpartition(".")[2]) == name


def test_differences_are_printed(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        main(tiny(tmp_path / "b", f"--ckpt_path={checkpoint}", "--model.learning_rate=0.5", steps=3))
    assert "model.learning_rate: 0.5 as given; the checkpoint has 0.01." in caplog.text


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluation_with_a_checkpoint_and_a_flag(subcommand: str, checkpoint: Path, tmp_path: Path) -> None:
    main(
        tiny(
            tmp_path / "b", f"--ckpt_path={checkpoint}", "--model.learning_rate=0.5", subcommand=subcommand, model=False
        )
    )
    saved = yaml.safe_load((tmp_path / "b" / "tiny" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["learning_rate"] == 0.5
    assert saved["ckpt_path"] == str(checkpoint)


def test_another_class_takes_nothing_from_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    del stored["hyper_parameters"]
    torch.save(stored, tmp_path / "foreign.ckpt")
    main(tiny(tmp_path / "b", f"--ckpt_path={tmp_path / 'foreign.ckpt'}", "--model.learning_rate=0.5", steps=3))


@pytest.mark.slow
def test_a_schedule_goes_on_from_its_place_with_the_given_rate(tmp_path: Path, ran: list[float]) -> None:
    main(tiny(tmp_path / "a", "--model.learning_rate=0.1", "--model.decay=0.5"))
    path = next((tmp_path / "a").rglob("*.ckpt"))
    ran.clear()
    main(tiny(tmp_path / "b", f"--ckpt_path={path}", "--model.learning_rate=0.8", model=False, steps=4))
    assert ran == pytest.approx([0.8 * 0.25, 0.8 * 0.125])


def test_an_unchanged_resume_leaves_the_optimizer_alone(checkpoint: Path, tmp_path: Path, ran: list[float]) -> None:
    main(tiny(tmp_path / "b", f"--ckpt_path={checkpoint}", "--model.learning_rate=0.01", steps=4))
    assert ran == [0.01, 0.01]


# -- saved configs


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "tensorboard", "none"])
def test_a_second_run_overwrites_nothing(logger: str, tmp_path: Path) -> None:
    extra = {"csv": [], "tensorboard": ["--trainer.logger=TensorBoardLogger"], "none": ["--trainer.logger=false"]}[
        logger
    ]
    extra = [*extra, "--trainer.enable_checkpointing=false"]
    main(tiny(tmp_path, *extra))
    first = snapshot(tmp_path)
    assert sum(name.endswith("config.yaml") for name in first) == 1
    main(tiny(tmp_path, *extra, "--model.learning_rate=0.2"))
    second = snapshot(tmp_path)
    assert {name: second[name] for name in first} == first
    configs = [name for name in second if Path(name).name.startswith("config")]
    assert sorted(yaml.safe_load(second[name])["model"]["init_args"]["learning_rate"] for name in configs) == [0.1, 0.2]


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B as in a new process: it reads its environment once."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "unset")  # remembered, so that what WandbLogger sets is undone
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_wandb")
def test_two_wandb_runs_in_one_folder(tmp_path: Path) -> None:
    extra = [
        f'--trainer.logger={{"class_path": "WandbLogger", "init_args": {{"save_dir": "{tmp_path}", "offline": true}}}}'
    ]
    main(tiny(tmp_path, *extra))
    main(tiny(tmp_path, *extra, "--model.learning_rate=0.2"))
    configs = sorted((tmp_path / "lightning_logs").glob("*/config.yaml"))
    assert len(configs) == 2
    assert all((path.parent / "checkpoints").is_dir() for path in configs)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_mode_wins_over_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    main(
        tiny(
            tmp_path,
            "--trainer.logger=WandbLogger",
            f"--trainer.logger.save_dir={tmp_path}",
            "--trainer.logger.offline=true",
        )
    )
    assert os.environ["WANDB_MODE"] == "disabled"
    assert not list(tmp_path.rglob("offline-run-*"))
