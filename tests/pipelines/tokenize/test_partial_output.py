# SPDX-License-Identifier: Apache-2.0
"""Ids on their way to shards: what was written is found again, what was cut off or damaged is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reco_lightning.pipelines.tokenize.partial_output import PartialTokens, difference

GRID = (2, 1, 2)


def make(folder, *, clips=6, vocab_size=100):
    work = PartialTokens(folder / "work", grid=GRID, vocab_size=vocab_size, clips=clips)
    work.begin({"frames": 17, "videos": {"a.mp4": "9 bytes"}})
    return work


def ids_of(*clips, vocab_size=100):
    """Every clip has ids of its own."""
    return np.array([[(7 * clip + place) % vocab_size for place in range(4)] for clip in clips], np.int64).reshape(
        -1, *GRID
    )


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_files_of_several_processes_and_starts_are_one_whole(tmp_path, vocab_size):
    work = make(tmp_path, vocab_size=vocab_size)
    with work.part() as one, work.part() as two:
        one.append([4, 1], ids_of(4, 1))
        two.append([5], ids_of(5))
        two.append([1], ids_of(1))  # twice
        two.fail(3, "is empty")
        one.append([], ids_of())
    work.begin({"frames": 17, "videos": {"a.mp4": "9 bytes"}})
    with work.part() as three:
        three.append([0], np.full((1, *GRID), vocab_size - 1))
        assert work.records() == 5
    found = work.read()
    assert found.done.tolist() == [True, True, False, False, True, True]
    assert np.array_equal(found.ids([5, 1, 4]), ids_of(5, 1, 4))
    assert found.ids([0]).max() == vocab_size - 1
    assert work.failures() == {3: "is empty"}
    assert len(list(work.folder.glob("part-*.bin"))) == 3
    work.remove()
    assert not work.folder.exists()


def test_a_record_that_is_cut_off_or_damaged_does_not_count(tmp_path):
    work = make(tmp_path)
    with work.part() as part:
        part.append([0, 1, 2, 3], ids_of(0, 1, 2, 3))
        part.fail(4, "is empty")
        part.fail(5, "is empty")
    size = work.record.itemsize
    assert size == 4 + 8 + 4 * 2
    path = work.folder / "part-00000.bin"
    content = bytearray(path.read_bytes())
    content[1 * size + 4] ^= 1  # a clip's number
    content[2 * size + 13] ^= 1  # an id
    path.write_bytes(content[:-1])
    assert work.read().done.tolist() == [True, False, False, False, False, False]
    reasons = path.with_suffix(".failed")
    reasons.write_text(reasons.read_text()[:-3])
    assert work.failures() == {4: "is empty"}
    path.write_bytes(b"")
    assert not work.read().done.any()
    path.write_bytes(bytes(3 * size))  # what a file system may leave after a power cut
    assert not work.read().done.any()


def test_ids_that_do_not_fit_are_refused_at_once(tmp_path):
    work = make(tmp_path)
    with work.part() as part:
        with pytest.raises(ValueError, match="ids must be 0 to 99, got 100 in clip 0"):
            part.append([0], np.full((1, *GRID), 100))
        with pytest.raises(ValueError, match=r"ids must have shape \(n, 2, 1, 2\), got \(1, 4\)"):
            part.append([0], np.zeros((1, 4), int))
        with pytest.raises(ValueError, match="ids must be those of the 2 clips encoded, got 1"):
            part.append([0, 1], ids_of(0))
    assert work.records() == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"frames": 9, "videos": {"a.mp4": "9 bytes"}}, "frames was 17 and is 9"),
        ({"frames": 17, "videos": {"a.mp4": "8 bytes"}}, "videos a.mp4 was 9 bytes and is 8 bytes"),
        ({"frames": 17, "videos": {}}, "videos a.mp4 was 9 bytes and is not there"),
        ({"frames": 17, "videos": {"a.mp4": "9 bytes", "b": ""}}, "videos b was not there and is "),
        ({"frames": 17, "videos": {"a.mp4": "9 bytes"}, "size": (8, 8)}, r"size was not there and is \[8, 8\]"),
    ],
)
def test_another_plan_is_refused_or_begun_anew(tmp_path, plan, message):
    work = make(tmp_path)
    with work.part() as part:
        part.append([0], ids_of(0))
    with pytest.raises(ValueError, match=rf"settings must be those .*work, but {message}; restore"):
        work.begin(plan)
    assert work.records() == 1
    work.begin(plan, anew=True)
    assert work.records() == 0
    work.begin(plan)


def test_the_same_plan_is_gone_on_with_also_where_a_new_beginning_is_allowed(tmp_path):
    work = make(tmp_path)
    with work.part() as part:
        part.append([0], ids_of(0))
    work.begin({"frames": 17, "videos": {"a.mp4": "9 bytes"}}, anew=True)
    assert work.records() == 1


def test_a_plan_of_another_version_or_damaged_is_refused(tmp_path):
    work = make(tmp_path)
    path = work.folder / "plan.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), "version": 2}))
    with pytest.raises(ValueError, match="version was 2 and is 1"):
        make(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"format was not there and is reco_lightning\.unfinished_tokens"):
        make(tmp_path)


def test_what_is_left_without_a_plan_is_thrown_away(tmp_path):
    work = make(tmp_path)
    with work.part() as part:
        part.append([0], ids_of(0))
    (work.folder / "plan.json").unlink()  # as if its removal had been cut off
    assert make(tmp_path).records() == 0


def test_equal_plans_do_not_differ():
    assert difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == ""
