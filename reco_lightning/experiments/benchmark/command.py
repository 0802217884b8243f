# SPDX-License-Identifier: Apache-2.0
"""`reco benchmark`: measures the methods on networks of several sizes, and writes table, JSON and figure."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from reco_lightning.experiments.benchmark.sampling import write_generation_speeds
from reco_lightning.experiments.benchmark.training_steps import (
    METHODS,
    Measurement,
    StepBenchmark,
    check_measurement,
    matrix_rate,
    network_of_size,
)
from reco_lightning.support.argument_checks import check_flag, check_path, check_strs
from reco_lightning.support.devices import pick_device
from reco_lightning.support.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["benchmark", "benchmark_figure", "benchmark_table"]


def benchmark(
    *,
    sizes: list[str] = ["110m"],  # noqa: B006 - read only; jsonargparse shows it as the default
    grid: tuple[int, int, int] = (5, 32, 32),
    vocab_size: int = 8192,
    batch_size: int = 1,
    methods: list[str] = list(METHODS),  # noqa: B006
    steps: int = 10,
    burn_in: int = 3,
    precision: Literal["32", "bf16"] = "bf16",
    compile: bool = False,
    device: str = "auto",
    output: str = "outputs/benchmark",
    generation: bool = False,
) -> None:
    """Measures training steps of the plain model and the windowed methods on the same network.

    Of each method: step time (every window by itself, median, weighted by the windows' probabilities), tokens per
    second, highest memory beyond weights and optimizer, counted operations, bytes saved for the backward pass, and the
    share of the measured rate of matrix products. Writes `benchmark.md`, `benchmark.json` and, where matplotlib is
    installed, `benchmark.png`.

    Args:
        sizes: `110m`, `343m`, `770m`, or WIDTHxDEPTHxHEADS such as `256x6x4`.
        grid: Frame blocks, rows and columns of the tokens.
        vocab_size: Token ids.
        batch_size: Samples of a step.
        methods: Of plain, fewer-frames, local-opt and reco; plain has to be one.
        steps: Measured steps of each window.
        burn_in: Steps of each window before them.
        precision: `bf16` by autocast, or `32`.
        compile: Whether the network runs under `torch.compile`, for every method.
        device: `auto`, `cpu`, `cuda`, `cuda:1` and so on.
        output: Folder to write to.
        generation: Measures sampling instead of training, against `generate` of transformers on the same weights, and
            writes `generation.md` and `generation.json`. Methods, steps and burn_in have no effect then; `precision` is
            that of weights and caches, and `compile` concerns the step of one token.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_strs(sizes=sizes)
    check_measurement(methods=methods, batch_size=batch_size, steps=steps, burn_in=burn_in)
    if precision not in ("32", "bf16"):
        raise ValueError(f"precision must be '32' or 'bf16', got {precision!r}")
    check_flag(compile=compile, generation=generation)
    check_path(output=output)
    for size in sizes:
        with torch.device("meta"):  # refuses sizes, grid and vocab_size, and holds no weights
            network_of_size(size, vocab_size=vocab_size, grid=grid)
    place = pick_device(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if generation:
        write_generation_speeds(
            folder,
            sizes=sizes,
            grid=grid,
            vocab_size=vocab_size,
            batch=batch_size,
            dtype=dtype,
            compile=compile,
            device=place,
        )
        return
    rate = matrix_rate(place, dtype)
    found: list[Measurement] = []
    with tqdm(total=0, bar_format="{desc}") as line:
        for size in sizes:
            network = network_of_size(size, vocab_size=vocab_size, grid=grid)
            steps_of_size = StepBenchmark(
                network,
                size,
                methods=methods,
                batch_size=batch_size,
                precision=dtype,
                compiled=compile,
                device=place,
                progress=line.set_description_str,
            )
            steps_of_size.warm_up(burn_in)
            found += steps_of_size.measure(steps, rate=rate)
            del network, steps_of_size
    setting = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "grid": list(grid),
        "vocab_size": vocab_size,
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "steps": steps,
        "matrix_products_flops": rate,
    }
    table = benchmark_table(found)
    (folder / "benchmark.json").write_text(
        json.dumps({"setting": setting, "measurements": [one.as_dict() for one in found]}, indent=2)
    )
    described = ", ".join(f"{name} {value}" for name, value in setting.items())
    (folder / "benchmark.md").write_text(f"{table}\n{described}\n")
    print(f"\n{table}\n{described}")
    try:
        figure, _ = benchmark_figure(found)
    except ModuleNotFoundError:
        print("No figure: pip install matplotlib")
    else:
        figure.savefig(folder / "benchmark.png", dpi=150)
    print(f"Wrote {folder / 'benchmark.md'} and benchmark.json")


def benchmark_table(found: Sequence[Measurement]) -> str:
    """Returns the measurements as a Markdown table.

    Args:
        found: The measurements.

    Example:
        >>> one = Measurement("plain", "110m", 2.0, 0.01, 2560.0, None, 4e12, 2e9, 0.5, 1.0, 1.0)
        >>> print(benchmark_table([one]).splitlines()[2])
        | 110m | plain | 2000.0 ± 1 % | 2560 | - | 4.000 | 1.86 | 50 % | 1.00 | 1.00 |
    """
    head = (
        "size",
        "method",
        "step (ms)",
        "tokens / s",
        "peak memory (GiB)",
        "operations (TFLOP)",
        "saved (GiB)",
        "of matrix rate",
        "speed-up",
        "by operations",
    )
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for one in found:
        peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f}"
        cells = (
            one.size,
            one.method,
            f"{one.seconds * 1e3:.1f} ± {one.spread:.0%}".replace("%", " %"),
            f"{one.tokens_per_second:.0f}",
            peak,
            f"{one.operations / 1e12:.3f}",
            f"{one.saved_bytes / 2**30:.2f}",
            f"{one.utilisation:.0%}".replace("%", " %"),
            f"{one.speed_up:.2f}",
            f"{one.promised:.2f}",
        )
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def benchmark_figure(found: Sequence[Measurement]) -> tuple[Figure, Sequence[Axes]]:
    """Draws step time and memory by model size (the paper's Figures 3 and 7).

    Args:
        found: The measurements.

    Returns:
        The figure, and its axes for step time and memory.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    sizes = list(dict.fromkeys(one.size for one in found))
    methods = list(dict.fromkeys(one.method for one in found))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        own = {one.size: one for one in found if one.method == method}
        places = [sizes.index(size) + (number - (len(methods) - 1) / 2) * width for size in own]
        colour = COLOURS[number % len(COLOURS)]
        axes[0].bar(places, [one.seconds * 1e3 for one in own.values()], width, color=colour, label=method)
        memory = [(one.saved_bytes if one.peak_bytes is None else one.peak_bytes) / 2**30 for one in own.values()]
        axes[1].bar(places, memory, width, color=colour, label=method)
    for ax, label in zip(axes, ("step time (ms)", "peak memory of a step (GiB)"), strict=True):
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set_xlabel("network size")
        ax.set_ylabel(label)
    axes[0].legend(frameon=False)
    return figure, axes
