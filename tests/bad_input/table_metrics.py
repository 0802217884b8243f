# SPDX-License-Identifier: Apache-2.0
"""The table of bad input: metrics and figures."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from reco_lightning import metrics
from reco_lightning.metrics.clip_score import clip_score
from reco_lightning.metrics.position_loss import position_loss
from reco_lightning.support.plots import (
    frame_scores,
    group_bars,
    interval_curves,
    log_figure,
    loss_curves,
    position_cross_entropy,
)
from tests.bad_input.samples import (
    CLIPS,
    FEATURES,
    WRONG_CLIPS,
    WRONG_FEATURES,
    Encoder,
    batch,
    fixed,
    flat,
    flow_manifest,
    folder,
    i3d,
    network,
    nothing,
    script_file,
)
from tests.bad_input.strategies import (
    INTERVALS,
    NO_TENSOR,
    PAIR,
    PATH,
    PROTOCOL,
    SAMPLING,
    SWITCH,
    TEXT,
    TEXTS,
    Entry,
    Wrong,
    choice,
    number,
    tensors,
    values,
    whole,
)

__all__ = ["METRICS"]

ROWS = values(None, 3, "ab", [1], {"a": None}, {"a": ["b"]}, {"a": 3}, {"a": [[1, 2, 3]]})
LABEL = {"y_label": TEXT}
PLOTS: tuple[tuple[Any, dict[str, Any], dict[str, Wrong]], ...] = (
    (loss_curves, {"curves": {"a": [(0, 1)]}}, {"curves": ROWS, "x_label": TEXT, **LABEL}),
    (
        position_cross_entropy,
        {"values": {"a": [1, 2]}, "tokens_per_block": 2},
        {"values": ROWS, "tokens_per_block": whole(1, 2), **LABEL},
    ),
    (
        interval_curves,
        {"intervals": [1, 2], "curves": {"real data": [1, 2]}, "y_label": "PSNR"},
        {"intervals": values(None, 3, "12", [1.5], [True], ["1"]), "curves": ROWS, "real": TEXT, **LABEL},
    ),
    (
        group_bars,
        {"values": {"a": [1]}, "groups": ["low"], "x_label": "motion", "y_label": "distance"},
        {"values": ROWS, "groups": TEXTS, "x_label": TEXT, **LABEL},
    ),
    (frame_scores, {"scores": {"a": [1]}, "y_label": "score"}, {"scores": ROWS, **LABEL}),
)

METRICS: tuple[Entry, ...] = (
    Entry("RandomConvFeatures", metrics.RandomConvFeatures, nothing, {"seed": whole(), "width": whole(1)}),
    Entry(
        "RandomFeatureDistance",
        metrics.RandomFeatureDistance,
        nothing,
        {"frames": whole(1, optional=True), "seed": whole()},
    ),
    Entry(
        "TorchScriptFeatures",
        metrics.TorchScriptFeatures,
        lambda: {"path": script_file()},
        {
            "path": st.one_of(PATH, values("nothing.pt", "/dev/null")),
            "protocol": PROTOCOL,
            "width": whole(1),
            "batch_size": whole(1),
        },
    ),
    Entry(
        "FrechetVideoDistance",
        metrics.FrechetVideoDistance,
        lambda: {"extractor": flat()},
        {
            "extractor": values(None, 3, [], "nothing.pt"),
            "protocol": PROTOCOL,
            "width": whole(1, optional=True),
            "few": choice(),
        },
    ),
    Entry(
        "PolynomialVideoMMD",
        metrics.PolynomialVideoMMD,
        lambda: {"extractor": flat()},
        {
            "extractor": values(None, 3, "weights.pt"),
            "frames": whole(1, optional=True),
            "width": whole(1, optional=True),
            "unbiased": SWITCH,
        },
    ),
    Entry(
        "frechet_distance",
        metrics.frechet_distance,
        fixed(real=FEATURES, generated=FEATURES),
        {"real": WRONG_FEATURES, "generated": WRONG_FEATURES, "ddof": whole(0, 1)},
        {"real": "features", "generated": "features"},
    ),
    Entry(
        "polynomial_mmd",
        metrics.polynomial_mmd,
        fixed(real=FEATURES, generated=FEATURES),
        {"real": WRONG_FEATURES, "generated": WRONG_FEATURES, "unbiased": SWITCH},
        {"real": "features", "generated": "features"},
    ),
    Entry(
        "frechet_video_distance",
        metrics.frechet_video_distance,
        lambda: {
            "real": CLIPS.repeat(1, 1, 6, 1, 1)[:, :, :16],
            "generated": CLIPS.repeat(1, 1, 6, 1, 1)[:, :, :16],
            "extractor": flat(),
        },
        {
            "real": WRONG_CLIPS,
            "generated": WRONG_CLIPS,
            "extractor": values(None, 3, "weights.pt"),
            "protocol": PROTOCOL,
        },
        {"real": "clips", "generated": "clips"},
    ),
    Entry(
        "fvd_extractor",
        lambda **arguments: metrics.fvd_extractor(**{"path": "nowhere", "protocol": "styleganv"} | arguments),
        None,
        {"path": st.one_of(PATH, values("nothing.pt", "/dev/null")), "protocol": PROTOCOL},
    ),
    Entry("fvd_protocol", metrics.fvd_protocol, fixed(protocol="styleganv"), {"protocol": PROTOCOL}),
    Entry(
        "FVDProtocol",
        metrics.FVDProtocol,
        fixed(name="own", frames=16),
        {
            "name": TEXT,
            "frames": whole(9),
            "clips": whole(1),
            "resize": choice(),
            "output": choice(),
            "ddof": whole(0, 1),
            "norm_epsilon": number(0, open_ends="l"),
            "place": choice(),
        },
    ),
    Entry("InceptionI3D", metrics.InceptionI3D, nothing, {"norm_epsilon": number(0, open_ends="l")}),
    Entry(
        "I3DFeatures",
        metrics.I3DFeatures,
        lambda: {"network": i3d(), "weights": "none"},
        {"network": values(None, 3, torch.nn.Linear(1, 1)), "protocol": PROTOCOL, "batch_size": whole(1)},
    ),
    Entry(
        "load_i3d",
        lambda **arguments: metrics.load_i3d(**{"path": "nowhere"} | arguments),
        None,
        {
            "path": st.one_of(PATH, values("nothing.pt", "/dev/null")),
            "protocol": PROTOCOL,
            "batch_size": whole(1),
        },
    ),
    Entry("IntervalPSNR", metrics.IntervalPSNR, nothing, {"intervals": INTERVALS, "pairs": choice()}),
    Entry("IntervalOpticalFlow", metrics.IntervalOpticalFlow, nothing, {"intervals": INTERVALS, "pairs": choice()}),
    *(
        Entry(
            call.__name__,
            call,
            fixed(videos=CLIPS, intervals=(1, 2)),
            {"videos": WRONG_CLIPS, "intervals": st.one_of(INTERVALS, values([3])), "pairs": choice()},
        )
        for call in (metrics.interval_psnr, metrics.interval_optical_flow)
    ),
    Entry("mean_flow", metrics.mean_flow, fixed(videos=CLIPS), {"videos": WRONG_CLIPS, "size": PAIR.filter(bool)}),
    Entry(
        "MotionGroups",
        metrics.MotionGroups,
        lambda: {"metric": torchmetrics.MeanMetric()},
        {"metric": values(None, 3, "fvd"), "size": PAIR, "min_count": whole(1)},
    ),
    Entry(
        "MotionManifest.load",
        metrics.MotionManifest.load,
        flow_manifest,
        {"path": st.one_of(PATH, values("nothing.json", "/dev/null"))},
    ),
    Entry(
        "measure_motion",
        metrics.measure_motion,
        lambda: {"clips": [("a", CLIPS[0])]},
        {"clips": values([]), "size": PAIR, "stride": whole(1)},
    ),
    Entry(
        "motion_group",
        metrics.motion_group,
        fixed(flow=torch.zeros(2)),
        {"flow": NO_TENSOR},
    ),
    Entry(
        "PositionLoss",
        metrics.PositionLoss,
        fixed(num_tokens=4, tokens_per_block=2),
        {"num_tokens": whole(1), "tokens_per_block": whole(1, 4)},
    ),
    Entry(
        "measure_position_loss",
        metrics.measure_position_loss,
        lambda: {"model": network(), "batches": [batch()]},
        {
            "model": values(None, 3, "network"),
            "batches": values(None, 3),
            "metric": values(3, "loss"),
        },
    ),
    Entry(
        "generated_batches",
        lambda **arguments: list(metrics.generated_batches(**arguments)),
        lambda: {"model": network(), "batches": [batch()]},
        {
            **{name: wrong for name, wrong in SAMPLING.items() if name != "cfg_scale"},
            "model": values(None, 3, "network"),
            "batches": values(None, 3),
            "given_blocks": whole(0, 1),
            "first_index": whole(0),
        },
    ),
    Entry("CLIP", metrics.CLIP, None, {"folder": st.one_of(PATH, values("nowhere"))}),
    Entry(
        "CLIPScore",
        metrics.CLIPScore,
        lambda: {"encoder": Encoder(), "frames": 2},
        {"encoder": values(None, 3, b"a", [], "nowhere.clip"), "frames": whole(1)},
    ),
    Entry(
        "position_loss",
        position_loss,
        fixed(logits=torch.zeros(1, 2, 4), targets=torch.zeros(1, 2).long()),
        {
            "logits": tensors(torch.zeros(2, 4), torch.zeros(1, 3, 4)),
            "targets": tensors(torch.zeros(2).long(), torch.zeros(1, 3).long()),
        },
    ),
    Entry(
        "clip_score",
        clip_score,
        lambda: {"videos": CLIPS, "texts": ["a", "b"], "encoder": Encoder(), "frames": 1},
        {
            "videos": WRONG_CLIPS,
            "texts": values(None, 3, ["a"], [3, 4]),
            "encoder": values(None, 3, "clip"),
            "frames": whole(1, 3),
        },
    ),
    *(
        Entry(
            call.__name__,
            call,
            fixed(**given),
            {**dict.fromkeys(given, values(None, 3)), **wrong, "ax": values(3, "ax")},
        )
        for call, given, wrong in PLOTS
    ),
    Entry(
        "log_figure",
        lambda **arguments: log_figure(Trainer(accelerator="cpu", logger=False), **arguments),
        lambda: {"key": "loss", "fig": loss_curves({"a": [(0, 1)]})[0], "path": folder() / "loss.png"},
        {"key": TEXT, "path": PATH},
    ),
    Entry(
        "MomentMetric.load_real",
        lambda path: metrics.RandomFeatureDistance().load_real(path),
        None,
        {"path": st.one_of(PATH, values("nothing.npz"))},
        {"path": "statistics"},
    ),
)
