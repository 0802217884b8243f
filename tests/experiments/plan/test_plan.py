# SPDX-License-Identifier: Apache-2.0
"""``reco plan`` predicts what steps need: against real steps on a CPU, and against counts by hand."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from reco_lightning.experiments.benchmark.training_steps import StepBenchmark, network_of_size
from reco_lightning.experiments.methods import load_method
from reco_lightning.experiments.plan.command import Setting, plan, plan_size
from reco_lightning.experiments.plan.memory_tracker import StepTracker, run_kernels, trace_step
from reco_lightning.windowing.injection.windowed_step import Injection

pytestmark = pytest.mark.slow

SIZE, VOCAB, GRID, BATCH = "64x2x2", 96, (5, 4, 8), 2
WIDTH, DEPTH = 64, 2


def setting(**changes):
    return Setting(**({"grid": GRID, "vocab_size": VOCAB, "batch_size": BATCH, "precision": "32"} | changes))


class Plain(pl.LightningModule):
    """The step that is planned, with data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = network_of_size(SIZE, vocab_size=VOCAB, grid=GRID)
        self.tokens = torch.randint(VOCAB, (BATCH, 160))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(self.tokens[:, :-1]).flatten(0, 1), self.tokens.flatten())


def test_tracker_follows_memory_to_its_end():
    kept = torch.ones(8)
    with StepTracker() as tracker:
        view = kept.view(2, 4)[0]  # no new memory
        one = torch.zeros(10)  # 40 bytes
        two = one + 1  # and 40
        one.add_(1)
        del one
        three = two[:2].clone()  # and 8
        assert (tracker.live, tracker.peak) == (48, 80)
        del two, three, view
    assert tracker.live == 0


def test_gradients_are_those_of_the_trainers_order():
    layer, states = torch.nn.Linear(64, 64, bias=False), torch.ones(2, 64)
    weight, output, loss = 64 * 64 * 4, 2 * 64 * 4, 4

    def step():
        return layer(states).sum()

    trace = trace_step(step, list(layer.parameters()))
    assert trace.saved_bytes == loss  # neither the weight nor the batch is the step's own
    assert trace.peak_bytes >= weight + output + loss  # the last step's gradient beside the forward
    assert trace.rest_bytes == 0
    alone = trace_step(step, list(layer.parameters()), gradients=False)
    assert weight <= alone.peak_bytes < trace.peak_bytes + output
    assert layer.weight.grad is None


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("kernels", ["cpu", "math"])
def test_a_plan_is_to_the_byte_what_the_callbacks_real_steps_need(kernels, precision):
    planned, windowed = plan_size(SIZE, ["plain", "reco"], setting(kernels=kernels, precision=precision))
    module, callback = Plain(), load_method("reco").callback(5, 32)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def step():
        return module.training_step(None, 0)

    def follow(run):
        with run_kernels(kernels):
            return trace_step(run, list(module.parameters()), autocast=autocast)

    assert planned.windows[0].trace == follow(step)
    with autocast():
        selection = callback.settings.select(module, step)
    injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
    selection.engine.install()
    assert [one.window for one in windowed.windows] == list(callback.settings.sampler.windows)
    for one in windowed.windows:
        assert one.trace == follow(lambda window=one.window: injection.run([window], step)[0]), one.window
        selection.engine.deactivate()
    selection.engine.remove()


def test_a_plan_is_within_a_tenth_of_the_memory_that_the_process_takes():
    # in a process of its own: another's heap has room already, which is then no memory that a step takes
    code = "from tests.experiments.plan.test_plan import compare_with_the_process; compare_with_the_process()"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr


def compare_with_the_process():
    size, grid, batch = "128x2x2", (5, 8, 8), 8
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed is given back, and not kept for later
    torch.manual_seed(0)
    network = network_of_size(size, vocab_size=512, grid=grid)
    steps = StepBenchmark(network, size, methods=("plain", "reco"), batch_size=batch, device=torch.device("cpu"))
    steps.warm_up(1)
    found = steps.measure(1, rate=1e9)
    plans = plan_size(size, ["plain", "reco"], setting(grid=grid, vocab_size=512, batch_size=batch, kernels="cpu"))
    for measured, planned in zip(found, plans, strict=True):
        # what is measured is beyond gradients, which the peak of the forward has beside it
        predicted = max(one.trace.peak_bytes for one in planned.windows) - planned.states.gradients
        assert predicted == pytest.approx(measured.peak_bytes, rel=0.1), f"{measured.method}: {measured.peak_bytes}"


LINEAR, INNER = DEPTH * (4 * WIDTH**2 + 3 * WIDTH * 192), WIDTH**2 + 3 * WIDTH * 192
"""Multiply-adds of a row in all blocks (feed-forward 192), and in the last one behind its attention."""


@pytest.fixture(scope="module")
def grown():
    """Plans of float32 steps by the number of frame blocks, of 8 tokens each."""
    return {blocks: plan_size(SIZE, ["plain", "reco"], setting(grid=(blocks, 2, 4))) for blocks in (5, 33)}


@pytest.mark.parametrize("blocks", [5, 33])
def test_plain_attention_grows_with_the_square_of_the_blocks_by_hand(blocks, grown):
    plain, rows = grown[blocks][0], 8 * blocks
    pairs = 4 * WIDTH * DEPTH  # operations of a pair of rows: scores and values, in all blocks
    # forward and backward: three times of linear layers, 3.5 times of attention, whose scores are computed anew
    by_hand = BATCH * (6 * rows * (LINEAR + WIDTH * VOCAB) + 3.5 * pairs * rows**2)
    assert plain.operations == by_hand


@pytest.mark.parametrize("blocks", [5, 33])
def test_a_window_trains_as_much_whatever_the_number_of_blocks_by_hand(blocks, grown):
    reco, window, context = grown[blocks][1], 16, 8 * (blocks - 2)
    last = reco.windows[-1]
    assert (last.window.start, last.window.stop) == (context, context + window)
    once = 2 * context * (LINEAR - INNER) + 4 * WIDTH * (DEPTH - 1) * context**2  # the last block: to keys and values
    trained = 6 * window * (LINEAR + WIDTH * VOCAB) + 3.5 * 4 * WIDTH * DEPTH * window * (context + window)
    assert last.trace.operations == BATCH * (once + trained)


def test_what_reco_keeps_grows_by_the_states_of_the_context_alone(grown):
    (plain, reco), (long_plain, long_reco) = grown[5], grown[33]
    rows = BATCH * 8 * (33 - 5)
    states = rows * WIDTH * 4
    more = long_reco.windows[-1].trace.saved_bytes - reco.windows[-1].trace.saved_bytes
    assert 2 * DEPTH * states <= more <= (2 * DEPTH + 4) * states  # keys and values; states before and after the blocks
    assert long_reco.windows[0].trace.saved_bytes - reco.windows[0].trace.saved_bytes <= 4 * states
    assert long_plain.saved_bytes - plain.saved_bytes >= 20 * DEPTH * states


def test_windows_between_are_those_of_a_run_of_their_own(grown):
    reco = grown[33][1]
    assert [one.window.start // 8 for one in reco.windows] == [0, 1, 16, 31]
    sampler = load_method("reco").callback(33, 8).settings.sampler
    context = [8 * number for number in range(1, 32)]
    linear, head = LINEAR, WIDTH * VOCAB
    by_hand = [
        BATCH * (2 * c * (linear - INNER) + 4 * WIDTH * (DEPTH - 1) * c**2
                 + 6 * 16 * (linear + head) + 14 * WIDTH * DEPTH * 16 * (c + 16))
        for c in context
    ]  # fmt: skip
    first = reco.windows[0].trace.operations
    expected = sampler.probabilities[0] * first + sum(
        share * cost for share, cost in zip(sampler.probabilities[1:], by_hand, strict=True)
    )
    assert reco.operations == pytest.approx(expected, rel=1e-9)


def test_what_is_held_whatever_the_windows_by_hand():
    blocks = LINEAR + DEPTH * 2 * WIDTH  # with two norms each
    others = (VOCAB + 1) * WIDTH + WIDTH + VOCAB * WIDTH  # embeddings, last norm, head
    whole = 4 * (blocks + others)
    (one,) = plan_size(SIZE, ["plain"], setting())
    assert one.states.parameters == blocks + others
    assert (one.states.weights, one.states.optimizer, one.states.buckets) == (whole, 2 * whole, 0)
    (ddp,) = plan_size(SIZE, ["plain"], setting(devices=4))
    assert (ddp.states.buckets, ddp.peak_bytes) == (whole, one.peak_bytes + whole)
    (fsdp,) = plan_size(SIZE, ["plain"], setting(devices=4, strategy="fsdp"))
    share = whole // 4
    assert (fsdp.states.weights, fsdp.states.gradients, fsdp.states.optimizer) == (share, share, 2 * share)
    assert fsdp.states.gathered == 2 * 4 * others + 4 * 4 * blocks // DEPTH
    step = 4 * share + fsdp.states.gathered + fsdp.windows[0].trace.peak_bytes
    assert fsdp.peak_bytes == max(step, 5 * share)


def test_checkpointing_keeps_less_and_runs_the_blocks_once_more():
    plain, reco = plan_size(SIZE, ["plain", "reco"], setting())
    again, reco_again = plan_size(SIZE, ["plain", "reco"], setting(checkpointing=True))
    assert again.saved_bytes < plain.saved_bytes / 3
    assert reco_again.saved_bytes < reco.saved_bytes / 2
    rows = 160
    # a block's recomputation ends where the last saved tensor has been met again: before its last product
    more = DEPTH * BATCH * (2 * rows * (4 * WIDTH**2 + 2 * WIDTH * 192) + 4 * WIDTH * rows**2)
    assert again.operations == plain.operations + more


def test_command_prints_both_tables(capsys):
    plan(sizes=[SIZE], grid=GRID, vocab_size=VOCAB, methods=["plain", "reco"], rate=1e9)
    text = capsys.readouterr().out
    assert f"| {SIZE} | 0.1" in text
    lines = [line for line in text.splitlines() if line.startswith(f"| {SIZE} | reco")]
    assert [line.split(" | ")[2] for line in lines] == ["0-64", "32-96", "64-128", "96-160", "mean, highest peak"]
    operations, seconds = (float(lines[-1].strip("| ").split(" | ")[column]) for column in (4, 7))
    assert seconds == pytest.approx(operations * 1e3, abs=0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"devices": 0}, "devices must be a whole number of 1 or more, got 0"),
        ({"grid": (5, 0, 2)}, r"grid must be three whole numbers of 1 or more .*got \(5, 0, 2\)"),
        ({"grid": (1, 2, 2)}, "grid must have two frame blocks or more"),
        ({"methods": ["fast"]}, "methods must be of plain, .*, got fast"),
        ({"methods": []}, r"methods must be a list of one text or more, got \[\]"),
        ({"sizes": ["32m"], "methods": ["plain"]}, "size must be one of 110m, 343m, 770m, or WIDTHxDEPTHxHEADS"),
        ({"rate": 0.0}, "rate must be a finite number above 0 or None, got 0"),
        ({"strategy": "deepspeed"}, "strategy must be one of 'ddp', 'fsdp', got 'deepspeed'"),
        ({"kernels": "tpu"}, "kernels must be one of 'cuda', 'cpu', 'math', got 'tpu'"),
        ({"precision": "16"}, "precision must be one of '32', 'bf16', got '16'"),
    ],
)
def test_refuses_what_cannot_be_planned(options, match):
    with pytest.raises(ValueError, match=match):
        plan(**({"sizes": [SIZE], "grid": GRID, "vocab_size": VOCAB} | options))
