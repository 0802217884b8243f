# SPDX-License-Identifier: Apache-2.0
"""A text tokenizer of a handful of words, saved as transformers saves any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_words(folder: Path, words: Sequence[str]) -> str:
    """Writes a tokenizer whose id i is ``words[i]``, and the next id anything else; returns its folder."""
    ids = {word: place for place, word in enumerate((*words, "[UNK]"))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)
