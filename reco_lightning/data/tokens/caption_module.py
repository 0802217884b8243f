# SPDX-License-Identifier: Apache-2.0
"""`CaptionDataModule`: batches of captions and video tokens from token shards."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Subset
from typing_extensions import override

from reco_lightning.data.tokens.caption_ids import caption_ids, load_text_tokenizer, trim_captions
from reco_lightning.data.tokens.module import Split, TokenDataModule
from reco_lightning.data.tokens.shards import TokenItem, TokenShards
from reco_lightning.support.argument_checks import check_int, check_path

__all__ = ["CaptionDataModule", "CaptionItem", "CaptionedClips"]


class CaptionItem(TypedDict):
    """One clip: `tokens` and `label` as in `TokenItem`, `caption` int64 (C,) with -1 in front as padding."""

    tokens: Tensor
    label: Tensor
    caption: Tensor


class CaptionedClips(Subset[Any]):
    """Some clips of token shards, each with the ids of its text.

    Args:
        shards: The shards.
        places: Of the clips in them.
        texts: Ids of the texts in `shards.manifest.captions`, (captions, C) int64.

    Example:
        >>> import tempfile
        >>> from reco_lightning.data.tokens.shards import TokenShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TokenShardWriter(folder, vocab_size=8, grid=(1, 1, 2)) as writer:
        ...         writer.write([[[[1, 2]]], [[[3, 4]]]], labels=[0, 0], captions=["a cat", None])
        ...     clips = CaptionedClips(TokenShards(folder), [1, 0], torch.tensor([[7, 5]]))
        ...     clips[0]["caption"], clips[1]["caption"]
        (tensor([-1, -1]), tensor([7, 5]))
    """

    def __init__(self, shards: TokenShards, places: list[int], texts: Tensor) -> None:
        super().__init__(shards, places)
        none = torch.full_like(texts[:1], -1)
        self.texts = torch.cat([texts, none])  # -1, no text, is the place of the last
        self.text_of = shards.table()[places, 5].tolist()

    @override
    def __getitem__(self, index: Any) -> CaptionItem:
        clip: TokenItem = self.dataset[self.indices[index]]
        return {**clip, "caption": self.texts[self.text_of[index]]}

    @override
    def __getitems__(self, indices: list[int]) -> list[CaptionItem]:  # what a DataLoader asks for, if it is there
        return [self[index] for index in indices]


class CaptionDataModule(TokenDataModule):
    """Training and validation batches of clips with captions.

    A batch is `{"tokens": int64 (B, N), "label": int64 (B,), "caption": int64 (B, C)}`, C that of the batch's longest
    caption, -1 padding in front. A clip without a text is all padding: it is learned without a caption.

    Args:
        folder: A folder that `reco tokenize` wrote from videos with captions.
        text_tokenizer: Folder of a tokenizer of transformers.
        max_caption_tokens: Longer captions lose their end; 1 or more.
        batch_size: As in `TokenDataModule`, like all that follows.
        num_workers: As in `TokenDataModule`.
        val_fraction: As in `TokenDataModule`.
        split: As in `TokenDataModule`.
        shuffle: As in `TokenDataModule`.
        seed: As in `TokenDataModule`.
        split_seed: As in `TokenDataModule`.
        drop_last: As in `TokenDataModule`.
        strict_resume: As in `TokenDataModule`.
        verify: As in `TokenDataModule`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> CaptionDataModule("tokens", text_tokenizer="llama").max_caption_tokens
        64
    """

    def __init__(
        self,
        folder: str,
        *,
        text_tokenizer: str,
        max_caption_tokens: int = 64,
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split: Split = "source",
        shuffle: bool = True,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = True,
        strict_resume: bool = True,
        verify: bool = False,
    ) -> None:
        super().__init__(
            folder,
            batch_size=batch_size,
            num_workers=num_workers,
            val_fraction=val_fraction,
            split=split,
            shuffle=shuffle,
            seed=seed,
            split_seed=split_seed,
            drop_last=drop_last,
            strict_resume=strict_resume,
            verify=verify,
        )
        check_path(text_tokenizer=text_tokenizer)
        check_int(at_least=1, max_caption_tokens=max_caption_tokens)
        self.text_tokenizer, self.max_caption_tokens = text_tokenizer, max_caption_tokens

    @override
    def setup(self, stage: str) -> None:
        """Opens the shards, splits them, and turns each of their texts into ids, once.

        Args:
            stage: As in `TokenDataModule`.

        Raises:
            ValueError: As in `TokenDataModule`; or the shards hold no texts, or the text tokenizer has ids that the
                model's network has not.
        """
        super().setup(stage)
        captions = self.shards.manifest.captions
        if not captions:
            raise ValueError(
                f"folder must hold token shards with captions, got {self.folder!r}, which has none; tokenise again "
                "with --captions or a manifest that holds captions"
            )
        tokenizer = load_text_tokenizer(self.text_tokenizer)
        texts = caption_ids(tokenizer, list(captions), max_tokens=self.max_caption_tokens)
        network = getattr(getattr(self.trainer, "lightning_module", None), "network", None)
        known = getattr(network, "text_ids", None)
        if known is not None and int(texts.max()) >= known:
            raise ValueError(
                f"text_tokenizer must be the language model's own, of ids below {known}, got id {int(texts.max())} "
                f"from {self.text_tokenizer}"
            )
        self.train_set = CaptionedClips(self.shards, list(self.train_set.indices), texts)
        self.val_set = CaptionedClips(self.shards, list(self.val_set.indices), texts)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Cuts the captions of a batch to the longest of them."""
        if isinstance(batch, dict) and "caption" in batch:
            return batch | {"caption": trim_captions(batch["caption"])}
        return batch
