# SPDX-License-Identifier: Apache-2.0
"""`reco fit`, `validate`, `test`, `predict` and `explain`, built on LightningCLI.

What the user states, as a flag or in a config file, wins over a checkpoint's hyperparameters, and a run's config is
saved in that run's own folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

import reco_lightning.callbacks.checkpoint_io
import reco_lightning.callbacks.finite_loss
import reco_lightning.callbacks.position_profile
import reco_lightning.callbacks.sample_videos
import reco_lightning.callbacks.stop_on_signal
import reco_lightning.data.clips.module
import reco_lightning.data.tokens.caption_module  # imported so that `class_path: CaptionDataModule` resolves
import reco_lightning.data.tokens.module
import reco_lightning.models.text_video.lightning_module
import reco_lightning.models.video_model
import reco_lightning.pipelines.predict.caption_requests
import reco_lightning.pipelines.predict.requests
import reco_lightning.pipelines.predict.video_writer
import reco_lightning.tokenizers.vqvae  # noqa: F401
from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.cli.checkpoint_overrides import GivenOptimizerOptions, changed_values, explicit_arguments
from reco_lightning.cli.shard_sizes import infer_sizes
from reco_lightning.pipelines.evaluate.callback import EvaluateVideos
from reco_lightning.support.checkpoints import VIDEO_MODEL, checkpoint_model
from reco_lightning.support.media import run_folder
from reco_lightning.windowing.explain import explain

__all__ = [
    "EvaluateCLI",
    "ExplainCLI",
    "RecoCLI",
    "SaveRunConfig",
    "run_evaluate",
    "run_explain",
    "run_fit",
    "run_predict",
    "run_test",
    "run_validate",
]


def run_fit(args: list[str]) -> None:
    """Runs `reco fit`."""
    _run("fit", args)


def run_validate(args: list[str]) -> None:
    """Runs `reco validate`."""
    _run("validate", args)


def run_test(args: list[str]) -> None:
    """Runs `reco test`."""
    _run("test", args)


def run_predict(args: list[str]) -> None:
    """Runs `reco predict`."""
    _run("predict", args)


class SaveRunConfig(SaveConfigCallback):
    """Saves the parsed config in the run's own folder, under a name that no earlier run has used.

    With a logger that makes one folder per run (CSV, TensorBoard) this is its `log_dir`; with any other it is
    `<save_dir>/<name>/<version>`, where the run's checkpoints lie too; without a logger `default_root_dir`. An existing
    `config.yaml` is left alone: the next is `config-1.yaml`. W&B also gets it as the run's config.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, config_filename: str = "config.yaml") -> None:
        super().__init__(parser, config, config_filename=config_filename, save_to_log_dir=False)

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the file; called on rank zero only."""
        files, folder = fsspec.core.url_to_fs(run_folder(trainer))
        files.makedirs(folder, exist_ok=True)
        stem, ending = os.path.splitext(self.config_filename)
        number, path = 0, f"{folder}/{self.config_filename}"
        while files.exists(path):
            number += 1
            path = f"{folder}/{stem}-{number}{ending}"
        with files.open(path, "w") as file:
            file.write(self.parser.dump(self.config, skip_none=False))
        rank_zero_info(f"Config of this run: {path}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(json.loads(self.parser.dump(self.config, skip_none=False, format="json")))


class RecoCLI(LightningCLI):
    """LightningCLI in which what the user states wins over the checkpoint.

    Order of precedence for `model.*`, highest first: flags and config files as given; the hyperparameters in
    `--ckpt_path`; defaults. Differences between the first two are printed.
    """

    #: Model arguments that differ from the checkpoint's: dotted key to (checkpoint's, this run's).
    replaced: dict[str, tuple[Any, Any]]
    _ckpt_path: Any = None
    _leading = 1  # arguments before the options: the subcommand

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Takes `sizes_from_shards`."""
        parser.add_argument(
            "--sizes_from_shards",
            type=bool,
            default=False,
            help="Set vocab_size and grid of the network, frame_blocks and tokens_per_block of the sampler to those of "
            "the shards in data.folder.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments with the checkpoint's model below everything that the user states."""
        args = sys.argv[1:] if args is None else list(args)
        model_class, path = explicit_arguments(args)
        stored = checkpoint_model(path) if path and Path(path).is_file() else None
        if stored and model_class and not _same_class(model_class, stored["class_path"]):
            stored = None
        if stored or not model_class:
            # jsonargparse lets later options win: what stands first is below everything that the user states
            lowest = json.dumps(stored or {"class_path": VIDEO_MODEL})
            args = [*args[: self._leading], f"--model={lowest}", *args[self._leading :]]
        self.config = parser.parse_args(args)
        if self._arguments().get("sizes_from_shards"):
            for key, (old, new) in infer_sizes(self._arguments()).items():
                rank_zero_info(f"{key}: {new!r} as in the shards; the config has {old!r}.")
        self.replaced = {}
        if stored:
            used = json.loads(parser.dump(self.config, format="json", skip_none=False))
            used = used.get(str(self.config.get("subcommand")), used)["model"]
            self.replaced = changed_values(stored["init_args"], used["init_args"])
        # LightningCLI would now write the checkpoint's hyperparameters over the flags; it does nothing without a path.
        self._ckpt_path, self._arguments()["ckpt_path"] = self._arguments().get("ckpt_path"), None

    @override
    def before_instantiate_classes(self) -> None:
        """Puts the checkpoint path back, and makes the given values hold in a restored optimizer too."""
        arguments = self._arguments()
        arguments["ckpt_path"] = self._ckpt_path
        if self.replaced and self.config.get("subcommand") == "fit":
            self.trainer_defaults["callbacks"] = [GivenOptimizerOptions()]
        for key, (old, new) in self.replaced.items():
            rank_zero_info(f"model.{key}: {new!r} as given; the checkpoint has {old!r}.")
        mode = os.environ.get("WANDB_MODE")  # decides over `offline`
        loggers = arguments["trainer"].get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if mode and str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
                logger.init_args.offline = mode in ("offline", "dryrun")

    def _arguments(self) -> Any:
        return self.config[self.config.subcommand] if self.config.get("subcommand") else self.config


class ExplainCLI(RecoCLI):
    """Reads the config of a `fit` and builds its objects; nothing is run."""

    _leading = 0

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Takes the keys that a config written for `fit` holds beside trainer, model and data."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(L.Trainer, "fit", skip=set(self.subcommands()["fit"]))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Returns a trainer without the config's devices and loggers: it is not used."""
        return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


class EvaluateCLI(RecoCLI):
    """A test run with `EvaluateVideos`, whose arguments are `--evaluation.*`."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Takes the callback's arguments."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(EvaluateVideos, "evaluation")


def run_evaluate(args: list[str]) -> None:
    """Runs `reco evaluate`: `reco test` with the scores of generated videos."""
    _run("test", args, cli=EvaluateCLI, name="evaluate")


def run_explain(args: list[str]) -> None:
    """Runs `reco explain`: prints what `ReCoCallback` would do with the config's module and its first batch.

    Args:
        args: The arguments of a `reco fit`.

    Raises:
        ValueError: If the config has no ReCoCallback, or no training batch.
    """
    cli = ExplainCLI(
        args=args,
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        parser_kwargs={"prog": "reco explain", "usage": "reco explain [options of reco fit]"},
    )
    given = cli.config_init["trainer"]["callbacks"]
    callbacks = [c for c in (given if isinstance(given, list) else [given]) if isinstance(c, ReCoCallback)]
    if not callbacks:
        raise ValueError(
            "trainer.callbacks must hold a ReCoCallback for reco explain, got none; use --config recipe:reco, or "
            "add --trainer.callbacks+=ReCoCallback"
        )
    cli.model.configure_model()  # where the network is made here, as Lightning does before a fit
    print(explain(cli.model, first_batch(cli.model, cli.datamodule), callbacks[0]))


def first_batch(model: L.LightningModule, data: L.LightningDataModule | None) -> Any:
    """Reads the first training batch, as a fit would.

    Args:
        model: The module; asked for its own loader where `data` is None.
        data: The data module.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If the training loader is empty.
    """
    source = model if data is None else data
    source.prepare_data()
    source.setup("fit")
    for batch in source.train_dataloader():
        return batch
    raise ValueError(
        "data must give at least one training batch for reco explain, got none; check its folder and batch_size"
    )


def _run(subcommand: str, args: list[str], *, cli: type[RecoCLI] = RecoCLI, name: str | None = None) -> None:
    run = _with_one_subcommand(cli, subcommand)(
        args=[subcommand, *args],
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        seed_everything_default=0,
        # the full usage is fifty lines, which hide the error below them
        parser_kwargs={"prog": "reco", subcommand: {"usage": f"reco {name or subcommand} [options]"}},
    )
    for logger in run.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # a later run in this process is a run of its own


def _with_one_subcommand(cli: type[RecoCLI], name: str) -> type[RecoCLI]:
    """LightningCLI builds the parsers of all its subcommands, which takes half of the time that parsing does."""
    return type(cli.__name__, (cli,), {"subcommands": staticmethod(lambda: {name: cli.subcommands()[name]})})


def _same_class(stated_name: str, full_path: str) -> bool:
    return full_path == stated_name or ("." not in stated_name and full_path.endswith(f".{stated_name}"))
