# SPDX-License-Identifier: Apache-2.0
"""Measures what the injection costs in Python for each block: ``python -m tests.helpers.overhead``.

The network is so small that arithmetic hardly counts. The armed forward is compared with the calls that it stands for:
every block once on the context's rows without gradient and once on the window's rows, as plain calls. What is left is
the patches, the taps, the cutting of arguments, and joining the context's keys and values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from reco_lightning import VideoTransformer, Window
from reco_lightning.windowing.engines.base import Head
from reco_lightning.windowing.engines.frozen import FrozenEngine
from reco_lightning.windowing.rows import RowLayout

DEPTH, WINDOW = 24, Window(8, 16)
FIRST, STOP = WINDOW.start, WINDOW.stop


def median_seconds(runs: list[Callable[[], object]], repeats: int = 200) -> list[float]:
    """Median time of each, measured in turns, so that a busy machine is busy for all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 10):
        for run, own in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if turn >= 10:
                own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


def main() -> None:
    """Prints the times of a forward of 24 blocks and the difference for each block."""
    torch.set_num_threads(1)
    network = VideoTransformer(vocab_size=16, grid=(5, 2, 2), dim=16, depth=DEPTH, heads=2)
    tokens = torch.randint(16, (1, 19))
    engine = FrozenEngine(list(network.blocks), [Head(network.head)], RowLayout(20))
    engine.install()

    def armed() -> torch.Tensor:
        engine.activate([WINDOW])
        try:
            return network(tokens)
        finally:
            engine.deactivate()

    def plain_calls() -> torch.Tensor:
        x = torch.cat([network.condition(tokens.new_zeros(1))[:, None], network.embedding(tokens)], dim=1)
        context, window = x[:, :FIRST].detach(), x[:, FIRST:STOP]
        tables = network.query_table, network.key_table
        for block in network.blocks:
            with torch.no_grad():
                context = block(context, *(table[:FIRST] for table in tables))
            window = block(window, *(table[FIRST:STOP] for table in tables))
        return network.head(network.norm(window))

    own, other, plain = median_seconds([armed, plain_calls, lambda: network(tokens)])
    engine.remove()
    for name, seconds in (("armed", own), ("the same calls, plain", other), ("plain forward", plain)):
        print(f"{name:<24}{seconds * 1e3:8.2f} ms")
    print(f"{'overhead for each block':<24}{(own - other) / DEPTH * 1e6:8.0f} us")


if __name__ == "__main__":
    main()
