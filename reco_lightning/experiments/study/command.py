# SPDX-License-Identifier: Apache-2.0
"""``reco study``: trains the missing runs of a plan and writes its report."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reco_lightning.experiments.study.data_spec import DataName
from reco_lightning.experiments.study.locks import lock, write_json
from reco_lightning.experiments.study.plan import Plan, RunSpec, load_plan
from reco_lightning.experiments.study.report import write_report
from reco_lightning.experiments.study.settings import Settings
from reco_lightning.experiments.study.training import run
from reco_lightning.support.argument_checks import check_flag, check_int, check_path

__all__ = ["do_runs", "finished", "run_plan", "study"]


def study(
    *,
    plan: str = "tables123",
    data: DataName = "digits",
    seeds: int = 3,
    output: str = "outputs/study",
    workers: int = 1,
    steps: int = 1200,
    report: bool = False,
) -> None:
    """Trains a plan's methods with several seeds, and writes one table of them all with confidence intervals.

    Runs that the output folder holds are not repeated: a study that was interrupted goes on, and several processes may
    work on one folder.

    Args:
        plan: A packaged plan (controls, gap, lambda, map, mixed, overlap, rollout, tables123), or a YAML file like one.
        data: `digits`, moving digits, or `clips`, the real clips of the demo.
        seeds: Runs of each line, 1 or more, with seeds from 0 on.
        output: Folder for `runs/` and the reports.
        workers: Processes that train side by side, each on one thread.
        steps: Steps of the plain run, 1 or more.
        report: Only write the report, from the runs that are there.

    Raises:
        ValueError: If an argument is out of its range, or the plan holds what no run takes.
        ModuleNotFoundError: If a package of the extra `study` is missing.
    """
    check_flag(report=report)
    _check_sizes(seeds, workers, steps)
    check_path(output=output)
    for package in ("matplotlib", "scipy", "sklearn"):
        if importlib.util.find_spec(package) is None:  # to be named now, and not after hours
            raise ModuleNotFoundError(f'a study needs {package}: pip install "reco_lightning[study]"', name=package)
    run_plan(load_plan(plan, data), seeds=seeds, output=output, workers=workers, steps=steps, train=not report)


def run_plan(
    plan: Plan,
    *,
    seeds: int,
    output: str,
    steps: int,
    workers: int = 1,
    train: bool = True,
    settings: Settings | None = None,
) -> Path:
    """Runs a study with any plan and sizes.

    Args:
        plan: What to run.
        seeds: Runs of each line.
        output: The folder.
        steps: Steps of the plain run.
        workers: Processes.
        train: Whether to train what is missing.
        settings: Sizes.

    Returns:
        The report.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan, as load_plan reads it, got {plan!r}")
    if not isinstance(settings, Settings | None):
        raise ValueError(f"settings must be Settings or None, got {settings!r}")
    _check_sizes(seeds, workers, steps)
    check_path(output=output)
    check_flag(train=train)
    folder = Path(output)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    settings = settings or Settings()
    specs = [line.spec(steps=steps, seed=seed, settings=settings) for seed in range(seeds) for line in plan.lines]
    if train:
        if workers == 1:
            do_runs(specs, folder)
        else:
            _spread(specs, folder, workers)
    path = write_report(plan, folder, seeds=seeds, steps=steps, settings=settings)
    print(f"Look at {path.resolve()}", flush=True)
    return path


def finished(folder: Path, spec: RunSpec) -> dict[str, Any] | None:
    """Reads the record of a run, or None where it is not finished."""
    path = _path(folder, spec)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def do_runs(specs: Sequence[RunSpec], folder: Path) -> None:
    """Trains what is neither finished nor held by another process.

    Args:
        specs: The runs, in their order; runs of equal arguments are one.
        folder: The study's folder.
    """
    wanted = list({spec.key: spec for spec in specs}.values())
    for number, spec in enumerate(wanted, 1):
        path = _path(folder, spec)
        if path.is_file():
            continue
        with lock(path.with_suffix(".lock")) as held:
            if not held or path.is_file():
                continue
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                record = run(spec, folder=folder)
            finally:
                torch.set_num_threads(threads)
            write_json(path, record)
        print(
            f"[{number}/{len(wanted)}] {spec.key} ({spec.method.name}): cross-entropy {record['cross_entropy']:.3f}, "
            f"Fréchet distance {record['frechet'][str(spec.data.blocks)]:.2f}, {record['seconds']:.0f} s",
            flush=True,
        )


def _check_sizes(seeds: int, workers: int, steps: int) -> None:
    check_int(at_least=1, seeds=seeds, workers=workers, steps=steps)


def _spread(specs: Sequence[RunSpec], folder: Path, workers: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=do_runs, args=(specs, folder)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {workers} workers ended with an error, which stands above")


def _path(folder: Path, spec: RunSpec) -> Path:
    return folder / "runs" / f"{spec.key}.json"
