# SPDX-License-Identifier: Apache-2.0
"""The metrics on running sums as metrics: batches, processes, precision, checkpoints, files, labels, refusals."""

from __future__ import annotations

import json
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from reco_lightning.metrics import FrechetVideoDistance, FVDProtocol, PolynomialVideoMMD, RandomFeatureDistance
from reco_lightning.metrics.moments import Moments, load_moments, save_moments

MINE = FVDProtocol("mine", frames=9, clips=64, ddof=0)
KINDS = {
    "fvd": lambda: FrechetVideoDistance(Means(), MINE),
    "random": lambda: RandomFeatureDistance(frames=9),
    "mmd": lambda: PolynomialVideoMMD(Means(), frames=9),
    "unbiased": lambda: PolynomialVideoMMD(Means(), frames=9, unbiased=True),
}


class Means(nn.Module):
    """Mean colours, times a weight."""

    width = 3

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, clips):
        return clips.float().mean((2, 3, 4)) * self.weight


def clips_of(count, *, seed=0, frames=9, size=8, dark=1):
    draw = torch.Generator().manual_seed(seed)
    bright = torch.rand(count, 3, 1, 1, 1, generator=draw)
    noise = torch.rand(count, 3, frames, size, size, generator=draw)
    return (noise * bright * 255 / dark).to(torch.uint8)


def filled(metric, *, real=40, generated=36):
    for part in clips_of(real).split(16):
        metric.update(part, real=True)
    for part in clips_of(generated, seed=1, dark=2).split(10):
        metric.update(part, real=False)
    return metric


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_batches_do_not_matter(kind):
    many, once = filled(KINDS[kind]()), KINDS[kind]()
    once.update(clips_of(36, seed=1, dark=2), real=False)
    once.update(clips_of(40), real=True)
    assert many.compute().dtype == torch.float64
    assert many.compute().item() == pytest.approx(once.compute().item(), rel=1e-6)
    assert many.compute().item() > 0


def test_copies_and_reset(kind):
    metric = filled(KINDS[kind]())
    value = metric.compute().item()
    copied = metric.clone()
    assert copied.compute().item() == value
    assert copied.extractor is metric.extractor
    copied.update(clips_of(20, seed=3), real=False)
    assert copied.compute().item() != value == metric.compute().item()
    assert pickle.loads(pickle.dumps(metric)).compute().item() == value
    metric.reset()
    metric.update(clips_of(4), real=False)
    with pytest.raises(
        ValueError, match=r"needs 2 clips of each kind or more, got 0 real; call update\(clips, real=Tr"
    ):
        metric.compute()
    metric.reset()
    assert filled(metric).compute().item() == value


def test_sums_stay_float64_and_features_float32(kind):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.metric = KINDS[kind]()

    module = Module()
    module.metric.update(clips_of(40), real=True)
    module.to(torch.bfloat16).half().float()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        module.metric.update(clips_of(36, seed=1, dark=2), real=False)
    module.metric.update(clips_of(4, seed=2), real=True)
    whole = KINDS[kind]()
    for clips, real in ((clips_of(40), True), (clips_of(36, seed=1, dark=2), False), (clips_of(4, seed=2), True)):
        whole.update(clips, real=real)
    assert module.metric.real_outer.dtype == torch.float64
    assert module.metric.compute().item() == whole.compute().item()


class Evaluated(pl.LightningModule):
    """Logs a metric that it holds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.fvd = FrechetVideoDistance(Means(weight=7.0), MINE)

    def training_step(self, batch, _):
        return self.layer(batch).sum()

    def validation_step(self, batch, _):
        self.fvd.update(clips_of(12), real=True)
        self.fvd.update(clips_of(12, seed=1, dark=2), real=False)
        self.log("val/fvd", self.fvd, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_extractor_enters_no_checkpoint(tmp_path):
    module = Evaluated()
    data = torch.utils.data.DataLoader(torch.ones(2, 1))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data, data)
    assert float(trainer.callback_metrics["val/fvd"]) > 0
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == {"layer.weight", "layer.bias"}
    assert {name for name, _ in module.named_parameters()} == {"layer.weight", "layer.bias"}
    assert not list(module.fvd.children())
    assert module.fvd.extractor.weight == 7.0


def test_few_clips_are_told():
    metric = FrechetVideoDistance(Means(), MINE)
    filled(metric, real=3, generated=2)
    with pytest.warns(UserWarning, match="FrechetVideoDistance of 2 clips with 3 features: below the feature width"):
        metric.compute()
    strict = filled(FrechetVideoDistance(Means(), MINE, few="error"), real=3, generated=2)
    with pytest.raises(
        ValueError, match="must be 3 or more, as many as features, got 3 real and 2 generated; take mor"
    ):
        strict.compute()
    with pytest.raises(ValueError, match="few must be 'warn' or 'error', got 'ignore'"):
        FrechetVideoDistance(Means(), MINE, few="ignore")


def test_every_number_has_its_label():
    metric = FrechetVideoDistance(Means(), MINE)
    assert "N 0 real, 0 generated | 9 frames" in str(metric)
    filled(metric)
    line, record = metric.describe(), metric.record()
    weights = metric.weights
    assert weights.startswith("sha256 ")
    for part in (
        f"FrechetVideoDistance {record['value']:.4f} | ",
        "mine (9 frames, 64 clips, squash to 224, logits, covariance / N, batch-norm epsilon 0.001)",
        "resizing and output the extractor's own",
        "N 40 real, 36 generated",
        "9 frames, 8 x 8 pixels",
        f"Means, 3 features, weights {weights}",
    ):
        assert part in line
    assert record["clips"] == {"real": 40, "generated": 36}
    assert (record["frames"], record["size"], record["width"], record["weights"]) == (9, [9, 8, 8], 3, weights)
    assert json.loads(json.dumps(record)) == record
    assert "no FVD" in filled(RandomFeatureDistance()).describe()
    assert FrechetVideoDistance(Means(2.0), MINE).weights != weights


def test_real_statistics_from_a_file(kind, tmp_path):
    whole = filled(KINDS[kind]())
    whole.save_real(tmp_path / "deep" / "real.npz")
    part = KINDS[kind]()
    part.load_real(tmp_path / "deep" / "real.npz")
    part.update(clips_of(36, seed=1, dark=2), real=False)
    assert part.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)
    assert part.record()["clips"] == {"real": 40, "generated": 36}
    part.reset()
    assert part.moments(real=True).clips == 40
    with pytest.raises(ValueError, match="real must be False after load_real, got True"):
        part.update(clips_of(4), real=True)
    with pytest.raises(ValueError, match=r"as the first ones, got \(9, 4, 4\)"):
        part.update(clips_of(4, size=4), real=False)
    with pytest.raises(ValueError, match="load_real must come before real clips, got some"):
        whole.load_real(tmp_path / "deep" / "real.npz")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["real.npz"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda: FrechetVideoDistance(Means(), FVDProtocol("other", frames=9)), 'protocol "mine .*to be "other '),
        (lambda: FrechetVideoDistance(Means(), FVDProtocol("mine", frames=10, ddof=0, clips=64)), "frames 9, to be 10"),
        (lambda: FrechetVideoDistance(Means(2.0), MINE), r"weights 'sha256 \w+', to be 'sha256 \w+'; make them anew"),
        (lambda: FrechetVideoDistance(lambda c: c, MINE, width=4), "width 3, to be 4; weights 'sha256"),
        (lambda: PolynomialVideoMMD(Means(), frames=9), "unbiased None, to be False"),
    ],
)
def test_statistics_of_something_else(metric, message, tmp_path):
    filled(FrechetVideoDistance(Means(), MINE)).save_real(tmp_path / "real.npz")
    metric = metric()
    with pytest.raises(ValueError, match=message):
        metric.load_real(tmp_path / "real.npz")
    assert metric.moments(real=True).clips == 0


def test_statistics_of_another_size(tmp_path):
    filled(FrechetVideoDistance(Means(), MINE)).save_real(tmp_path / "real.npz")
    metric = FrechetVideoDistance(Means(), MINE)
    metric.update(clips_of(4, size=4), real=False)
    with pytest.raises(ValueError, match=r"size \[9, 8, 8\], to be \[9, 4, 4\]"):
        metric.load_real(tmp_path / "real.npz")


def test_files_that_are_no_statistics(tmp_path):
    metric = FrechetVideoDistance(Means(), MINE)
    with pytest.raises(ValueError, match=r"save_real needs real clips, got none"):
        metric.save_real(tmp_path / "real.npz")
    with pytest.raises(ValueError, match=r"statistics must be an existing file, got '.*nothing.npz' \(no such file\)"):
        metric.load_real(tmp_path / "nothing.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"a file that save_real wrote, got '.*{name}'"):
            metric.load_real(tmp_path / name)
    filled(metric).save_real(tmp_path / "real.npz")
    with np.load(tmp_path / "real.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "cut.npz", **{**arrays, "count": np.array(7.0)})
    np.savez(tmp_path / "old.npz", **{**arrays, "about": np.array(json.dumps({"format": "x"}))})
    with pytest.raises(ValueError, match="must be whole"):
        FrechetVideoDistance(Means(), MINE).load_real(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match="must have the format 'reco_lightning moments 1', got 'x'"):
        FrechetVideoDistance(Means(), MINE).load_real(tmp_path / "old.npz")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    sums = Moments.of(torch.ones(3, 2))
    save_moments(tmp_path / "real.npz", sums, {})
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_moments(tmp_path / "real.npz", sums + sums, {})
    assert [file.name for file in tmp_path.iterdir()] == ["real.npz"]
    assert load_moments(tmp_path / "real.npz", {})[0].clips == 3


@pytest.mark.parametrize(
    ("extractor", "width", "message"),
    [
        (3, 3, "extractor must be a function from clips to features, got int"),
        (lambda clips: clips, None, "width must be the number of features of a clip, 1 or more, got None"),
        (lambda clips: clips, 0, "width must be .* got 0"),
    ],
)
def test_extractors_that_are_none(extractor, width, message):
    with pytest.raises(ValueError, match=message):
        FrechetVideoDistance(extractor, MINE, width=width)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (lambda clips: clips.float().mean((2, 3, 4)), r"features of shape \(2, 4\), got \(2, 3\)"),
        (lambda clips: "x", r"features of shape \(2, 4\), got str"),
        (lambda clips: torch.full((len(clips), 4), torch.nan), "features must be finite"),
    ],
)
def test_features_that_do_not_fit(extractor, message):
    metric = FrechetVideoDistance(extractor, MINE, width=4)
    with pytest.raises(ValueError, match=message):
        metric.update(clips_of(2), real=True)
    assert metric.moments(real=True).clips == 0


def test_clips_that_do_not_fit():
    metric = FrechetVideoDistance(Means(), MINE)
    metric.update(clips_of(2), real=True)
    with pytest.raises(ValueError, match=r"T, H, W of \(9, 8, 8\), as the first ones, got \(9, 4, 4\)"):
        metric.update(clips_of(2, size=4), real=False)
    with pytest.raises(ValueError, match=r"must have 9 frames, got 10: .* cut longer videos"):
        metric.update(clips_of(2, frames=10), real=False)


def test_figure(kind):
    metric = filled(KINDS[kind]())
    fig, ax = metric.plot()
    assert ax.get_ylabel() == f"{type(metric).__name__} (lower is better)"
    assert metric.plot([metric.compute(), metric.compute()], ax)[1] is ax
    fig.clear()


def test_worse_clips_are_farther():
    real = clips_of(64)
    values = []
    for noise in (0, 20, 60):
        metric = RandomFeatureDistance()
        draw = torch.Generator().manual_seed(5)
        blur = torch.randint(-noise, noise + 1, real.shape, generator=draw)
        metric.update(real, real=True)
        metric.update((real.int() + blur).clamp(0, 255).to(torch.uint8), real=False)
        values.append(metric.compute().item())
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[0] < values[1] < values[2]
