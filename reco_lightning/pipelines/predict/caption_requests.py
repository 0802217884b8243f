# SPDX-License-Identifier: Apache-2.0
"""`CaptionRequests`: a request for a video for each line of a text file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from reco_lightning.data.index.text_lines import read_lines
from reco_lightning.data.tokens.caption_ids import caption_ids, load_text_tokenizer, trim_captions
from reco_lightning.models.sampling.token_sampling import SamplingOptions
from reco_lightning.support.argument_checks import check_int, check_path

__all__ = ["CaptionRequests"]


class CaptionRequests(pl.LightningDataModule):
    """Requests for videos, as batches for `TextVideoModel.predict_step`; `VideoWriter` writes what comes back.

    Args:
        captions: Text file with a caption in each line; an empty line asks for a video without a caption.
        text_tokenizer: Folder of the text tokenizer of the training.
        max_caption_tokens: As in the training; longer captions lose their end.
        videos_per_caption: Videos for each caption, 1 or more; line i is of the videos i n to i n + n - 1.
        batch_size: Videos sampled side by side in a process, 1 or more.
        sampling: The fields of `SamplingOptions` by name.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> CaptionRequests("captions.txt", text_tokenizer="llama", cfg_scale=3.0).options["cfg_scale"]
        3.0
    """

    def __init__(
        self,
        captions: str,
        *,
        text_tokenizer: str,
        max_caption_tokens: int = 64,
        videos_per_caption: int = 1,
        batch_size: int = 16,
        **sampling: Any,
    ) -> None:
        super().__init__()
        check_path(captions=captions, text_tokenizer=text_tokenizer)
        check_int(
            at_least=1,
            max_caption_tokens=max_caption_tokens,
            videos_per_caption=videos_per_caption,
            batch_size=batch_size,
        )
        self.captions, self.text_tokenizer = captions, text_tokenizer
        self.max_caption_tokens, self.videos_per_caption = max_caption_tokens, videos_per_caption
        self.batch_size = batch_size
        options = SamplingOptions(**sampling)  # in a line of its own: jsonargparse reads the options' names off it
        self.options = {**asdict(options), "context_blocks": None}  # VideoWriter decodes by context_blocks

    @override
    def setup(self, stage: str) -> None:
        """Reads the captions and turns them into ids.

        Args:
            stage: `predict`.

        Raises:
            ValueError: If there is no such file, or it is empty.
        """
        path = Path(self.captions)
        lines = read_lines(path, argument="captions") if path.is_file() else []
        if not lines:
            raise ValueError(
                f"captions must be a text file with a caption in each line, got {self.captions!r} "
                f"({'it is empty' if path.is_file() else 'no such file'})"
            )
        tokenizer = load_text_tokenizer(self.text_tokenizer)
        texts = [line.strip() or None for line in lines]
        self._ids = caption_ids(tokenizer, texts, max_tokens=self.max_caption_tokens)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the batches of requests, in the order of the lines."""
        numbers: Any = range(len(self._ids) * self.videos_per_caption)
        return DataLoader(numbers, batch_size=self.batch_size, collate_fn=self._request)

    def _request(self, numbers: list[int]) -> dict[str, Any]:
        index = torch.tensor(numbers)
        ids = trim_captions(self._ids[index // self.videos_per_caption])
        return {"index": index, "caption": ids, "options": self.options}
