# SPDX-License-Identifier: Apache-2.0
"""One run: its cost against counts of its real steps, its budget, and what all methods of a seed share."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from reco_lightning.experiments.methods import Method, load_method
from reco_lightning.experiments.study import training
from reco_lightning.experiments.study.data_spec import DataSpec
from reco_lightning.experiments.study.plan import RunSpec
from reco_lightning.experiments.study.settings import Settings
from reco_lightning.experiments.study.sources import TokenSource, open_source
from reco_lightning.experiments.study.training import StepCosts, StudyModel, TokenBatches, Watch, run, share_of_rate
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.windowing.explain import explain

TINY = Settings(dim=24, depth=2, heads=2, validations=2, held_out_clips=8, compared_clips=16, features=4)
BATCH = 5


def spec(method: str | Method, **changes: Any) -> RunSpec:
    named = load_method(method) if isinstance(method, str) else method
    values: dict[str, Any] = {
        "data": DataSpec(blocks=3), "batch_size": 4, "budget": "steps", "share": 1.0, "steps": 6, "lengths": (),
        "seed": 0, "settings": TINY,
    }  # fmt: skip
    return RunSpec(method=named, **{**values, **changes})


def digits() -> TokenSource:
    return open_source(DataSpec(blocks=3), seed=0, folder=Path(), settings=TINY)


def model_of(source: TokenSource) -> StudyModel:
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=64, grid=source.grid, dim=24, depth=2, heads=2)
    return StudyModel(network, learning_rate=1e-3)


class Counter(pl.Callback):
    """Counts the operations of real steps, forward and backward."""

    def __init__(self) -> None:
        self.operations: list[int] = []
        self.stack = ExitStack()

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode = self.stack.enter_context(FlopCounterMode(display=False))
        self.stack.enter_context(sdpa_kernel(SDPBackend.MATH))

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.stack.close()
        self.operations.append(int(self.mode.get_total_flops()))


def test_the_rate_rises_and_falls_by_the_share_done() -> None:
    assert share_of_rate(0) == 0
    assert share_of_rate(0.01) == pytest.approx(0.2)
    assert share_of_rate(0.05) == 1
    assert share_of_rate(0.2875) == pytest.approx((1 + 0.5**0.5) / 2)  # a quarter of the way down
    assert share_of_rate(1) == pytest.approx(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("baseline", {}),
        ("fewer-frames", {}),
        ("reco", {"windows_per_batch": 2}),
        ("reco", {"windows_per_batch": 3, "context": "keys"}),
        ("reco", {"context": "attached"}),
        ("local-opt", {"stride_blocks": 0.5, "attached_blocks": 1, "attached_share": 0.5}),
    ],
)
def test_the_cost_of_every_step_is_what_the_real_step_counts(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source, method = digits(), load_method(name)
    if changes:
        method = method.changed(name, **changes)
    model = model_of(source)
    costs = StepCosts(model, source, method.callback(3, 16), batch_size=BATCH)
    callback = method.callback(3, 16)
    watch = Watch(callback, torch.zeros(1, 48, dtype=torch.long), every=100)
    counter = Counter()
    trainer = pl.Trainer(
        max_steps=9, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[watch, counter] if callback is None else [callback, watch, counter],
    )  # fmt: skip
    trainer.fit(model, DataLoader(TokenBatches(source, batch_size=BATCH, steps=9), batch_size=None))
    assert len(watch.kinds) == 9
    assert [costs.of(kind) for kind in watch.kinds][1:] == pytest.approx(counter.operations[1:])  # the first proves


@pytest.mark.slow
def test_the_expected_cost_is_that_of_explain_and_the_unit_is_a_plain_step_of_32() -> None:
    source = digits()
    batch = {"tokens": torch.from_numpy(source.batch(0, BATCH))}
    model, callback = model_of(source), load_method("reco").callback(3, 16)
    assert callback is not None
    found = explain(model, batch, callback)
    costs = StepCosts(model, source, callback, batch_size=BATCH)
    assert costs.expected == found.operations
    assert costs.plain == found.plain_operations * 32 / BATCH
    assert StepCosts(model, source, None, batch_size=BATCH).of(()) == found.plain_operations


@pytest.mark.slow
def test_equal_cost_buys_the_steps_that_the_plain_operations_pay(tmp_path: Path) -> None:
    record = run(spec("reco", budget="cost", share=0.5, batch_size=8, steps=4), folder=tmp_path)
    source = digits()
    callback = load_method("reco").callback(3, 16)
    assert callback is not None
    costs = StepCosts(model_of(source), source, callback, batch_size=8)
    assert record["steps"] == round(0.5 * 4 * costs.plain / costs.expected)
    of_window = {"0-32": (8, 0, 32, 0), "16-48": (8, 16, 48, 0)}
    spent = sum(count / 8 * costs.of((of_window[name],)) for name, count in record["windows"].items())
    assert record["cost"] == pytest.approx(spent / (4 * costs.plain))
    assert record["cost"] == pytest.approx(0.5, abs=0.1)
    drawn = [callback.settings.sampler.sample(step).start for step in range(record["steps"])]
    assert record["windows"] == {f"{start}-{start + 32}": 8 * drawn.count(start) for start in sorted(set(drawn))}


@pytest.mark.slow
def test_a_record_holds_what_was_measured(tmp_path: Path) -> None:
    record = run(spec("baseline", lengths=(5,)), folder=tmp_path)
    assert (record["steps"], record["cost"], record["engine"]) == (6, 0.125, "plain")
    assert [step for step, _, _ in record["curve"]] == [3, 6]
    assert [cost for _, cost, _ in record["curve"]] == [0.0625, 0.125]
    assert record["curve"][-1][2] == pytest.approx(record["cross_entropy"])
    assert np.mean(record["by_position"]) == pytest.approx(record["cross_entropy"])
    assert np.reshape(record["by_position"], (3, 16)).mean(1) == pytest.approx(record["by_block"])
    assert set(record["frechet"]) == set(record["frechet_floor"]) == {"3", "5"}
    again = run(spec("baseline", lengths=(5,)), folder=tmp_path)
    assert again["by_position"] == record["by_position"]
    assert again["frechet"] == record["frechet"]


@pytest.mark.slow
def test_all_methods_of_a_seed_begin_with_the_same_weights_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    fit = training._fit

    def look(model: StudyModel, batches: TokenBatches, *args: Any, **kwargs: Any) -> None:
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        seen[current] = [weights.clone(), batches[0]["tokens"], batches[1]["tokens"]]
        fit(model, batches, *args, **kwargs)

    monkeypatch.setattr(training, "_fit", look)
    for current in ("baseline", "reco", "fewer-frames"):
        run(spec(current, steps=2), folder=tmp_path)
    run_of_another_seed = spec("reco", steps=2, seed=1)
    current = "another seed"
    run(run_of_another_seed, folder=tmp_path)
    for name in ("reco", "fewer-frames"):
        assert all(torch.equal(a, b) for a, b in zip(seen["baseline"], seen[name], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen["baseline"], seen["another seed"], strict=True))


@pytest.mark.slow
def test_fewer_frames_samples_within_its_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    generate = training.generate

    def look(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append((kwargs["length"], kwargs["window_blocks"], kwargs["context_blocks"]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(training, "generate", look)
    for name in ("fewer-frames", "reco"):
        run(spec(name, steps=1, lengths=(4,)), folder=tmp_path)
    assert asked == [(3, 2, 1), (4, 2, 1), (3, None, None), (4, None, None)]
