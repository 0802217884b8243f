# SPDX-License-Identifier: Apache-2.0
"""Reads the plan of a study from YAML and checks it before anything is trained."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.experiments.methods import Method, load_method
from reco_lightning.experiments.study.data_spec import DataName, DataSpec
from reco_lightning.experiments.study.settings import BATCH_SIZE, Settings
from reco_lightning.support.argument_checks import check_int
from reco_lightning.windowing.sampler import WindowSampler

__all__ = ["Line", "Plan", "RunSpec", "load_plan", "plan_names"]

_FOLDER = Path(__file__).parent / "plans"
_VERSION = 1  # rises when data or measurements change: records of the old kind are not taken for new ones
_LINE_KEYS = ("method", "name", "set", "batch_size", "steps", "cost", "data", "lengths")
_PLAN_KEYS = ("about", "data", "lengths", "runs")
_FIXED = ("self", "sampler", "frame_blocks", "tokens_per_block", "seed")


@dataclass(frozen=True)
class RunSpec:
    """The settings of a run: everything that decides its result.

    Args:
        data: Its clips.
        method: How it trains.
        batch_size: Clips a step.
        budget: ``"steps"`` or ``"cost"``: what ``share`` is a share of.
        share: Of the plain run's steps, or of its operations.
        steps: Steps of the plain run.
        lengths: Frame blocks of the longer clips that are compared.
        seed: Of weights, clips, windows and samples.
        settings: Sizes.
    """

    data: DataSpec
    method: Method
    batch_size: int
    budget: Literal["steps", "cost"]
    share: float
    steps: int
    lengths: tuple[int, ...]
    seed: int
    settings: Settings

    def record(self) -> dict[str, Any]:
        """As JSON shows it. The method's name is left out: its arguments decide."""
        content = {"version": _VERSION, **asdict(self)}
        content["method"] = {"sampler": dict(self.method.sampler), "options": _plain(self.method.options)}
        content["lengths"] = list(self.lengths)
        return content

    @property
    def key(self) -> str:
        """Name of its file: runs that are the same in all but their names share it."""
        text = json.dumps(self.record(), sort_keys=True)
        return f"{self.data.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}-s{self.seed}"


@dataclass(frozen=True)
class Line:
    """One line of a plan's table: a run for every seed.

    Args:
        name: What the table calls it.
        method: How it trains.
        data: Its clips.
        batch_size: Clips a step.
        budget: ``"steps"`` or ``"cost"``.
        share: Of the plain run's steps or operations.
        lengths: Frame blocks of the longer clips that are compared.
    """

    name: str
    method: Method
    data: DataSpec
    batch_size: int
    budget: Literal["steps", "cost"]
    share: float
    lengths: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether it is what others are compared with: plain training in full."""
        return self.method.options is None and self.share == 1 and self.batch_size == BATCH_SIZE

    def spec(self, *, steps: int, seed: int, settings: Settings) -> RunSpec:
        """Returns the run of a seed."""
        return RunSpec(
            self.data, self.method, self.batch_size, self.budget, self.share, steps, self.lengths, seed, settings
        )


@dataclass(frozen=True)
class Plan:
    """The lines of a study.

    Args:
        name: Like its file.
        about: One sentence on what it compares.
        lines: In the order of the table.
    """

    name: str
    about: str
    lines: tuple[Line, ...] = field(default_factory=tuple)


def plan_names() -> list[str]:
    """Returns the names of the packaged plans.

    Example:
        >>> "tables123" in plan_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_plan(plan: str, data: DataName = "digits") -> Plan:
    """Reads a plan and checks every line. Lengths that the data set has no clips of are left out.

    Args:
        plan: Name of a packaged plan, or the path of a YAML file of the same form.
        data: The data set.

    Returns:
        The plan.

    Raises:
        ValueError: If there is no such plan, or a line holds what no run takes.

    Example:
        >>> [line.name for line in load_plan("lambda").lines][:2]
        ['plain', 'λ = 0']
    """
    refusal = ValueError(
        f"plan must be one of {', '.join(plan_names())}, or the path of a YAML file like them, got {plan!r}"
    )
    if not isinstance(plan, str):
        raise refusal
    DataSpec(data)  # refuses another name
    path = Path(plan) if plan.endswith((".yaml", ".yml")) or os.sep in plan else _FOLDER / f"{plan}.yaml"
    if not path.is_file():
        raise refusal
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must hold YAML, but cannot be read: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("runs"), list) or not content["runs"]:
        raise ValueError(f"{path} must hold a list `runs` of one line or more; see plans/tables123.yaml of the package")
    _refuse_unknown(content, _PLAN_KEYS, str(path))
    lines = []
    for number, entry in enumerate(content["runs"], 1):
        try:
            lines.append(_line(entry, content, data))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, run {number}: {error}") from error
    names = [(line.name, line.data) for line in lines]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} holds two runs of the name {name[0]!r} on the same data; give one another `name`")
    return Plan(path.stem, str(content.get("about", "")), tuple(lines))


def _line(entry: Any, plan: Mapping[str, Any], data: DataName) -> Line:
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise ValueError(f"a run must be a mapping with `method`, got {entry!r}")
    _refuse_unknown(entry, _LINE_KEYS, "a run")
    if "steps" in entry and "cost" in entry:
        raise ValueError("a run takes steps or cost, each a share of the plain run's, got both")
    budget: Literal["steps", "cost"] = "cost" if "cost" in entry else "steps"
    share = entry.get(budget, 1.0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 10:
        raise ValueError(f"{budget} must be a share of the plain run's, above 0 and at most 10, got {share!r}")
    batch_size = entry.get("batch_size", BATCH_SIZE)
    check_int(at_least=1, batch_size=batch_size)
    spec = DataSpec(data).changed({**plan.get("data", {}), **entry.get("data", {})})
    lengths = tuple(entry.get("lengths", plan.get("lengths", ())))
    if any(not isinstance(length, int) or length <= spec.blocks for length in lengths):
        raise ValueError(f"lengths must be frame blocks, each above the {spec.blocks} of training, got {lengths}")
    if spec.longest is not None:
        lengths = tuple(length for length in lengths if length <= spec.longest)
    method = load_method(str(entry["method"]))
    changes = entry.get("set", {})
    if changes:
        _refuse_unknown(changes, _arguments(), "set")
        method = method.changed(method.name, **changes)
    method.callback(spec.blocks, 16)  # refuses values out of range
    return Line(
        name=str(entry.get("name", _name(method, changes, budget, share, batch_size))),
        method=method,
        data=spec,
        batch_size=batch_size,
        budget=budget,
        share=float(share),
        lengths=lengths,
    )


def _name(method: Method, changes: Mapping[str, Any], budget: str, share: float, batch_size: int) -> str:
    words = ["plain" if method.options is None else method.name]
    words += [f"{key}={value}" for key, value in changes.items()]
    if batch_size != BATCH_SIZE:
        words.append(f"batch {batch_size}")
    if budget == "cost":
        words.append("equal cost" if share == 1 else f"{share:g} of the cost")
    elif share != 1:
        words.append(f"{share:g} of the steps")
    return ", ".join(words)


def _arguments() -> list[str]:
    names = [name for cls in (WindowSampler, ReCoCallback) for name in inspect.signature(cls.__init__).parameters]
    return [name for name in names if name not in _FIXED]


def _refuse_unknown(content: Mapping[str, Any], allowed: Any, where: str) -> None:
    unknown = [str(key) for key in content if key not in allowed]
    if unknown:
        raise ValueError(f"{where} takes {', '.join(allowed)}, got {', '.join(unknown)}")


def _plain(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if options is None else dict(options)
