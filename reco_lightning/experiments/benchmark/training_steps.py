# SPDX-License-Identifier: Apache-2.0
"""Measures time, memory and operations of plain and windowed training steps."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.experiments.methods import load_method, method_names
from reco_lightning.models.transformer import SIZES, VideoTransformer
from reco_lightning.support.argument_checks import check_int, check_str, check_strs
from reco_lightning.windowing.cost import collect_new_objects
from reco_lightning.windowing.explain import Explanation, explain
from reco_lightning.windowing.injection.recompile_limit import RecompileLimit
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.sampler import Window, WindowSampler

__all__ = ["METHODS", "Measurement", "StepBenchmark", "check_measurement", "matrix_rate", "network_of_size"]

METHODS = ("plain", "fewer-frames", "local-opt", "reco")
"""Plain training, and the methods of ``recipes/method`` that are measured by default."""


@dataclass(frozen=True)
class Measurement:
    """The cost of a method's training step, averaged over its kinds of steps by their shares.

    Args:
        method: ``plain`` or a packaged method.
        size: Name of the network's size.
        seconds: Step time: of each kind of step the median.
        spread: Half the distance between the quartiles of a kind's step times, relative to their median.
        tokens_per_second: Tokens of the batch's videos per second.
        peak_bytes: Memory beyond weights, gradients and optimizer at its highest; ``None`` where it cannot be told.
        operations: Floating-point operations, counted, without recomputation; attention by the pairs of rows that see
            each other.
        saved_bytes: Bytes kept for the backward pass, counted in an uncompiled step.
        utilisation: Operations per second over the measured rate of matrix products.
        speed_up: Plain step time over this one's.
        promised: Plain operations over this method's: the speed-up that the count promises.
    """

    method: str
    size: str
    seconds: float
    spread: float
    tokens_per_second: float
    peak_bytes: int | None
    operations: float
    saved_bytes: float
    utilisation: float
    speed_up: float
    promised: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the same as a dictionary, for JSON."""
        return asdict(self)


def network_of_size(size: str, *, vocab_size: int, grid: tuple[int, int, int]) -> VideoTransformer:
    """Returns a reference network by the paper's name, or by ``WIDTHxDEPTHxHEADS``.

    Args:
        size: ``"110m"``, ``"343m"``, ``"770m"`` or numbers such as ``"256x6x4"``.
        vocab_size: V.
        grid: Frame blocks, rows and columns of the tokens.

    Raises:
        ValueError: If the size is neither.

    Example:
        >>> network_of_size("32x2x2", vocab_size=16, grid=(5, 2, 2)).config["dim"]
        32
    """
    check_str(size=size)
    if size in SIZES:
        return VideoTransformer.from_name(size, vocab_size=vocab_size, grid=grid)  # type: ignore[arg-type]
    numbers = size.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"size must be one of {', '.join(SIZES)}, or WIDTHxDEPTHxHEADS such as 256x6x4, got {size!r}")
    dim, depth, heads = map(int, numbers)
    return VideoTransformer(vocab_size=vocab_size, grid=grid, dim=dim, depth=depth, heads=heads)


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Returns the floating-point operations per second of square matrix products on a device: the best of many.

    Args:
        device: Where.
        dtype: Of the factors.
        seconds: How long to try.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        taken = _seconds(lambda: a @ a, device)
        best = max(best, 2 * size**3 / taken)
    return best


def check_measurement(*, methods: Sequence[str], batch_size: int, steps: int, burn_in: int) -> None:
    """Raises unless `StepBenchmark` can measure it.

    Args:
        methods: As in `StepBenchmark`, like all that follows.
        batch_size: 1 or more.
        steps: 1 or more.
        burn_in: 0 or more.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_strs(methods=methods)
    check_int(at_least=1, batch_size=batch_size, steps=steps)
    check_int(at_least=0, burn_in=burn_in)
    known = ["plain", *(name for name in method_names() if name != "baseline")]
    if "plain" not in methods or not set(methods) <= set(known):
        raise ValueError(f"methods must hold 'plain' and be of {', '.join(known)}, got {', '.join(methods)}")


class _Step(pl.LightningModule):
    """The reference network's plain training step."""

    def __init__(self, network: VideoTransformer) -> None:
        super().__init__()
        self.network = network

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        logits = self.network(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class StepBenchmark:
    """Training steps (forward, backward, AdamW) of several methods on one network.

    Every kind of step (window) of a method is run by itself, all in turns, so that a machine that is busy for a while
    is so for all.

    Args:
        network: The network; its weights are trained on random tokens.
        size: Its name in the result.
        methods: Names of packaged methods; ``plain`` has to be one of them, being what the others are compared with.
        batch_size: B, samples of a step.
        precision: float32, or bfloat16 by autocast.
        compiled: Whether the network runs under ``torch.compile``.
        device: Where to compute.
        progress: Called with what is being done.

    Attributes:
        runs: For each method its kinds of steps.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        network: VideoTransformer,
        size: str,
        *,
        methods: Sequence[str] = METHODS,
        batch_size: int,
        precision: torch.dtype = torch.float32,
        compiled: bool = False,
        device: torch.device,
        progress: Callable[[str], object] = lambda text: None,
    ) -> None:
        check_measurement(methods=methods, batch_size=batch_size, steps=1, burn_in=0)
        module = _Step(network).to(device).train()
        tokens = torch.randint(network.vocab_size, (batch_size, network.num_tokens), device=device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=device.type == "cuda")
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if precision != torch.float32:
            autocast = lambda: torch.autocast(device.type, precision)  # noqa: E731 - the other branch is a class

        def step() -> torch.Tensor:
            return module.training_step(tokens, 0)

        self.size = size
        self.tokens = tokens.numel()
        self.device = device
        self.progress = progress
        self.costs: dict[str, Explanation] = {}
        self.runs: dict[str, list[Run]] = {}
        callbacks = {name: _callback(name, network) for name in methods}
        for name, callback in callbacks.items():
            progress(f"{size}, {name}: counting operations")
            with autocast():
                self.costs[name] = explain(module, tokens, callback)
        if compiled:
            network.compile()
        for name, callback in callbacks.items():
            with autocast():
                selection = callback.settings.select(module, step)
            injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
            self.runs[name] = [Run(step, injection, kind, optimizer, autocast) for kind in _kinds(callback)]

    @contextmanager
    def _room_to_compile(self) -> Iterator[None]:
        limit = RecompileLimit()
        limit.raise_by(sum(map(len, self.runs.values())))
        try:
            yield
        finally:
            limit.restore()

    def warm_up(self, steps: int = 3) -> None:
        """Runs steps of each kind that are not measured; under ``torch.compile`` the first one compiles."""
        with self._room_to_compile():
            for name, runs in self.runs.items():
                for run in runs:
                    self.progress(f"{self.size}, {name}: {run.kind}, first steps")
                    for _ in range(steps):
                        run.step()

    def measure(self, steps: int = 10, *, rate: float) -> list[Measurement]:
        """Runs and measures steps.

        Args:
            steps: Steps of each kind, 1 or more.
            rate: Operations per second of matrix products, see ``matrix_rate``.

        Returns:
            One measurement per method, in their order.
        """
        with self._room_to_compile(), collect_new_objects():
            for number in range(steps):
                self.progress(f"{self.size}: step {number + 1} of {steps} of each kind")
                for run in itertools.chain(*self.runs.values()):
                    run.measure(self.device)
        return _summarise(self.size, self.costs, self.runs, rate=rate, tokens=self.tokens)


def _callback(name: str, network: VideoTransformer) -> ReCoCallback:
    blocks, rows, columns = network.grid
    if name == "plain":
        return ReCoCallback(WindowSampler(blocks, rows * columns, window_blocks=blocks), continuity_weight=0.0)
    callback = load_method(name).callback(blocks, rows * columns)
    assert callback is not None  # the packaged method without one is the baseline, which is "plain" here
    return callback


@dataclass(frozen=True)
class Kind:
    """One kind of step of a method.

    Args:
        windows: One window per group of the batch.
        attached: Tokens in front of each window that are trained through.
        share: Of the method's steps.
    """

    windows: tuple[Window, ...]
    attached: int
    share: float

    def __str__(self) -> str:
        return "tokens " + ", ".join(f"{window.start}-{window.stop}" for window in self.windows)


def _kinds(callback: ReCoCallback) -> list[Kind]:
    """All kinds of steps; those with a window for each group of the batch by how often they are drawn."""
    if callback.settings.windows_per_batch == 1:
        return [Kind((kind.window,), kind.attached, kind.probability) for kind in callback.settings.step_kinds]
    draws = 2000
    drawn = Counter(
        # the order of the groups costs nothing
        tuple(sorted(callback.settings.sampler.sample_groups(step, callback.settings.windows_per_batch)))
        for step in range(draws)
    )
    return [Kind(windows, callback.settings.attached_tokens, count / draws) for windows, count in drawn.items()]


class Run:
    """Steps of one kind, and what was measured of them.

    Args:
        training_step: Computes the plain loss.
        injection: Runs it on windows.
        kind: Which windows, and their share of the method's steps.
        optimizer: Of the network.
        autocast: Makes the context of the forward.

    Attributes:
        times: Seconds of each measured step.
        peaks: Highest use of memory of each, bytes beyond what was in use before; empty where it cannot be told.
    """

    def __init__(
        self,
        training_step: Callable[[], torch.Tensor],
        injection: Injection,
        kind: Kind,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.training_step = training_step
        self.injection = injection
        self.kind = kind
        self.optimizer = optimizer
        self.autocast = autocast
        self.times: list[float] = []
        self.peaks: list[int] = []

    def step(self) -> None:
        """One training step; the network is left unpatched, since the next one may be another method's."""
        engine = self.injection.engine
        engine.install()
        try:
            with self.autocast():
                loss, _ = self.injection.run(self.kind.windows, self.training_step, attached=self.kind.attached)
            loss.backward()
            engine.deactivate()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
        finally:
            engine.remove()

    def measure(self, device: torch.device) -> None:
        """One step, its time and its highest use of memory."""
        before = _reset_peak(device)
        self.times.append(_seconds(self.step, device))
        peak = _peak(device)
        if before is not None and peak is not None:
            self.peaks.append(peak - before)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the times, relative to their median."""
        if len(self.times) < 4:
            return 0.0
        quartiles = statistics.quantiles(self.times, n=4)
        return (quartiles[2] - quartiles[0]) / 2 / statistics.median(self.times)


def _summarise(
    size: str, costs: dict[str, Explanation], runs: dict[str, list[Run]], *, rate: float, tokens: int
) -> list[Measurement]:
    found: list[Measurement] = []
    seconds: dict[str, float] = {}
    for name, own in runs.items():
        seconds[name] = sum(run.kind.share * statistics.median(run.times) for run in own)
        peaks = [max(run.peaks) for run in own if run.peaks]
        cost = costs[name]
        operations = cost.operations - cost.hidden_operations
        found.append(
            Measurement(
                method=name,
                size=size,
                seconds=seconds[name],
                spread=max(run.spread for run in own),
                tokens_per_second=tokens / seconds[name],
                peak_bytes=max(peaks) if len(peaks) == len(own) else None,
                operations=operations,
                saved_bytes=cost.saved_bytes,
                utilisation=operations / seconds[name] / rate,
                speed_up=0.0,
                promised=(cost.plain_operations - cost.plain_hidden_operations) / operations,
            )
        )
    return [Measurement(**(one.as_dict() | {"speed_up": seconds["plain"] / one.seconds})) for one in found]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _reset_peak(device: torch.device) -> int | None:
    """Starts to watch memory anew; returns what is in use now, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, and is still the process's, would hide the step's
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if Path("/proc/self/status").exists() else None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024
