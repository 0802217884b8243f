# SPDX-License-Identifier: Apache-2.0
"""A file is the old one until the new one is whole."""

from __future__ import annotations

import stat

import pytest

from reco_lightning.support.atomic_write import atomic_write


def test_the_old_file_stands_until_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("begun", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, begun):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(part):
        if begun:
            part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), atomic_write(path) as part:
        fail(part)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet_and_the_last_one_stays(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as one:
        one.write_text("one")
        with atomic_write(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("a")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "other")]
    assert modes[0] == modes[1]


def test_a_name_as_long_as_names_may_be(tmp_path):
    with atomic_write(tmp_path / ("a" * 255)) as part:
        part.write_text("a")
    assert (tmp_path / ("a" * 255)).read_text() == "a"
