# SPDX-License-Identifier: Apache-2.0
"""Serves the module paths of version 0.1 with a DeprecationWarning; they go in version 0.3."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["current_path", "install"]

_PACKAGE = "reco_lightning."
_HOMES = {
    "benchmark": "experiments.benchmark.training_steps",
    "benchmark_report": "experiments.benchmark.command",
    "callback": "callbacks.reco",
    "checkpoint_files": "callbacks.checkpoint_io",
    "checkpoints": "support.checkpoints",
    "checks": "support.argument_checks",
    "commands": "pipelines.generate",
    "continuity": "windowing.losses.continuity",
    "cost": "windowing.cost",
    "cross_entropy": "windowing.losses.cross_entropy",
    "data.caption_ids": "data.tokens.caption_ids",
    "data.caption_module": "data.tokens.caption_module",
    "data.caption_requests": "pipelines.predict.caption_requests",
    "data.captions": "data.index.captions",
    "data.clip_index": "data.index.clip_index",
    "data.frame_folders": "data.video.frame_folders",
    "data.frames": "data.video.frames",
    "data.layout_errors": "data.index.errors",
    "data.layouts": "data.index.layouts",
    "data.litdata_loader": "data.tokens.litdata_loader",
    "data.litdata_shards": "data.tokens.litdata",
    "data.manifest": "data.tokens.manifest",
    "data.msrvtt": "data.index.msrvtt",
    "data.passes": "data.loading.sample_order",
    "data.readers": "data.video.decoders",
    "data.resumable": "data.loading.resumable_loader",
    "data.shard_fit": "data.tokens.compatibility",
    "data.text_lines": "data.index.text_lines",
    "data.token_module": "data.tokens.module",
    "data.token_writer": "data.tokens.writer",
    "data.ucf101": "data.index.ucf101",
    "data.unfinished": "pipelines.tokenize.partial_output",
    "data.video_folder": "data.clips.folder",
    "data.video_module": "data.clips.module",
    "data.video_scan": "data.video.scan",
    "decoding": "models.sampling.decoding",
    "demo": "experiments.demo",
    "demo.clips": "experiments.demo.clips",
    "demo.evaluation": "experiments.demo.evaluation",
    "demo.machine": "experiments.demo.machine",
    "demo.output": "experiments.demo.output",
    "demo.progress": "experiments.demo.progress",
    "demo.report": "experiments.demo.report",
    "demo.run": "experiments.demo.run",
    "demo.settings": "experiments.demo.settings",
    "demo.training": "experiments.demo.training",
    "devices": "support.devices",
    "disk_errors": "support.disk_errors",
    "draws": "models.sampling.token_sampling",
    "encoding": "pipelines.tokenize.encoding",
    "engines": "windowing.engines",
    "engines.attention": "windowing.engines.attention",
    "engines.attention_watch": "windowing.injection.attention_watch",
    "engines.base": "windowing.engines.base",
    "engines.compiled": "windowing.injection.recompile_limit",
    "engines.detached": "windowing.engines.detached",
    "engines.dropped": "windowing.engines.cropped",
    "engines.frozen": "windowing.engines.frozen",
    "engines.graph": "windowing.injection.autograd_graph",
    "engines.interception": "windowing.engines.interception",
    "engines.joining": "windowing.engines.context_kv",
    "engines.mingpt": "windowing.engines.mingpt",
    "engines.patched": "windowing.engines.base",
    "engines.rehearsal": "windowing.injection.step_trace",
    "engines.sandbox": "windowing.injection.dry_run",
    "engines.select": "windowing.injection.engine_selection",
    "engines.slicing": "windowing.engines.call_slicing",
    "evaluation": "pipelines.evaluate.callback",
    "evaluation_report": "pipelines.evaluate.report",
    "explanation": "windowing.explain",
    "finite_loss": "callbacks.finite_loss",
    "generation": "models.sampling.generate",
    "generation_benchmark": "experiments.benchmark.sampling",
    "injection": "windowing.injection.windowed_step",
    "lightning_cli": "cli.lightning",
    "linear_cross_entropy": "windowing.losses.chunked_cross_entropy",
    "loss_aware": "windowing.running_losses",
    "media": "support.media",
    "methods": "experiments.methods",
    "metrics.i3d_bundle": "metrics.i3d.tf_checkpoint",
    "metrics.i3d_convert": "metrics.i3d.convert",
    "mixin": "windowing.mixin",
    "models.larp_config": "models.larp.config",
    "models.larp_layers": "models.larp.layers",
    "models.sharded_build": "models.text_video.sharded_build",
    "models.text_generation": "models.text_video.generate",
    "models.text_video_model": "models.text_video.lightning_module",
    "models.text_video_network": "models.text_video.network",
    "plan_report": "experiments.plan.command",
    "planning": "experiments.plan.memory_tracker",
    "plots": "support.plots",
    "position_profile": "callbacks.position_profile",
    "prediction": "pipelines.predict",
    "real_clips": "pipelines.evaluate.real_clips",
    "recipe_command": "cli.recipes",
    "recipe_files": "recipes.files",
    "recipe_merge": "recipes.merge",
    "resume": "cli.checkpoint_overrides",
    "samples": "callbacks.sample_videos",
    "settings": "windowing.settings",
    "shard_sizes": "cli.shard_sizes",
    "stopping": "callbacks.stop_on_signal",
    "study": "experiments.study",
    "study.claims": "experiments.study.locks",
    "study.clips": "experiments.study.clips",
    "study.command": "experiments.study.command",
    "study.digits": "experiments.study.digits",
    "study.figures": "experiments.study.figures",
    "study.measure": "experiments.study.measure",
    "study.plan": "experiments.study.plan",
    "study.report": "experiments.study.report",
    "study.settings": "experiments.study.settings",
    "study.sources": "experiments.study.sources",
    "study.training": "experiments.study.training",
    "tokenize": "pipelines.tokenize.run",
    "tokenizers.larp_config": "tokenizers.larp.config",
    "tokenizers.larp_folder": "tokenizers.larp.folder",
    "tokenizers.larp_layers": "tokenizers.larp.layers",
    "tokenizers.larp_tables": "tokenizers.larp.tables",
    "tokenizers.omnitokenizer_checkpoint": "tokenizers.omnitokenizer.checkpoint",
    "tokenizers.omnitokenizer_config": "tokenizers.omnitokenizer.config",
    "tokenizers.omnitokenizer_layers": "tokenizers.omnitokenizer.layers",
    "tokenizers.omnitokenizer_positions": "tokenizers.omnitokenizer.positions",
    "transformers_cache": "support.transformers_cache",
    "whole_file": "support.atomic_write",
    "windows": "windowing.sampler",
}
"""For each module of version 0.1 that moved: its name now, both from the package on."""


def current_path(path: str) -> str:
    """Translates the import path of a class, as a checkpoint of version 0.1 stores it, to that of today.

    Example:
        >>> current_path("reco_lightning.callback.ReCoCallback")
        'reco_lightning.callbacks.reco.ReCoCallback'
        >>> current_path("my_project.MyModule")
        'my_project.MyModule'
    """
    module, _, name = path.rpartition(".")
    home = _HOMES.get(module.removeprefix(_PACKAGE)) if module.startswith(_PACKAGE) else None
    return f"{_PACKAGE}{home}.{name}" if home else path


def install() -> None:
    """Lets imports find moved modules under their old names; the module is the same object under both."""
    # first, since the import system would load a module of a moved package again under its old name
    sys.meta_path.insert(0, _MovedModules())


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_PACKAGE) or name.removeprefix(_PACKAGE) not in _HOMES:
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        home = _PACKAGE + _HOMES[spec.name.removeprefix(_PACKAGE)]
        warnings.warn(
            f"{spec.name} has moved to {home}; the old path goes in version 0.3", DeprecationWarning, stacklevel=2
        )
        module = importlib.import_module(home)
        spec.loader_state = module.__spec__  # the import system is about to put the old name's in its place
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
