# SPDX-License-Identifier: Apache-2.0
"""The table of bad input: commands, methods, recipes, studies and callbacks."""

from __future__ import annotations

from dataclasses import fields

import torch
from hypothesis import strategies as st

import reco_lightning as rl
from reco_lightning import metrics
from reco_lightning.callbacks.finite_loss import FiniteLoss
from reco_lightning.callbacks.stop_on_signal import StopOnSignal
from reco_lightning.cli.recipes import copy_recipe
from reco_lightning.experiments.benchmark.command import benchmark
from reco_lightning.experiments.benchmark.sampling import compare_generation
from reco_lightning.experiments.benchmark.training_steps import StepBenchmark
from reco_lightning.experiments.demo import run_demo
from reco_lightning.experiments.demo.settings import Settings as DemoSettings
from reco_lightning.experiments.plan.command import Setting, plan
from reco_lightning.experiments.study.command import run_plan, study
from reco_lightning.experiments.study.data_spec import DataSpec
from reco_lightning.experiments.study.digits import MovingDigits
from reco_lightning.experiments.study.plan import load_plan
from reco_lightning.experiments.study.settings import Settings as StudySettings
from reco_lightning.pipelines.generate import generate
from reco_lightning.pipelines.tokenize.run import tokenize_folder
from reco_lightning.recipes.files import load_recipe
from reco_lightning.support.devices import pick_device
from tests.bad_input.samples import fixed, model_file, network, new_folder, nothing, videos, vqvae_file
from tests.bad_input.strategies import (
    BLOCKS,
    GRID,
    MAYBE_PATH,
    PATH,
    PROTOCOL,
    SAMPLING,
    SEED,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Entry,
    choice,
    number,
    values,
    whole,
)

__all__ = ["COMMANDS"]

SPEED = {"dim": 12, "depth": 1, "heads": 1, "vocab_size": 8, "tokens": 4, "batch": 1, "repeats": 1}

COMMANDS: tuple[Entry, ...] = (
    Entry("pick_device", pick_device, fixed(device="cpu"), {"device": choice()}),
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
            "frames": whole(1, optional=True),
            "stride": whole(1, optional=True),
            "size": SIZE.filter(lambda size: size is not None),
            "resize": choice(),
            "on_damage": choice(),
            "clip_step": whole(1, optional=True),
            "captions": MAYBE_PATH,
            "batch_size": whole(1),
            "num_workers": whole(0, optional=True),
            "device": choice(),
            "devices": whole(-1),
            "strategy": values(None, 3, 2.5, "none", []),
            "shard_size": whole(1),
            "overwrite": SWITCH,
            "progress": SWITCH,
            "layout": choice(),
            "split": values(3, b"train", ["train"]),
            "index": MAYBE_PATH,
        },
    ),
    Entry(
        "convert_i3d",
        lambda **arguments: metrics.convert_i3d(**{"checkpoint": "nowhere", "output": "i3d.pt"} | arguments),
        None,
        {"checkpoint": st.one_of(PATH, values("nowhere")), "output": PATH, "allow_unknown": SWITCH},
    ),
    Entry(
        "PositionLossProfile",
        rl.PositionLossProfile,
        nothing,
        {"every_n_epochs": whole(1), "batches": whole(1, optional=True), "generated": whole(0), "seed": SEED},
    ),
    Entry(
        "SampleVideos",
        rl.SampleVideos,
        nothing,
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
        fixed(tokenizer="vqvae.ckpt"),
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
            "length": BLOCKS,
            "context_blocks": BLOCKS,
        },
    ),
    Entry(
        "pipelines.generate.generate",
        generate,
        lambda: {"checkpoint": model_file(), "output": new_folder(), "n": 1, "device": "cpu"},
        {
            **SAMPLING,
            "checkpoint": st.one_of(PATH, values("nothing.ckpt")),
            "tokenizer": st.one_of(MAYBE_PATH, values("nothing.ckpt")),
            "output": PATH,
            "n": whole(1),
            "label": whole(0, 1, optional=True),
            "first_frames": st.one_of(MAYBE_PATH, values("nothing.mp4")),
            "given_frames": whole(1),
            "length": BLOCKS,
            "window_blocks": whole(1, 2, optional=True),
            "context_blocks": whole(1, 1, optional=True),
            "fps": number(0, 1000, open_ends="l"),
            "batch_size": whole(1),
            "device": choice(),
            "bf16": SWITCH,
            "compile": values(None, 3, 2.5, []),
        },
    ),
    Entry(
        "run_demo",
        lambda **arguments: run_demo(**{"videos": "nowhere"} | arguments),
        None,
        {
            "videos": st.one_of(MAYBE_PATH, values("nowhere")),
            "output": PATH,
            "steps": whole(10, optional=True),
            "seed": SEED,
            "quick": SWITCH,
        },
    ),
    Entry(
        "benchmark.command.benchmark",
        lambda **arguments: benchmark(**{"device": "meta"} | arguments),
        None,
        {
            "sizes": st.one_of(TEXTS, values(["no size"], ["0x1x1"])),
            "grid": GRID,
            "vocab_size": whole(1),
            "batch_size": whole(1),
            "methods": st.one_of(TEXTS, values(["reco"], ["plain", "no method"])),
            "steps": whole(1),
            "burn_in": whole(0),
            "precision": choice(),
            "compile": SWITCH,
            "device": choice(),
            "output": PATH,
            "generation": SWITCH,
        },
        {"sizes": "size"},
    ),
    Entry(
        "plan.command.plan",
        lambda **arguments: plan(**{"sizes": ["12x1x1"], "grid": (2, 1, 2), "vocab_size": 8} | arguments),
        nothing,
        {
            "sizes": st.one_of(TEXTS, values(["no size"], ["0x1x1"])),
            "grid": GRID,
            "vocab_size": whole(1),
            "batch_size": whole(1),
            "methods": st.one_of(TEXTS, values(["no method"])),
            "precision": choice(),
            "devices": whole(1),
            "strategy": choice(),
            "checkpointing": SWITCH,
            "kernels": choice(),
            "rate": number(0, open_ends="l", optional=True),
        },
        {"sizes": "size"},
    ),
    Entry(
        "study",
        lambda **arguments: study(**{"plan": "nothing"} | arguments),
        None,
        {
            "plan": st.one_of(PATH, choice()),
            "data": choice(),
            "seeds": whole(1),
            "output": PATH,
            "workers": whole(1),
            "steps": whole(1),
            "report": SWITCH,
        },
    ),
    Entry(
        "run_plan",
        run_plan,
        lambda: {"plan": load_plan("gap"), "seeds": 1, "output": new_folder(), "steps": 1, "train": False},
        {
            "plan": values(None, 3, "gap", {}),
            "seeds": whole(1),
            "output": PATH,
            "steps": whole(1),
            "workers": whole(1),
            "train": SWITCH,
            "settings": values(3, "quick", {}, object()),
        },
    ),
    Entry(
        "load_plan",
        load_plan,
        fixed(plan="gap"),
        {"plan": st.one_of(PATH, choice(), values("nothing.yaml")), "data": choice()},
    ),
    Entry(
        "study.settings.Settings",
        StudySettings,
        nothing,
        {
            **{one.name: whole(1) for one in fields(StudySettings)},
            "learning_rate": number(0, open_ends="l"),
        },
    ),
    Entry(
        "DataSpec",
        DataSpec,
        nothing,
        {"name": choice(), "motion": choice(), "clips": whole(1, optional=True), "blocks": whole(2)},
        {"name": "data"},
    ),
    Entry(
        "MovingDigits",
        MovingDigits,
        fixed(blocks=2),
        {
            "blocks": whole(1),
            "motion": choice(),
            "clips": whole(1, optional=True),
            "held_out": SWITCH,
            "seed": whole(0),
        },
    ),
    Entry(
        "Method",
        rl.Method,
        fixed(name="own"),
        {"name": TEXT, "sampler": values(None, 3, "a", ["a"]), "options": values(3, "a", ["a"], True)},
    ),
    Entry(
        "load_method",
        rl.load_method,
        fixed(name="reco"),
        {"name": st.one_of(PATH, choice(), values("nothing.yaml"))},
        {"name": "method"},
    ),
    Entry(
        "load_recipe",
        load_recipe,
        fixed(name="reco"),
        {"name": st.one_of(PATH, choice(), values("nothing.yaml"))},
        {"name": "recipe"},
    ),
    Entry(
        "copy_recipe",
        copy_recipe,
        lambda: {"name": "reco", "file": f"{new_folder()}/own.yaml"},
        {"name": st.one_of(PATH, choice()), "file": st.one_of(PATH, values("own.txt")), "overwrite": SWITCH},
        {"name": "recipe", "file": "FILE"},
    ),
    Entry("StopOnSignal", StopOnSignal, nothing, {"every_n_batches": whole(1)}),
    Entry("FiniteLoss", FiniteLoss, nothing, {"every_n_batches": whole(1)}),
    Entry(
        "compare_generation",
        compare_generation,
        lambda: SPEED,
        {
            **{name: whole(1) for name in ("dim", "depth", "heads", "vocab_size", "batch", "repeats")},
            "tokens": whole(2),
            "device": choice(),
            "dtype": values(None, 3, "float32", int),
            "compile": SWITCH,
            "seed": SEED,
        },
    ),
    Entry(
        "StepBenchmark",
        lambda **arguments: StepBenchmark(
            network(), **{"size": "12x1x1", "batch_size": 1, "device": torch.device("meta")} | arguments
        ),
        None,
        {"methods": st.one_of(TEXTS, values(["reco"], ["plain", "no method"])), "batch_size": whole(1)},
    ),
    Entry(
        "Setting",
        Setting,
        nothing,
        {
            "grid": GRID,
            **{name: whole(1) for name in ("vocab_size", "batch_size", "devices")},
            **{name: choice() for name in ("precision", "strategy", "kernels")},
            "checkpointing": SWITCH,
        },
    ),
    Entry(
        "demo.settings.Settings",
        DemoSettings,
        nothing,
        {
            **{one.name: whole(1) for one in fields(DemoSettings)},
            **{name: number(0, 1, open_ends="lm") for name in ("val_fraction",)},
            "learning_rate": number(0, open_ends="l"),
            "warmup_steps": whole(0),
        },
    ),
)
