# SPDX-License-Identifier: Apache-2.0
"""Speed of sampling against transformers: ``python -m tests.cuda.sampling DEVICE FOLDER SIZE...``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from reco_lightning.experiments.benchmark.sampling import write_generation_speeds

if __name__ == "__main__":
    device, folder, *sizes = sys.argv[1:]
    on_gpu = device == "cuda"
    write_generation_speeds(
        Path(folder), sizes=sizes, grid=(1, 16, 16) if on_gpu else (1, 4, 4), vocab_size=8192 if on_gpu else 32,
        batch=8, dtype=torch.bfloat16 if on_gpu else torch.float32, compile=on_gpu, device=torch.device(device),
    )  # fmt: skip
