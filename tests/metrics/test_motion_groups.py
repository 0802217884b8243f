# SPDX-License-Identifier: Apache-2.0
"""Groups of motion: their borders, their manifest, and a metric in each."""

from __future__ import annotations

import json

import pytest
import torch
from torchmetrics import Metric

from reco_lightning.metrics.motion_groups import MotionGroups
from reco_lightning.metrics.motion_manifest import GROUPS, MotionManifest, measure_motion, motion_group
from reco_lightning.support.plots import group_bars
from tests.helpers.metrics import joined, moving

SIZE = (128, 128)
SPEEDS = {"low": 1, "medium": 4, "high": 8}


class MeanGap(Metric):
    """Difference of the mean grey levels of generated and real videos."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, videos, real):
        place = 0 if real else 1
        self.totals[place] += videos.double().mean((1, 2, 3, 4)).sum()
        self.counts[place] += len(videos)

    def compute(self):
        real, generated = self.totals / self.counts
        return generated - real


def video(group, level=None, seed=0):
    """A video of a group's speed, or a still one of one grey level."""
    if level is not None:
        return torch.full((1, 3, 3, *SIZE), level, dtype=torch.uint8)
    speed = SPEEDS[group]
    return moving(0, speed, 2 * speed, seed=seed)


def manifest(**changes):
    settings = {"size": (256, 256), "frames": 17, "stride": 1} | changes
    return MotionManifest({"a": 0.0, "b": 3.0, "c": 6.0, "é/d": 6.01, "e": 2.99}, **settings)


def test_borders_belong_to_the_middle():
    flows = torch.tensor([0.0, 2.999, 3.0, 4.5, 6.0, 6.001, 99.0])
    assert [GROUPS[number] for number in motion_group(flows)] == ["low"] * 2 + ["medium"] * 3 + ["high"] * 2


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    path = manifest().save(tmp_path / "new" / "motion.json")
    back = MotionManifest.load(path, size=(256, 256), frames=17, stride=1)
    assert back == manifest()
    assert back.counts() == {"low": 2, "medium": 2, "high": 1}
    assert back.groups(["é/d", "b", "b"]).tolist() == [2, 1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["motion.json"]
    record = json.loads(path.read_text())
    assert record["bounds"] == [3, 6]
    assert "pixels per frame" in record["measure"]
    assert record["farneback"]["winsize"] == 15


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": (128, 128)}, r"was measured with size=\(256, 256\), but size=\(128, 128\) is asked for; flow and"),
        ({"frames": 16}, "was measured with frames=17, but frames=16 is asked for"),
        ({"stride": 4}, "was measured with stride=1, but stride=4 is asked for"),
    ],
)
def test_a_manifest_measured_otherwise_is_refused(tmp_path, asked, message):
    path = manifest().save(tmp_path / "motion.json")
    with pytest.raises(ValueError, match=message):
        MotionManifest.load(path, **asked)


@pytest.mark.parametrize("name", ["bounds", "farneback", "measure"])
def test_a_manifest_of_other_groups_is_refused(tmp_path, name):
    path = manifest().save(tmp_path / "motion.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: None}))
    with pytest.raises(ValueError, match=f"was measured with {name}=None, but {name}="):
        MotionManifest.load(path)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"flows": {"a": "x"}}', '{"flows": []}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    path = tmp_path / "motion.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"path must be a file that MotionManifest\.save wrote, got .*motion\.json"):
        MotionManifest.load(path)


def test_unknown_clips_are_named():
    with pytest.raises(ValueError, match=r"which holds 5, got 'x' \(and 1 more unknown ones\)"):
        manifest().groups(["a", "x", "y"])


def test_measured_flows():
    clips = [(f"{group}.mp4", video(group)[0]) for group in GROUPS]
    found = measure_motion(clips, size=SIZE, stride=2)
    assert [found.flows[name] for name, _ in clips] == pytest.approx([1, 4, 8], rel=0.1)
    assert found.groups([name for name, _ in clips]).tolist() == [0, 1, 2]
    assert (found.size, found.frames, found.stride) == (SIZE, 3, 2)
    with pytest.raises(ValueError, match=r"clips must have different names, got 'low\.mp4' twice"):
        measure_motion([clips[0], clips[0]], size=SIZE)
    with pytest.raises(ValueError, match=r"clips must be one or more, all of one number of frames, got \[\]"):
        measure_motion([])
    with pytest.raises(ValueError, match=r"all of one number of frames, got \[2, 3\]"):
        measure_motion([clips[0], ("b", clips[0][1][:, :2])], size=SIZE)


def test_videos_are_sorted_by_their_own_flow():
    groups = MotionGroups(MeanGap(), size=SIZE, min_count=1)
    for seed, group in enumerate(("low", "high", "high", "medium")):
        groups.update(video(group, seed=seed), real=True)
    groups.update(torch.cat([video("high", seed=7), video("low", seed=8)]), real=False)
    found = groups.compute()
    assert found["real_count"].tolist() == [1, 1, 2]
    assert found["generated_count"].tolist() == [1, 0, 1]
    assert torch.isnan(found["medium"])
    own = MeanGap()
    own.update(torch.cat([video("high", seed=1), video("high", seed=2)]), real=True)
    own.update(video("high", seed=7), real=False)
    assert found["high"] == own.compute()


def fill(metric, rows):
    for real, group, level in rows:
        metric.update(video(None, level), real=real, groups=torch.tensor([group]))
    return metric


ROWS = [(True, 0, 10), (True, 0, 20), (False, 0, 40), (False, 0, 60), (True, 2, 5), (False, 2, 9), (True, 2, 7)]


def test_given_groups_hold_and_small_groups_are_nan():
    found = fill(MotionGroups(MeanGap()), ROWS).compute()
    assert found["low"].item() == 35
    assert torch.isnan(found["medium"])
    assert torch.isnan(found["high"])  # one generated video alone
    record = fill(MotionGroups(MeanGap(), size=SIZE, min_count=1), ROWS).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["of"] == "MeanGap"
    assert record["value"] == {"low": 35, "medium": None, "high": 3}
    assert record["clips"]["generated"] == {"low": 2, "medium": 0, "high": 1}
    assert (record["size"], record["bounds"]) == ([128, 128], [3, 6])


def test_two_processes_give_what_one_gives():
    one = fill(MotionGroups(MeanGap(), min_count=1), ROWS).compute()
    first = fill(MotionGroups(MeanGap(), min_count=1), ROWS[:3])  # met no video of high motion
    second = fill(MotionGroups(MeanGap(), min_count=1), ROWS[3:])
    found = joined(first, second)
    assert found["low"].item() == one["low"].item()
    assert found["high"].item() == one["high"].item()
    assert found["real_count"].tolist() == [2, 0, 2]


def test_reset_forgets_all_and_copies_are_apart():
    metric = MeanGap()
    groups = fill(MotionGroups(metric, min_count=1), ROWS)
    assert metric.counts.sum() == 0
    groups.compute()
    groups.reset()
    found = fill(groups, [(True, 0, 1), (False, 0, 2)]).compute()
    assert found["low"].item() == 1
    assert found["generated_count"].tolist() == [1, 0, 0]
    assert not groups.state_dict()


def test_bars_name_borders_counts_and_resolution():
    groups = fill(MotionGroups(MeanGap(), min_count=1), ROWS)
    fig, ax = groups.plot(y_label="FVD")
    assert fig is ax.figure
    heights = [float(bar.get_height()) for bar in ax.patches]
    assert (heights[0], heights[2]) == (35, 3)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [
        "low (< 3)\n2 real, 2 generated",
        "medium (3 to 6)\n0 real, 0 generated",
        "high (> 6)\n2 real, 1 generated",
    ]
    assert ax.get_xlabel() == "mean optical flow (pixels per frame at 256 x 256)"
    assert ax.get_ylabel() == "FVD"
    fig.canvas.draw()


def test_several_runs_stand_side_by_side():
    values = {"baseline": [1.0, 2.0], "ReCo": [0.5, float("nan")]}
    _, ax = group_bars(values, ["low", "high"], x_label="motion", y_label="FVD")
    lefts = [bar.get_x() for bar in ax.patches]
    assert lefts == pytest.approx([-0.4, 0.6, 0.0, 1.0])
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches}) == 2
    for wrong in ({}, {"baseline": [1.0]}):
        with pytest.raises(ValueError, match="values must hold 2 values, one a group, for each run, got lengths"):
            group_bars(wrong, ["low", "high"], x_label="motion", y_label="FVD")


def test_refusals():
    with pytest.raises(ValueError, match=r"metric must be a torchmetrics\.Metric, got str"):
        MotionGroups("fvd")
    with pytest.raises(ValueError, match="min_count must be a whole number of 1 or more, got 0"):
        MotionGroups(MeanGap(), min_count=0)
    groups = MotionGroups(MeanGap(), size=SIZE)
    with pytest.raises(ValueError, match=r"groups must be \(1,\) numbers from 0 to 2, one a video, got \[3\]"):
        groups.update(video("low"), real=True, groups=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"groups must be \(1,\) numbers .* got \[0, 1\] of shape \(2,\)"):
        groups.update(video("low"), real=True, groups=torch.tensor([0, 1]))
    with pytest.raises(NotImplementedError, match="MotionGroups measures sets of videos, not batches"):
        groups(video("low"), real=True)
