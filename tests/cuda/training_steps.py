# SPDX-License-Identifier: Apache-2.0
"""Measures and profiles training steps of one network size; several of these compile side by side and measure in turns.

It warms up, says so by a file ``ready``, and waits for a file ``go`` before it takes the device for itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from reco_lightning.experiments.benchmark.training_steps import StepBenchmark, network_of_size
from reco_lightning.experiments.plan.command import Setting, plan_size

KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "aten::mm", "aten::addmm"),
    "attention": ("flash", "fmha", "attention", "cudnn"),
}
"""Parts of kernels' names; what is neither moves memory."""


def profile_step(run, device):
    """Share of the device's time by kind of kernel, of the time in which it has nothing to do, and the largest."""
    cuda = device.type == "cuda"
    run.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        begin = time.perf_counter()
        run.step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    times = {}
    for event in seen.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        is_kernel = not cuda or str(event.device_type).endswith("CUDA")
        if is_kernel and spent:
            times[event.key] = times.get(event.key, 0) + spent / 1e6
    busy = sum(times.values())
    by_kind = dict.fromkeys((*KINDS, "other kernels"), 0.0)
    for name, spent in times.items():
        found = [kind for kind, parts in reversed(KINDS.items()) if any(part in name.lower() for part in parts)]
        by_kind[found[0] if found else "other kernels"] += spent
    largest = sorted(times.items(), key=lambda item: -item[1])[:12]
    return {
        "window": str(run.kind),
        "wall_ms": wall * 1e3,
        "busy_ms": busy * 1e3,
        "share": {kind: spent / busy for kind, spent in by_kind.items()},
        "largest_ms": {name[:120]: spent * 1e3 for name, spent in largest},
    }


def measure(options, *, compiled, methods, wait):
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    network = network_of_size(options.size, vocab_size=options.vocab_size, grid=tuple(options.grid))
    steps = StepBenchmark(
        network, options.size, methods=methods, batch_size=options.batch_size, device=device, compiled=compiled,
        precision=torch.bfloat16,
    )  # fmt: skip
    begin = time.perf_counter()
    steps.warm_up(2)
    warm_up = time.perf_counter() - begin
    wait()
    found = [one.as_dict() for one in steps.measure(options.steps, rate=options.rate)]
    profiles = {name: profile_step(steps.runs[name][-1], device) for name in ("plain", "reco")}
    kinds = {
        name: [
            {"kind": str(run.kind), "share": run.kind.share, "seconds": run.times, "peaks": run.peaks} for run in runs
        ]
        for name, runs in steps.runs.items()
    }
    return {"measurements": found, "profiles": profiles, "warm_up_s": warm_up, "kinds": kinds}


def predict(options):
    """Peak memory beyond weights, gradients and optimizer, by ``reco plan``, bytes."""
    setting = Setting(grid=tuple(options.grid), vocab_size=options.vocab_size, batch_size=options.batch_size)
    plans = plan_size(options.size, ["plain", "reco"], setting)
    return {one.method: max(window.trace.peak_bytes for window in one.windows) - one.states.gradients for one in plans}


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--grid", type=int, nargs=3, required=True)
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["plain", "reco"])
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--eager", action="store_true", help="measure without a compiler, and nothing else")
    parser.add_argument("--folder", type=Path, required=True, help="where ready, go and result.json are")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    result = {"size": options.size, "batch_size": options.batch_size, "compiled": not options.eager}

    def wait():
        free()
        (options.folder / "ready").touch()
        while not (options.folder / "go").exists():
            time.sleep(0.1)

    try:
        result |= measure(options, compiled=not options.eager, methods=options.methods, wait=wait)
        result["predicted_peaks"] = predict(options)
    except Exception:
        result["error"] = traceback.format_exc()[-6000:]
    (options.folder / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
