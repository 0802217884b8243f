# SPDX-License-Identifier: Apache-2.0
"""Converts captions to text ids with a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reco_lightning.support.argument_checks import check_int, check_path

__all__ = ["caption_ids", "check_captions", "load_text_tokenizer", "trim_captions"]


def load_text_tokenizer(folder: str) -> Any:
    """Loads a text tokenizer; nothing is downloaded, and no code of the folder is run.

    Args:
        folder: Folder of a tokenizer of transformers, such as that of a language model.

    Returns:
        The tokenizer.

    Raises:
        ImportError: If transformers is missing.
        ValueError: If the folder holds none.
    """
    check_path(tokenizer=folder)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError('captions need transformers: pip install "reco_lightning[hf]"') from error
    if not any(Path(folder).glob("tokenizer*")):
        raise ValueError(
            f"tokenizer must be a folder of transformers with tokenizer.json or tokenizer.model, got {folder!r}, which "
            "holds neither"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises a plain Exception
        raise ValueError(
            f"tokenizer must be a folder of transformers with tokenizer.json or tokenizer.model, got {folder!r}, which "
            f"cannot be read: {error}"
        ) from error


def check_captions(captions: Sequence[str | None]) -> None:
    """Raises unless the captions are a sequence of texts; a single text is rejected.

    Args:
        captions: Texts, or None in the place of one.

    Raises:
        ValueError: It is something else.

    Example:
        >>> check_captions(["A cat.", None])
        >>> check_captions("A cat.")
        Traceback (most recent call last):
        ValueError: captions must be a sequence of texts, got 'A cat.'
    """
    listed = isinstance(captions, Sequence) and not isinstance(captions, (str, bytes))
    if not listed or not all(caption is None or isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be a sequence of texts, got {captions!r}")


def caption_ids(tokenizer: Any, captions: Sequence[str | None], *, max_tokens: int | None = None) -> torch.Tensor:
    """Turns captions into ids, padded in front.

    Args:
        tokenizer: A tokenizer of transformers; the ids that it adds by itself (as Llama's first one) are kept.
        captions: n texts; ``None`` is no caption, all padding.
        max_tokens: Longer captions lose their end, 1 or more; ``None`` keeps all.

    Returns:
        (n, C) int64, C that of the longest caption; -1 is padding.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from types import SimpleNamespace
        >>> by_letters = lambda texts, **_: SimpleNamespace(input_ids=[[ord(c) - 97 for c in text] for text in texts])
        >>> caption_ids(by_letters, ["abc", None, "de"], max_tokens=2)
        tensor([[ 0,  1],
                [-1, -1],
                [ 3,  4]])
    """
    check_captions(captions)
    check_int(at_least=1, or_none=True, max_tokens=max_tokens)
    if not callable(tokenizer):
        raise ValueError(f"tokenizer must be a tokenizer of transformers, got {tokenizer!r}")
    texts = [caption for caption in captions if caption is not None]
    found = iter(tokenizer(texts).input_ids if texts else [])
    rows = [[] if caption is None else next(found)[:max_tokens] for caption in captions]
    ids = torch.full((len(rows), max(map(len, rows), default=0)), -1)
    for line, row in zip(ids, rows, strict=True):
        line[len(line) - len(row) :] = torch.tensor(row, dtype=torch.long)
    return ids


def trim_captions(captions: torch.Tensor) -> torch.Tensor:
    """Leaves out columns that are padding in every row.

    Args:
        captions: (B, C) int64.

    Returns:
        (B, C') int64, C' at most C.

    Example:
        >>> trim_captions(torch.tensor([[-1, -1, 5], [-1, 3, 4]]))
        tensor([[-1,  5],
                [ 3,  4]])
    """
    return captions[:, (captions >= 0).any(dim=0)]
