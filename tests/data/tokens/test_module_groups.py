# SPDX-License-Identifier: Apache-2.0
"""Shards of UCF101: what was cut from one recording is validated on together, as by `VideoDataModule`."""

from __future__ import annotations

import numpy as np
import pytest

from reco_lightning.data.clips.folder import Clip
from reco_lightning.data.clips.module import split_clips
from reco_lightning.data.index.ucf101 import group_of
from reco_lightning.data.tokens.module import TokenDataModule, split_by_source, split_by_time, split_shards
from reco_lightning.data.tokens.shards import ClipSource, TokenShards, TokenShardWriter

NAMES = [
    f"{kind}/v_{kind}_g{group:02d}_c{part:02d}.avi"
    for kind in ("Diving", "Rowing")
    for group in (1, 2, 3, 4)
    for part in (1, 2)
]


def write(folder, names=NAMES, layout="ucf101"):
    clips = [(name, start) for name in names for start in (0, 9)]
    with TokenShardWriter(folder, vocab_size=8, grid=(1, 1, 2), video={"layout": layout}) as writer:
        sources = [ClipSource(name, start, start + 9) for name, start in clips]
        writer.write(np.zeros((len(clips), 1, 1, 2), np.int64), sources=sources)
    return TokenShards(folder), clips


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_groups_are_those_that_the_video_module_holds_out(tmp_path, seed, fraction):
    shards, clips = write(tmp_path)
    groups = {name: group_of(name) for name in NAMES}
    expected = split_clips([Clip(*clip, 0) for clip in clips], val_fraction=fraction, span=9, seed=seed, groups=groups)
    assert split_shards(shards, "source", val_fraction=fraction, seed=seed) == expected
    module = TokenDataModule(str(tmp_path), val_fraction=fraction, split_seed=seed)
    module.setup("fit")
    assert (module.train_set.indices, module.val_set.indices) == expected
    sides = [{group_of(shards.source(place).path) for place in side} for side in expected]
    assert not sides[0] & sides[1]


def test_other_layouts_and_the_split_by_time_know_no_groups(tmp_path):
    shards, _ = write(tmp_path / "ucf101")
    plain, _ = write(tmp_path / "folders", layout="folders")
    assert split_shards(plain, "source", val_fraction=0.25) == split_by_source(plain.table(), val_fraction=0.25)
    assert split_shards(plain, "source", val_fraction=0.25) != split_shards(shards, "source", val_fraction=0.25)
    assert split_shards(shards, "time", val_fraction=0.5) == split_by_time(shards.table(), val_fraction=0.5)


def test_one_group_alone_cannot_be_parted_and_one_file_is_split_by_time(tmp_path):
    shards, _ = write(tmp_path / "group", NAMES[:2])
    with pytest.raises(
        ValueError, match=r"val_fraction must be 0 where all videos are of one group, .* \(g01\), got 0.5"
    ):
        split_shards(shards, "source", val_fraction=0.5)
    assert split_shards(shards, "source", val_fraction=0) == ([0, 1, 2, 3], [])
    single, _ = write(tmp_path / "file", NAMES[:1])
    assert split_shards(single, "source", val_fraction=0.5) == ([0], [1])
