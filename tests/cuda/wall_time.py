# SPDX-License-Identifier: Apache-2.0
"""Plain training at several batch sizes against windows for equal wall time: cross-entropy of held-out clips.

A clip is a mosaic of moving digits, drawn on the device: 5 blocks of 16 x 16 tokens, sixteen digits that move alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from reco_lightning import VideoTransformer
from reco_lightning.experiments.benchmark.training_steps import _Step
from reco_lightning.experiments.methods import load_method
from reco_lightning.experiments.study.digits import VOCABULARY, MovingDigits
from reco_lightning.windowing.injection.windowed_step import Injection

BLOCKS, SIDE = 5, 4


class Mosaics:
    """Token clips (B, 5 * (4 * tiles) ** 2) whose tiles are drawn from a pool of moving digits."""

    def __init__(self, tiles, device, *, count, held_out):
        digits = torch.from_numpy(MovingDigits(BLOCKS, held_out=held_out, seed=int(held_out))[0:count])
        self.pool = digits.view(count, BLOCKS, SIDE, SIDE).to(device)
        self.tiles = tiles
        self.generator = torch.Generator(device).manual_seed(1)

    def draw(self, batch):
        tiles = self.tiles
        shape = (batch, tiles, tiles)
        chosen = torch.randint(len(self.pool), shape, generator=self.generator, device=self.pool.device)
        clips = self.pool[chosen]  # (B, row of tiles, column of tiles, T, h, w)
        return clips.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1)


def train(options, method, batch_size, seconds):
    """Trains for so many seconds, of which the proof and the first three steps are none."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    side = SIDE * options.tiles
    network = VideoTransformer(
        vocab_size=VOCABULARY, grid=(BLOCKS, side, side), dim=options.dim, depth=options.depth, heads=options.heads
    )
    module = _Step(network).to(device).train()
    data = Mosaics(options.tiles, device, count=options.pool, held_out=False)
    held_out = Mosaics(options.tiles, device, count=256, held_out=True).draw(options.held_out)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    callback = None if method == "plain" else load_method(method).callback(BLOCKS, side * side)
    injection = None
    if callback is not None:
        batch = data.draw(batch_size)
        with torch.autocast(device.type, torch.bfloat16):
            selection = callback.settings.select(module, lambda: module.training_step(batch, 0))
        injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
        selection.engine.install()

    @torch.no_grad()
    def evaluate():
        losses = []
        with torch.autocast(device.type, torch.bfloat16):
            for part in held_out.split(16):
                losses.append(F.cross_entropy(network(part[:, :-1]).flatten(0, 1).float(), part.flatten()))
        return float(torch.stack(losses).mean())

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(number):
        tokens = data.draw(batch_size)
        with torch.autocast(device.type, torch.bfloat16):
            if injection is None:
                loss = module.training_step(tokens, number)
            else:
                windows = callback.settings.sampler.sample_groups(number, callback.settings.windows_per_batch)
                loss, _ = injection.run(windows, lambda: module.training_step(tokens, number))
        loss.backward()
        if injection is not None:
            injection.engine.deactivate()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    wait()
    spent, number, curve = 0.0, 3, []
    while spent < seconds:
        begin = time.perf_counter()
        for _ in range(options.between):
            done = spent / seconds
            warm = min(1.0, number / options.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = (
                    options.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))
                )
            step(number)
            number += 1
        wait()
        spent += time.perf_counter() - begin
        curve.append([round(spent, 2), number, evaluate()])
    return {"method": method, "batch_size": batch_size, "steps": number, "seconds": spent, "curve": curve}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of each run")
    parser.add_argument("--runs", nargs="+", required=True, help="such as plain:32 best:64")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--pool", type=int, default=8192)
    parser.add_argument("--held_out", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warm_up", type=int, default=50)
    parser.add_argument("--between", type=int, default=20)
    options = parser.parse_args()
    found = []
    for run in options.runs:
        method, _, batch_size = run.partition(":")
        found.append(train(options, method, int(batch_size), options.seconds))
        options.output.write_text(json.dumps(found))
        last = found[-1]
        print(run, last["steps"], "steps", f"{last['curve'][-1][2]:.4f} nats", flush=True)


if __name__ == "__main__":
    main()
