# SPDX-License-Identifier: Apache-2.0
"""What `make gpu` runs on a GPU, in small on a CPU: every stage but the compilers ends with a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = "correct", "eager", "worth", "sampling"
WITHOUT = "av", "decord", "wandb", "jsonargparse", "x_transformers"


@pytest.mark.slow
@pytest.mark.ci
def test_every_stage_of_the_gpu_script_runs(tmp_path):
    blocked = tmp_path / "blocked"
    for name in WITHOUT:  # a bare machine has none of them
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')")
    tests = "does_not_wait and dropped or frozen-own or frozen-llama-labels"
    command = [sys.executable, "-m", "tests.cuda", "--dry_run", "--output", tmp_path / "gpu", "--tests", tests]
    done = subprocess.run(
        [*command, "--stages", *STAGES],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{blocked}:{ROOT / 'tests/cuda/stand_ins'}"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert found["correct"]["failed"] == []
    assert found["correct"]["passed"] >= 3
    (steps,) = found["steps"]
    assert [one["method"] for one in steps["measurements"]] == ["plain", "fewer-frames", "local-opt", "reco"], steps
    assert set(steps["predicted_peaks"]) == set(steps["profiles"]) == {"plain", "reco"}
    assert [run["method"] for run in found["worth"]] == ["plain", "best"]
    assert (tmp_path / "gpu" / "generation.json").exists()
    page = (tmp_path / "gpu" / "gpu.md").read_text()
    assert all(word in page for word in ("Correct:", "fewer-frames", "planned", "| best |"))
