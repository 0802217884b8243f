# SPDX-License-Identifier: Apache-2.0
"""From captions to text ids, by any tokenizer of transformers in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["caption_ids", "load_text_tokenizer", "trim_captions"]


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
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError('captions need transformers: pip install "reco_lightning[hf]"') from error
    if not any(Path(folder).glob("tokenizer*")):
        raise ValueError(
            f"tokenizer must be a folder of transformers with tokenizer.json or tokenizer.model, got {folder!r}, which "
            "holds neither"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def caption_ids(tokenizer: Any, captions: Sequence[str | None], *, max_tokens: int | None = None) -> torch.Tensor:
    """Turns captions into ids, padded in front.

    Args:
        tokenizer: A tokenizer of transformers; the ids that it adds by itself (as Llama's first one) are kept.
        captions: n texts; ``None`` is no caption, all padding.
        max_tokens: Longer captions lose their end; ``None`` keeps all.

    Returns:
        (n, C) int64, C that of the longest caption; -1 is padding.

    Example:
        >>> from types import SimpleNamespace
        >>> by_letters = lambda texts, **_: SimpleNamespace(input_ids=[[ord(c) - 97 for c in text] for text in texts])
        >>> caption_ids(by_letters, ["abc", None, "de"], max_tokens=2)
        tensor([[ 0,  1],
                [-1, -1],
                [ 3,  4]])
    """
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
