# SPDX-License-Identifier: Apache-2.0
"""`reco plan`: predicts memory and operations of training steps, of any size, without running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.experiments.benchmark.training_steps import network_of_size
from reco_lightning.experiments.methods import load_method, method_names
from reco_lightning.experiments.plan.memory_tracker import Kernels, StepTrace, run_kernels, trace_step
from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.recipes.files import load_recipe
from reco_lightning.support.argument_checks import (
    check_choice,
    check_finite,
    check_flag,
    check_int,
    check_strs,
    check_video_grid,
)
from reco_lightning.support.block_stacks import block_stacks
from reco_lightning.windowing.injection.engine_selection import build_engine
from reco_lightning.windowing.injection.step_trace import Trace
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.sampler import Window, WindowSampler

__all__ = ["MethodPlan", "Setting", "States", "WindowPlan", "plan", "plan_size", "plan_table", "states_table"]

GIB = 2**30
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Setting:
    """The training that a plan is made for.

    Args:
        grid: Frame blocks, rows and columns of the tokens.
        vocab_size: V, ids of video tokens.
        batch_size: Samples of a step, on each device.
        precision: ``"bf16"`` by autocast, over weights and optimizer in float32, or ``"32"``.
        devices: Processes that train together.
        strategy: ``"ddp"``, or ``"fsdp"``: FSDP2 over blocks and network.
        checkpointing: Whether blocks run again in the backward pass.
        kernels: What attention and norms keep, see ``run_kernels``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    grid: tuple[int, int, int] = (5, 32, 32)
    vocab_size: int = 8192
    batch_size: int = 1
    precision: Literal["32", "bf16"] = "bf16"
    devices: int = 1
    strategy: Strategy = "ddp"
    checkpointing: bool = False
    kernels: Kernels = "cuda"

    def __post_init__(self) -> None:
        check_int(at_least=1, batch_size=self.batch_size, devices=self.devices, vocab_size=self.vocab_size)
        check_video_grid(grid=self.grid)
        check_flag(checkpointing=self.checkpointing)
        check_choice(("32", "bf16"), precision=self.precision)
        check_choice(get_args(Strategy), strategy=self.strategy)
        check_choice(get_args(Kernels), kernels=self.kernels)
        if self.grid[0] < 2:
            raise ValueError(f"grid must have two frame blocks or more for windows of two, got {self.grid}")

    @property
    def small(self) -> Setting:
        """The same for a network that is small enough to prove the engine on."""
        return replace(self, grid=(self.grid[0], 1, 4), vocab_size=16, batch_size=2)


@dataclass(frozen=True)
class States:
    """Bytes on each device that a training holds whatever its windows.

    Args:
        parameters: Number of parameters of the whole network.
        weights: Weights in float32; under FSDP2 the device's share.
        gradients: Likewise.
        optimizer: AdamW's two moments, likewise.
        buckets: DDP's copy of the gradients.
        gathered: What FSDP2 has whole for a while: weights and gradients outside the blocks, and of two blocks (the one
            at work, and the one that is fetched or reduced) weights, gradients and the reduction's copy. A bound by the
            rules of FSDP2, which nothing has measured.
        update: AdamW's own scratch space, the square root of one moment (``foreach``, the default on CUDA).
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    update: int


@dataclass(frozen=True)
class WindowPlan:
    """The cost of a step on one window, for a device.

    Args:
        window: The window.
        share: Of the training's steps.
        trace: Operations and memory beyond weights and optimizer state.
        peak_bytes: The step's highest use, all told.
    """

    window: Window
    share: float
    trace: StepTrace
    peak_bytes: int


@dataclass(frozen=True)
class MethodPlan:
    """The cost of a training, for a device.

    Args:
        size: Name of the network's size.
        method: ``plain`` or a packaged method.
        states: What is held whatever the windows.
        windows: The windows that were followed: all of four or fewer, else the first two, the middle and the last.
        operations: Mean over all windows by their shares.
        saved_bytes: Likewise, of what is kept between forward and backward.
    """

    size: str
    method: str
    states: States
    windows: tuple[WindowPlan, ...]
    operations: float
    saved_bytes: float

    @property
    def peak_bytes(self) -> int:
        """The highest use of memory of any window's step."""
        return max(window.peak_bytes for window in self.windows)


class _Step(pl.LightningModule):
    """The plain training step of a network, with a batch of its own."""

    def __init__(self, network: Any, batch_size: int, *, caption_tokens: int = 0) -> None:
        super().__init__()
        self.network = network
        self.tokens = torch.randint(network.vocab_size, (batch_size, network.num_tokens))
        self.captions = torch.zeros(batch_size, caption_tokens, dtype=torch.long) if caption_tokens else None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.captions is None:
            logits, target = self.network(self.tokens[:, :-1]), self.tokens
        else:
            logits = self.network(self.captions, self.tokens[:, :-1])
            target = self.tokens + self.network.text_ids
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def plan_size(size: str, methods: Sequence[str], setting: Setting) -> list[MethodPlan]:
    """Predicts memory and operations of a network's training by several methods.

    The step is run by the callback's own engine, on tensors without data: only shapes are computed. The engine is
    proved beforehand on a small network of the same classes.

    Args:
        size: As in ``network_of_size``, or ``"llama-7b"``: the network of that recipe, with captions of 64 tokens.
        methods: ``plain`` and packaged methods.
        setting: The rest.

    Returns:
        One plan per method, in their order.

    Raises:
        ValueError: If there is no such size or method.

    Example:
        >>> plain, reco = plan_size("64x2x2", ["plain", "reco"], Setting(grid=(5, 8, 8), vocab_size=64))
        >>> reco.operations < plain.operations / 2, reco.peak_bytes < plain.peak_bytes
        (True, True)
    """
    known = ["plain", *(name for name in method_names() if name != "baseline")]
    if not methods or not set(methods) <= set(known):
        raise ValueError(f"methods must be of {', '.join(known)}, got {', '.join(methods) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        traces = {name: _rehearse(size, _callback(name, setting.small), setting) for name in methods if name != "plain"}
    with FakeTensorMode():
        module = _build(size, setting)
        if setting.checkpointing:
            _checkpoint_blocks(module, setting.kernels)
        states = _states(module, setting)
        return [
            _plan_method(size, name, module, states, _callback(name, setting), traces.get(name), setting)
            for name in methods
        ]


def _build(size: str, setting: Setting, *, small: bool = False) -> _Step:
    if size != "llama-7b":
        network = network_of_size("32x2x2" if small else size, vocab_size=setting.vocab_size, grid=setting.grid)
        return _Step(network, setting.batch_size)
    options = load_recipe("model/llama-7b").config["model"]["init_args"]["network"]["init_args"]
    architecture = options["architecture"]
    if small:
        sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        architecture = architecture | sizes | {"num_attention_heads": 2, "num_key_value_heads": 2}
    text = TextVideoNetwork(setting.vocab_size, setting.grid, architecture=architecture)
    text.build()
    text.train()
    return _Step(text, setting.batch_size, caption_tokens=4 if small else 64)


def _callback(name: str, setting: Setting) -> ReCoCallback | None:
    blocks, rows, columns = setting.grid
    return None if name == "plain" else load_method(name).callback(blocks, rows * columns)


def _checkpoint_blocks(module: nn.Module, kernels: Kernels) -> None:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), run_kernels(kernels)  # modes of functions do not reach what the backward pass runs again

    for name, blocks in block_stacks(module).items():
        stack = module.get_submodule(name)
        for index, block in enumerate(blocks):
            wrapped = checkpoint_wrapper(block, preserve_rng_state=False, context_fn=contexts)
            stack.register_module(str(index), wrapped)


def _rehearse(size: str, callback: ReCoCallback | None, setting: Setting) -> tuple[Trace, str, int]:
    """What the callback finds on a small network: the trace, the engine's name, and rows beside the video tokens."""
    assert callback is not None
    module = _build(size, setting.small, small=True).train()
    if setting.checkpointing:
        _checkpoint_blocks(module, "cpu")
    with _autocast(setting):
        selection = callback.settings.select(module, lambda: module.training_step(None, 0))
    return selection.trace, selection.engine.name, selection.trace.rows - callback.settings.sampler.tokens


def _autocast(setting: Setting) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if setting.precision == "bf16" else nullcontext()


def _states(module: nn.Module, setting: Setting) -> States:
    whole = sum(weight.nbytes for weight in module.parameters())
    count = sum(weight.numel() for weight in module.parameters())
    if setting.strategy == "ddp":
        return States(count, whole, whole, 2 * whole, whole if setting.devices > 1 else 0, 0, whole)
    blocks = [
        sum(weight.nbytes for weight in block.parameters())
        for stack in block_stacks(module).values()
        for block in stack
    ]
    gathered = 0 if setting.devices == 1 else 2 * (whole - sum(blocks)) + 4 * max(blocks)
    share = -(-whole // setting.devices)
    return States(count, share, share, 2 * share, 0, gathered, share)


def _plan_method(
    size: str,
    method: str,
    module: _Step,
    states: States,
    callback: ReCoCallback | None,
    found: tuple[Trace, str, int] | None,
    setting: Setting,
) -> MethodPlan:
    whole = setting.strategy == "ddp"

    def follow(step: Callable[[], torch.Tensor]) -> StepTrace:
        with run_kernels(setting.kernels):
            return trace_step(step, list(module.parameters()), autocast=lambda: _autocast(setting), gradients=whole)

    def plan_window(window: Window, share: float, trace: StepTrace) -> WindowPlan:
        held = states.weights + states.optimizer + states.buckets
        step = held + states.gathered + trace.peak_bytes + (0 if whole else states.gradients)
        update = held + states.gradients + states.update + trace.rest_bytes
        return WindowPlan(window, share, trace, max(step, update))

    def plain() -> torch.Tensor:
        return module.training_step(None, 0)

    if callback is None:
        trace = follow(plain)
        whole_video = plan_window(Window(0, module.network.num_tokens), 1.0, trace)
        return MethodPlan(size, method, states, (whole_video,), trace.operations, trace.saved_bytes)
    assert found is not None
    sampler = callback.settings.sampler
    small, engine_name, others = found
    # FSDP2 waits for gradients of the network's output, so that it gets logits of the full length
    heads = tuple(
        replace(head, like=torch.empty((), dtype=head.like.dtype), is_viewed=head.is_viewed and whole)
        for head in small.heads
    )
    there = replace(small, rows=sampler.tokens + others, heads=heads)
    engine = build_engine(
        module,
        there,
        engine_name,
        tokens=sampler.tokens,
        context=callback.settings.context,
        chunked_loss=callback.settings.chunked_loss,
    )
    injection = Injection(engine, there, callback.settings.continuity)
    traces = {}
    engine.install()
    try:
        for index in _telling(len(sampler.windows)):
            traces[index] = follow(partial(_windowed_loss, injection, sampler.windows[index], plain))
            engine.deactivate()
    finally:
        engine.remove()
    return MethodPlan(
        size,
        method,
        states,
        tuple(plan_window(sampler.windows[index], sampler.probabilities[index], one) for index, one in traces.items()),
        _mean(sampler, {index: one.operations for index, one in traces.items()}),
        _mean(sampler, {index: one.saved_bytes for index, one in traces.items()}),
    )


def _windowed_loss(injection: Injection, window: Window, plain: Callable[[], torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = injection.run([window], plain)[0]
    return loss


def _telling(count: int) -> list[int]:
    """Windows from which the others follow: a later window's cost is a polynomial of degree 2 in its start."""
    return sorted({0, 1, (count + 1) // 2, count - 1} & set(range(count)))


def _mean(sampler: WindowSampler, known: dict[int, int]) -> float:
    """Mean over all windows by their probabilities, those between by the parabola through the later ones."""
    starts = sampler.starts
    later = [index for index in known if index]

    def at(index: int) -> float:
        if index in known:
            return known[index]
        total = 0.0
        for one in later:
            weight = 1.0
            for other in later:
                if other != one:
                    weight *= (starts[index] - starts[other]) / (starts[one] - starts[other])
            total += weight * known[one]
        return total

    return sum(share * at(index) for index, share in enumerate(sampler.probabilities))


def plan_table(plans: Sequence[MethodPlan], *, rate: float | None = None) -> str:
    """Returns the plans as a Markdown table, a line for each window that was followed and one for the mean.

    Args:
        plans: The plans.
        rate: Operations per second of a device; ``None`` leaves the step times out.

    Example:
        >>> plans = plan_size("64x2x2", ["plain"], Setting(grid=(5, 2, 2), vocab_size=64))
        >>> plan_table(plans).splitlines()[2].split(" | ")[:4]
        ['| 64x2x2', 'plain', '0-20', '1.00']
    """
    head = (
        "size",
        "method",
        "tokens",
        "share",
        "operations (TFLOP)",
        "kept for backward (GiB)",
        "peak (GiB)",
        "time (s)",
    )

    def row(one: MethodPlan, tokens: str, share: float, operations: float, saved: float, peak: float) -> str:
        time = "-" if rate is None else f"{operations / rate:.3f}"
        cells = (one.size, one.method, tokens, f"{share:.2f}", f"{operations / 1e12:.3f}", f"{saved / GIB:.3f}")
        return " | ".join((*cells, f"{peak / GIB:.3f}", time))

    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for one in plans:
        for each in one.windows:
            tokens, trace = f"{each.window.start}-{each.window.stop}", each.trace
            lines.append(row(one, tokens, each.share, trace.operations, trace.saved_bytes, each.peak_bytes))
        if len(one.windows) > 1:
            lines.append(row(one, "mean, highest peak", 1.0, one.operations, one.saved_bytes, one.peak_bytes))
    return "".join(f"| {line} |\n" for line in lines)


def states_table(plans: Sequence[MethodPlan]) -> str:
    """Returns what each size holds on a device whatever the method, as a Markdown table.

    Args:
        plans: The plans.
    """
    head = (
        "size",
        "parameters (M)",
        "weights (GiB)",
        "gradients",
        "AdamW",
        "DDP's buckets",
        "FSDP2's gathered",
        "update",
    )
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for size, states in {one.size: one.states for one in plans}.items():
        parts = (states.weights, states.gradients, states.optimizer, states.buckets, states.gathered, states.update)
        lines.append(" | ".join((size, f"{states.parameters / 1e6:.1f}", *(f"{part / GIB:.3f}" for part in parts))))
    return "".join(f"| {line} |\n" for line in lines)


def plan(
    *,
    sizes: list[str] = ["110m"],  # noqa: B006 - read only; jsonargparse shows it as the default
    grid: tuple[int, int, int] = (5, 32, 32),
    vocab_size: int = 8192,
    batch_size: int = 1,
    methods: list[str] = ["plain", "reco"],  # noqa: B006
    precision: Literal["32", "bf16"] = "bf16",
    devices: int = 1,
    strategy: Literal["ddp", "fsdp"] = "ddp",
    checkpointing: bool = False,
    kernels: Literal["cuda", "cpu", "math"] = "cuda",
    rate: float | None = None,
) -> None:
    """Predicts what a training step needs, without a device that could run it.

    Real steps (forward and backward, by the callback's own engine) are run on tensors without data, and the memory of
    each is followed from its making to its end. Prints, for each size, what is held whatever the method, and for each
    method and window operations, bytes kept for the backward pass, and the highest use on a device.

    Not predicted: what an allocator rounds up or cannot reuse (some percent), scratch space inside kernels, CUDA's own
    few hundred MiB, and what `torch.compile` saves by joining kernels.

    Args:
        sizes: `110m`, `343m`, `770m`, WIDTHxDEPTHxHEADS such as `256x6x4`, or `llama-7b`.
        grid: Frame blocks, rows and columns of the tokens.
        vocab_size: Token ids.
        batch_size: Samples of a step, on each device.
        methods: `plain` and packaged methods.
        precision: `bf16` by autocast, over weights in float32, or `32`.
        devices: Processes that train together, on all nodes.
        strategy: `ddp`, or `fsdp` (FSDP2: weights, gradients and optimizer in shards).
        checkpointing: Whether blocks run again in the backward pass.
        kernels: `cuda` (flash attention, norms in one kernel: no scores are kept), `cpu` (its attention in one kernel),
            or `math` (attention written out: all scores are kept).
        rate: Operations per second of a device, as `reco benchmark` measures for matrix products, times the share of it
            that steps reach; gives step times.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_strs(sizes=sizes, methods=methods)
    check_finite(above=0, rate=rate, or_none=True)
    setting = Setting(
        grid=grid,
        vocab_size=vocab_size,
        batch_size=batch_size,
        precision=precision,
        devices=devices,
        strategy=strategy,
        checkpointing=checkpointing,
        kernels=kernels,
    )
    plans = [one for size in sizes for one in plan_size(size, methods, setting)]
    print(f"{states_table(plans)}\n{plan_table(plans, rate=rate)}")
