# SPDX-License-Identifier: Apache-2.0
"""Moving digits: pictures, motion, codebook and tokens against hand-made ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from reco_lightning.experiments.study.digits import (
    CANVAS,
    PATCH,
    VOCABULARY,
    MovingDigits,
    codebook,
    decode,
    digit_sets,
    encode,
    place,
    shuffled,
)

MOVES = {(0, 1), (1, 0), (0, -1), (-1, 0)}


def frames_of(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(len(tokens), -1, 4, 4)


def test_training_and_held_out_digits_are_all_digits_and_share_none() -> None:
    from sklearn.datasets import load_digits

    train, held_out = digit_sets()
    assert train.shape == (1437, 8, 8)
    assert held_out.shape == (360, 8, 8)
    everything = sorted(picture.tobytes() for picture in np.concatenate([train, held_out]))
    assert everything == sorted(picture.tobytes() for picture in (load_digits().images / 16).astype(np.float32))
    assert not {picture.tobytes() for picture in train} & {picture.tobytes() for picture in held_out}


def test_a_picture_is_placed_as_by_hand() -> None:
    picture = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    clip = place(picture, np.array([[[2, 3], [10, -1]]]))
    by_hand = np.zeros((2, CANVAS, CANVAS), np.float32)
    for row in range(8):
        for column in range(8):
            by_hand[0, (row + 2) % 12, (column + 3) % 12] = picture[0, row, column]
            by_hand[1, (row + 10) % 12, (column - 1) % 12] = picture[0, row, column]
    assert np.array_equal(clip[0], by_hand)


@pytest.mark.slow
def test_the_codebook_is_fixed_sorted_and_of_pixels() -> None:
    book = codebook()
    codebook.cache_clear()
    assert np.array_equal(codebook(), book)
    assert book.shape == (VOCABULARY, PATCH * PATCH)
    assert (np.diff(book.sum(1)) >= 0).all()
    assert book.min() >= -1e-6
    assert book.max() <= 1 + 1e-6


def test_tokens_are_the_nearest_patches_by_time_rows_and_columns() -> None:
    clips = np.random.default_rng(0).random((2, 3, CANVAS, CANVAS), dtype=np.float32)
    book, tokens = codebook(), encode(clips)
    assert tokens.shape == (2, 48)
    for clip in range(2):
        for number in range(48):
            frame, row, column = number // 16, number // 4 % 4 * 3, number % 4 * 3
            patch = clips[clip, frame, row : row + 3, column : column + 3].reshape(-1)
            assert tokens[clip, number] == np.square(book - patch).sum(1).argmin()


def test_decoded_tokens_are_near_the_clips_and_encode_to_themselves() -> None:
    clips = place(digit_sets()[1][:64], np.random.default_rng(0).integers(12, size=(64, 2, 2)))
    tokens = encode(clips)
    decoded = decode(tokens)
    assert decoded.shape == clips.shape
    assert np.square(decoded - clips).mean() < 0.15 * clips.var()
    assert np.array_equal(encode(decoded), tokens)


@pytest.mark.parametrize(("motion", "rest"), [("slow", 4), ("fast", 2)])
def test_a_clip_moves_one_way_by_a_patch_in_every_nth_frame(motion: str, rest: int) -> None:
    frames = frames_of(MovingDigits(9, motion=motion)[0:300])  # type: ignore[arg-type]
    seen = set()
    for clip in frames:
        moved = [k for k in range(1, 9) if not np.array_equal(clip[k], clip[k - 1])]
        assert len(moved) == 8 // rest
        assert (np.diff(moved) == rest).all()
        ways = [{way for way in MOVES if np.array_equal(np.roll(clip[k - 1], way, (0, 1)), clip[k])} for k in moved]
        both = set.intersection(*ways)
        assert both
        seen |= both
    assert seen == MOVES


def test_a_clip_is_a_function_of_seed_and_number_alone() -> None:
    whole = MovingDigits(3, seed=4)[0:600]
    assert np.array_equal(MovingDigits(3, seed=4)[250:270], whole[250:270])
    assert not np.array_equal(MovingDigits(3, seed=5)[0:10], whole[:10])
    assert not np.array_equal(MovingDigits(3, seed=4, held_out=True)[0:10], whole[:10])
    assert len({clip.tobytes() for clip in whole}) > 590


def test_a_fixed_number_of_clips_comes_again_in_another_order() -> None:
    digits = MovingDigits(2, clips=40, seed=1)
    first, second = digits[0:40], digits[40:80]
    assert not np.array_equal(first, second)
    assert sorted(clip.tobytes() for clip in first) == sorted(clip.tobytes() for clip in second)
    assert np.array_equal(digits[35:45], np.concatenate([first[35:], second[:5]]))
    assert sorted(shuffled(np.arange(80), 40, 1).tolist()) == sorted([*range(40), *range(40)])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="motion must be one of 'slow', 'fast', got 'still'"):
        MovingDigits(5, motion="still")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks must be a whole number of 1 or more, got 0"):
        MovingDigits(0)
    with pytest.raises(ValueError, match="clips must be a whole number of 1 or more or None, got True"):
        MovingDigits(5, clips=True)
    with pytest.raises(ValueError, match="seed must be a whole number of 0 or more, got -1"):
        MovingDigits(5, seed=-1)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    digit_sets.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "reco_lightning\[study\]"'):
        digit_sets()
