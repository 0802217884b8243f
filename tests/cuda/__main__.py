# SPDX-License-Identifier: Apache-2.0
"""Everything that is to be known about a GPU, in one go: correct, fast, by which kernels, worth it.

    python -m tests.cuda --output outputs/gpu             # what `make gpu` runs
    python -m tests.cuda --output outputs/gpu --dry_run   # the same on a CPU, with tiny networks

Every stage has its own time limit. ``gpu.json`` and ``gpu.md`` are written after each, so that a cut loses the rest
alone. The compilers work beside the stage "correct"; measurements have the device to themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from reco_lightning.experiments.benchmark.command import benchmark_table
from reco_lightning.experiments.benchmark.training_steps import Measurement, matrix_rate

STAGES = "correct", "compiled", "eager", "worth", "sampling"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Limits:
    """Seconds that each stage may take."""

    correct: int = 170
    compile: int = 300
    measure: int = 60
    sampling: int = 60
    worth: int = 125


@dataclass(frozen=True)
class Scale:
    """What is run."""

    sizes: tuple[tuple[str, int], ...]  # with their batch sizes
    grid: tuple[int, int, int]
    vocab_size: int
    steps: int
    tests: tuple[str, ...]  # options of pytest
    sampling: tuple[str, ...]
    worth: tuple[str, ...]
    workers: int


FULL = Scale(
    sizes=(("110m", 8), ("343m", 4), ("770m", 4)),  # what the compilers of all three hold at once fits 139 GiB
    grid=(5, 32, 32),
    vocab_size=8192,
    steps=8,
    tests=(),
    sampling=("110m",),
    worth=("--runs", "plain:16", "plain:32", "plain:64", "reco:64", "best:32", "best:64", "--seconds", "18"),
    workers=6,
)
DRY = Scale(
    sizes=(("32x2x2", 2),),
    grid=(5, 2, 2),
    vocab_size=32,
    steps=2,
    tests=("-k", "own and not classes and not compiled or softmax or waits or chunks or sampling and eager"),
    sampling=("32x1x2",),
    worth=(
        "--runs", "plain:2", "best:4", "--seconds", "0.2", "--dim", "32", "--depth", "1", "--heads", "2", "--tiles",
        "1", "--pool", "16", "--held_out", "2", "--between", "1",
    ),
    workers=0,
)  # fmt: skip


def describe(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "cuda": torch.version.cuda}


class Session:
    """The stages, and what they have found so far."""

    def __init__(self, options):
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.scale = DRY if options.dry_run else FULL
        # a CPU that others use too is slow
        self.limits = Limits(*[1200] * len(fields(Limits))) if options.dry_run else Limits()
        self.output = options.output
        self.work = options.output / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.begun = time.monotonic()
        self.found = {"machine": describe(self.device)}
        self.steps = []
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.environment = inherited | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RECO_TEST_DEVICE": self.device.type,
            "RECO_TEST_REPORT": str((self.output / "correct.jsonl").absolute()),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def say(self, text):
        print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", flush=True)

    def start(self, name, *arguments):
        log = (self.work / f"{name}.log").open("w")
        environment = self.environment | ({} if name.startswith("steps") else {"OMP_NUM_THREADS": "1"})
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        return process

    def finish(self, process, deadline):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return process.returncode

    def write(self, **found):
        self.found |= found
        (self.output / "gpu.json").write_text(json.dumps(self.found, indent=1))
        (self.output / "gpu.md").write_text(report(self.found))

    def start_correct(self, tests):
        workers = ("-n", str(self.scale.workers)) if self.scale.workers else ()
        options = ("-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "--override-ini", "norecursedirs=.git")
        chosen = ("-k", tests) if tests else self.scale.tests
        return self.start("correct", "pytest", str(HERE), *options, *workers, *chosen)

    def end_correct(self, process, deadline):
        status = self.finish(process, deadline)
        report_file = self.output / "correct.jsonl"
        lines = [json.loads(line) for line in report_file.read_text().splitlines()] if report_file.exists() else []
        failed = [line for line in lines if line["outcome"] == "failed"]
        passed = len(lines) - len(failed)
        ended = {0: "all ended", 1: "all ended"}.get(status, "cut off or broken, see the log")
        self.write(correct={"passed": passed, "failed": failed, "ended": ended})
        self.say(f"correct: {passed} passed, {len(failed)} failed, {ended}")
        for line in failed[:12]:
            print("   ", line["test"], "|", line["message"].strip().splitlines()[-1][:200] if line["message"] else "")

    def start_steps(self, size, batch_size, rate, *more):
        folder = self.work / f"{size}{'-eager' if '--eager' in more else ''}"
        arguments = (
            "--size", size, "--batch_size", str(batch_size), "--grid", *map(str, self.scale.grid), "--vocab_size",
            str(self.scale.vocab_size), "--steps", str(self.scale.steps), "--rate", str(rate), "--device",
            self.device.type, "--folder", str(folder.absolute()), *more,
        )  # fmt: skip
        return folder, self.start(f"steps-{folder.name}", "tests.cuda.training_steps", *arguments)

    def measure(self, folder, process):
        """Gives a process that is ready the device, and returns what it found."""
        (folder / "go").touch()
        self.finish(process, time.monotonic() + self.limits.measure)
        result = folder / "result.json"
        if not result.exists():
            reason = f"ended with status {process.returncode}, ready: {(folder / 'ready').exists()}"
            return {"size": folder.name, "error": f"{reason}; see steps-{folder.name}.log"}
        return json.loads(result.read_text())

    def run(self, stages, tests):
        rate = matrix_rate(self.device, torch.bfloat16, seconds=1.0)
        self.found["machine"]["matrix_products_flops"] = rate
        self.say(f"{self.found['machine']}")
        compiling = []
        if "compiled" in stages:
            compiling = [self.start_steps(size, batch, rate) for size, batch in self.scale.sizes]
        ready_by = time.monotonic() + self.limits.compile
        if "correct" in stages:
            self.end_correct(self.start_correct(tests), time.monotonic() + self.limits.correct)
        self.take_turns(compiling, ready_by)
        if "eager" in stages:
            for size, batch in self.scale.sizes:
                methods = ("plain", "fewer-frames", "local-opt", "reco")
                self.take_turns([self.start_steps(size, batch, rate, "--eager", "--methods", *methods)])
        if "worth" in stages:
            output = (self.output / "worth.json").absolute()
            self.run_module("worth", "wall_time", "--device", self.device.type, "--output", output, *self.scale.worth)
            self.write(worth=json.loads(output.read_text()) if output.exists() else [])
        if "sampling" in stages:
            self.run_module("sampling", "sampling", self.device.type, self.output.absolute(), *self.scale.sampling)
        print(report(self.found))

    def take_turns(self, processes, ready_by=None):
        """Gives the device to one process after the other, when all are ready or have missed their time."""
        ready_by = time.monotonic() + self.limits.measure if ready_by is None else ready_by
        for folder, process in processes:
            while process.poll() is None and not (folder / "ready").exists():
                if time.monotonic() > ready_by:
                    process.kill()
                time.sleep(0.1)
        for folder, process in processes:
            self.steps.append(self.measure(folder, process))
            self.write(steps=self.steps)
            self.say(f"{folder.name}: {self.steps[-1].get('error', 'measured')[-300:]}")

    def run_module(self, name, module, *arguments):
        process = self.start(name, f"tests.cuda.{module}", *map(str, arguments))
        self.finish(process, time.monotonic() + getattr(self.limits, name))
        self.say(f"{name}: " + (self.work / f"{name}.log").read_text()[-700:])


def report(found):
    """What was found, as Markdown."""
    machine = found["machine"]
    rate = machine.get("matrix_products_flops", 0) / 1e12
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}, {rate:.0f} TFLOP/s in matrix products\n"
    ]
    if "correct" in found:
        correct = found["correct"]
        lines.append(f"Correct: {correct['passed']} passed, {len(correct['failed'])} failed ({correct['ended']}).\n")
    for one in found.get("steps", []):
        how = "compiled" if one.get("compiled") else "eager"
        if "error" in one:
            lines.append(f"{one['size']}, {how}: {one['error'].strip().splitlines()[-1]}\n")
            continue
        lines.append(f"{one['size']}, batch {one['batch_size']}, {how}, warm-up {one['warm_up_s']:.0f} s:\n")
        measured = [Measurement(**each) for each in one["measurements"]]
        lines.append(benchmark_table(measured))
        peaks = {each.method: each.peak_bytes for each in measured}
        for method, predicted in one.get("predicted_peaks", {}).items():
            if peaks.get(method):
                measured_gib, planned = peaks[method] / 2**30, predicted / 2**30
                lines.append(f"peak of {method}: {measured_gib:.2f} GiB, planned {planned:.2f}\n")
        for method, each in one["profiles"].items():
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in each["share"].items())
            lines.append(
                f"{method}, {each['window']}: {each['busy_ms']:.1f} of {each['wall_ms']:.1f} ms busy; {shares}\n"
            )
    if found.get("worth"):
        rows = ["| method | batch | steps | seconds | cross-entropy |", "|---|---|---|---|---|"]
        for one in found["worth"]:
            last = f"{one['seconds']:.1f} | {one['curve'][-1][2]:.4f}"
            rows.append(f"| {one['method']} | {one['batch_size']} | {one['steps']} | {last} |")
        lines.append("\n".join(rows))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.cuda", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="which to run, in this order")
    parser.add_argument("--tests", default="", help="pytest's -k, for the stage correct")
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, with tiny networks")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device was found by torch; --dry_run runs the same on a CPU, with tiny networks")
    Session(options).run(options.stages, options.tests)


if __name__ == "__main__":
    main()
