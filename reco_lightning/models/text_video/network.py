# SPDX-License-Identifier: Apache-2.0
"""Extends the vocabulary of a causal language model with video ids: captions in front, video behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from reco_lightning.support.argument_checks import check_int, check_path, check_video_grid
from reco_lightning.support.transformers_cache import CACHE_ARGUMENTS, describe_module, find_cache_argument

__all__ = ["TextVideoNetwork", "rows_like"]


def rows_like(table: torch.Tensor, count: int) -> torch.Tensor:
    """Makes fresh rows for a table, drawn as its own are spread, column by column.

    Rows that all begin as the mean, the usual choice for a few new words, would tell no video id from another.

    Args:
        table: Embeddings, or a head's weight, (T, D).
        count: How many rows.

    Returns:
        (count, D), of the table's type and device.

    Example:
        >>> rows_like(torch.tensor([[1.0, 5.0], [1.0, 7.0]]), 2)[:, 0]
        tensor([1., 1.])
    """
    spread, middle = torch.std_mean(table.float(), dim=0, correction=0)
    return (middle + spread * torch.randn(count, table.shape[1], device=table.device)).to(table.dtype)


class TextVideoNetwork(nn.Module):
    """Text ids, then video ids, in one vocabulary and one sequence, as Loong has it (arXiv 2410.02757).

    Of T text ids and V video ids, video id v is T + v, and T + V is the start of a video, the only row that a video
    without a caption has in front. A sample is ``[padding] [caption] start video``.

    Nothing is built before `build`: a network of billions of parameters can be described where it does not fit.

    Args:
        vocab_size: V, the tokenizer's codebook size.
        grid: (t, h, w) of a clip's ids, N = t h w.
        pretrained: Folder of a causal language model of transformers, weights as safetensors; all of its vocabulary is
            text. Its embedding and head get rows for the video ids. Its architecture is the folder's.
        architecture: For fresh weights, not read with ``pretrained``: values of transformers' configuration,
            ``model_type`` among them; ``vocab_size`` is T here.

    Attributes:
        config: Arguments for the same network without its weights, as a checkpoint stores them.
        language_model: The network of transformers, from `build` on.

    Raises:
        ValueError: If an argument is out of its range, or there is neither ``pretrained`` nor ``architecture``.

    Example:
        >>> llama = {"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32}
        >>> llama |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = TextVideoNetwork(vocab_size=6, grid=(2, 1, 2), architecture=llama)
        >>> network.build()
        >>> network(torch.tensor([[-1, 3, 4]]), torch.tensor([[5, 0, 2]])).shape  # T + V + 1 ids, 4 rows
        torch.Size([1, 4, 17])
    """

    num_classes = 0

    def __init__(
        self,
        vocab_size: int,
        grid: Sequence[int],
        *,
        pretrained: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_int(at_least=1, vocab_size=vocab_size)
        check_video_grid(grid=grid)
        check_path(pretrained=pretrained, or_none=True)
        if pretrained is None and architecture is None:
            raise ValueError("give pretrained, a folder to begin from, or architecture, for fresh weights; got neither")
        if not isinstance(architecture, Mapping | None):
            raise ValueError(f"architecture must be a mapping of names to values, or None, got {architecture!r}")
        self.pretrained = pretrained
        architecture = _of_folder(pretrained) if pretrained is not None else dict(architecture or {})
        if missing := {"model_type", "vocab_size"} - architecture.keys():
            raise ValueError(
                f"architecture must hold model_type, such as 'llama', and vocab_size, the number of text ids; got none "
                f"of {', '.join(sorted(missing))} among {sorted(architecture)}"
            )
        if not isinstance(architecture["model_type"], str):
            raise ValueError(f"architecture must hold a model_type such as 'llama', got {architecture['model_type']!r}")
        check_int(at_least=1, **{"architecture['vocab_size']": architecture["vocab_size"]})
        self.architecture = architecture
        self.vocab_size, self.grid = vocab_size, tuple(grid)
        self.num_tokens = grid[0] * grid[1] * grid[2]
        self.text_ids: int = architecture["vocab_size"]
        self.start_id = self.text_ids + vocab_size
        self.config: dict[str, Any] = {"vocab_size": vocab_size, "grid": list(grid), "architecture": architecture}
        self.language_model: Any = None

    def build(self) -> None:
        """Makes the network: pretrained or fresh; under ``torch.device("meta")`` its shapes alone.

        Raises:
            ImportError: If transformers is missing.
            ValueError: If transformers has no causal language model of this architecture.
        """
        transformers = _transformers()
        known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if self.architecture["model_type"] not in known:
            raise ValueError(
                "architecture must hold a model_type of which transformers has a causal language model, such as "
                f"'llama', got {self.architecture['model_type']!r}"
            )
        architecture = self.architecture | {"vocab_size": self.start_id + 1}
        if self.pretrained is None or torch.get_default_device().type == "meta":
            config = transformers.AutoConfig.for_model(**architecture)
            self.language_model = transformers.AutoModelForCausalLM.from_config(config)
            return
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.pretrained, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        model.resize_token_embeddings(self.start_id + 1, mean_resizing=False)
        tables = dict.fromkeys(
            (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        )  # or one, tied
        with torch.no_grad():
            for table in tables:
                table[self.text_ids :] = rows_like(table[: self.text_ids], self.vocab_size + 1)
        for weight in model.parameters():  # a folder may be of bfloat16; buffers of positions stay exact
            weight.data = weight.data.to(torch.get_default_dtype())
        self.language_model = model.train()

    def forward(self, captions: torch.Tensor, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Returns the logits over the whole vocabulary, text too, for the video tokens.

        Padding may stand anywhere in a caption: it is never attended to, and not counted in positions.

        Args:
            captions: Text ids, (B, C) int64, C may be 0; -1 is padding.
            tokens: The video's first m ids, (B, m) int64, counted from 0.
            cache: A ``Cache`` of transformers that holds the rows already run and takes the others; only those are
                run. ``None`` runs all.

        Returns:
            (B, m + 1, T + V + 1): row r is for token r. With a cache the last of these rows, one for each token run.

        Raises:
            ValueError: If there is a cache and the language model takes none.
        """
        padded = captions < 0
        start = torch.full_like(tokens[:, :1] if tokens.shape[1] else captions.new_empty(len(tokens), 1), self.start_id)
        ids = torch.cat([captions.masked_fill(padded, 0), start, tokens + self.text_ids], dim=1)  # (B, C + 1 + m)
        seen = torch.ones_like(ids)
        seen[:, : captions.shape[1]] = ~padded
        positions = (seen.cumsum(dim=1) - 1).clamp_min(0)
        known = 0 if cache is None else cache.get_seq_length()
        logits = self.language_model(
            input_ids=ids[:, known:],
            attention_mask=seen,
            position_ids=positions[:, known:],
            use_cache=cache is not None,
            **self._handed(cache),
        ).logits
        return logits[:, max(captions.shape[1] - known, 0) :]

    def _handed(self, cache: Any) -> dict[str, Any]:
        if cache is None:
            return {}
        name = find_cache_argument(self.language_model)
        if name is None:
            raise ValueError(
                f"cache must be None: the language model, a {describe_module(self.language_model)}, takes a key/value "
                f"cache by none of the names {', '.join(CACHE_ARGUMENTS)}; generate with another architecture"
            )
        return {name: cache}

    def checkpoint_activations(self) -> None:
        """Lets every layer run again in the backward pass, so that only its input is kept."""
        model = self.language_model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _of_folder(folder: str) -> dict[str, Any]:
    if not Path(folder, "config.json").is_file():
        raise ValueError(
            f"pretrained must be a folder of transformers with config.json and weights as safetensors, got {folder!r}, "
            "which holds no config.json; download the model first"
        )
    try:
        config = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config.json of something else ends in errors of every kind
        raise ValueError(
            f"pretrained must be a folder of transformers with config.json and weights as safetensors, got {folder!r}, "
            f"whose config.json cannot be read: {error}"
        ) from error
    # the type of the weights is the trainer's to say
    return {key: value for key, value in config.to_dict().items() if key not in ("dtype", "torch_dtype")}


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('text-to-video needs transformers: pip install "reco_lightning[hf]"') from error
    return transformers
