# SPDX-License-Identifier: Apache-2.0
"""Names the machine that the demo ran on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["hardware", "peak_memory"]


def hardware() -> dict[str, Any]:
    """Describes processor, cores, threads, accelerator and versions of this run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """Returns the largest resident size of this process so far in bytes; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
