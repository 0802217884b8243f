# SPDX-License-Identifier: Apache-2.0
"""Exports token shards as litdata datasets and streams them from object storage (extra `litdata`).

An export holds the shards' `manifest.json`, `split.json` and the litdata datasets `train` and, if not empty, `val`.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch
from typing_extensions import override

from reco_lightning.data.loading.sample_order import data_ranks, epoch_order
from reco_lightning.data.tokens.compatibility import refuse_mismatch
from reco_lightning.data.tokens.litdata_loader import LitTokenLoader
from reco_lightning.data.tokens.manifest import MANIFEST, Manifest, read_manifest
from reco_lightning.data.tokens.module import Split, split_shards
from reco_lightning.data.tokens.shards import TokenItem, TokenShards
from reco_lightning.support.argument_checks import check_finite, check_flag, check_int, check_path

__all__ = ["LitTokenDataModule", "export_litdata"]

_SPLIT = "split.json"
_CHUNK_BYTES = 1 << 26  # as litdata advises: few requests, and still many files to shuffle


def export_litdata(
    folder: str | os.PathLike[str],
    output: str,
    *,
    val_fraction: float = 0.1,
    split: Split = "source",
    split_seed: int = 0,
    chunk_clips: int | None = None,
    storage_options: dict[str, Any] | None = None,
) -> None:
    """Writes token shards as litdata datasets, split into training and validation clips as by `TokenDataModule`.

    Training clips are stored in random order, since litdata shuffles files and the clips inside each. Where processes
    are not forked, call this under `if __name__ == "__main__":`, as litdata writes from another process.

    Args:
        folder: A folder of token shards.
        output: A new local folder, or the URL of one in an object store: `s3://`, `gs://` or `r2://`.
        val_fraction: As in `TokenDataModule`.
        split: As in `TokenDataModule`.
        split_seed: Decides which files are held out, and the order in which training clips are stored.
        chunk_clips: Clips per stored file; None makes files of 64 MB.
        storage_options: What the store needs besides the environment; for S3, arguments of boto3's client.

    Raises:
        ModuleNotFoundError: litdata is not installed.
        ValueError: An argument is out of range, there are no token shards, or a local `output` is not empty.
        RuntimeError: litdata cannot write, or finds a dataset at the URL.
    """
    check_path(folder=folder, output=output)
    check_finite(val_fraction=val_fraction)
    check_int(split_seed=split_seed)
    check_int(at_least=1, or_none=True, chunk_clips=chunk_clips)
    _check_options(storage_options)
    if split not in ("source", "time"):
        raise ValueError(f"split must be 'source' or 'time', got {split!r}")
    litdata = _litdata()
    shards = TokenShards(folder)
    if not _is_url(output) and Path(output).exists() and any(Path(output).iterdir()):
        raise ValueError(f"output must be a new or empty folder, got {output!r}, which holds files; name another one")
    train, held_out = split_shards(shards, split, val_fraction=val_fraction, seed=split_seed)
    mixed = epoch_order(len(train), seed=split_seed, number=0).tolist()
    clip_bytes = shards.manifest.tokens * np.dtype(shards.manifest.dtype).itemsize
    for part, places in (("train", [train[n] for n in mixed]), ("val", held_out)):
        if places:
            litdata.optimize(
                functools.partial(_stored, shards),
                places,
                _join(output, part),
                chunk_size=chunk_clips or max(1, _CHUNK_BYTES // clip_bytes),
                num_workers=1,
                keep_data_ordered=True,
                reorder_files=False,
                start_method=multiprocessing.get_start_method(),  # litdata sets it for the whole process
                storage_options=dict(storage_options or {}),
                verbose=False,
            )
    told = {"train": len(train), "val": len(held_out), "val_fraction": val_fraction, "split": split, "seed": split_seed}
    for name, content in ((_SPLIT, json.dumps(told).encode()), (MANIFEST, Path(folder, MANIFEST).read_bytes())):
        with tempfile.TemporaryDirectory() as scratch:  # the manifest is last: without it the export does not count
            path = Path(scratch if _is_url(output) else output, name)
            path.write_bytes(content)
            if _is_url(output):
                _store(output, storage_options).upload_file(str(path), _join(output, name))


class _Refused:
    """Stands in for a serializer of litdata's that unpickles, which would run code in files from elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, data_format: object) -> None:
        raise ValueError(
            f"folder must hold token shards that export_litdata wrote, got items in litdata's format {self.name!r}, "
            "whose reading can run code: export the shards anew"
        )


class LitTokenDataModule(L.LightningDataModule):
    """Training and validation batches of tokens, streamed from what `export_litdata` wrote.

    A batch is `{"tokens": int64 (B, N), "label": int64 (B,)}`, as in `TokenDataModule`, and shards that do not fit the
    model or its windows are refused as there. Each process gets its part of every epoch. A resumed run goes on in the
    middle of an epoch with the batches that were left, if batch size, processes and workers are the same.

    Args:
        folder: A local folder, or its URL.
        batch_size: Clips per batch and process, B.
        num_workers: Worker processes per loader.
        shuffle: Training clips in a new order in every epoch: files, and the clips inside each.
        seed: Of that order, 0 to 2**32 - 1.
        storage_options: As in `export_litdata`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> LitTokenDataModule("s3://bucket/tokens", batch_size=4).batch_size
        4
    """

    manifest: Manifest  # of the token shards, from setup on
    _clips: dict[str, int]

    def __init__(
        self,
        folder: str,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_path(folder=folder)
        check_int(at_least=1, batch_size=batch_size)
        check_int(at_least=0, num_workers=num_workers)
        check_int(seed=seed)
        check_flag(shuffle=shuffle)
        _check_options(storage_options)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be 0 to 2**32 - 1, got {seed}")
        self.folder, self.storage_options = folder, storage_options
        self.batch_size, self.num_workers, self.shuffle, self.seed = batch_size, num_workers, shuffle, seed

    @override
    def setup(self, stage: str) -> None:
        """Reads what the export holds; a `ValueError` if there is none, or it does not fit, as in `TokenDataModule`."""
        _litdata()
        with tempfile.TemporaryDirectory() as scratch:
            if _is_url(self.folder):
                store = _store(self.folder, self.storage_options)
                for name in (MANIFEST, _SPLIT):
                    store.download_file(_join(self.folder, name), str(Path(scratch, name)))
            local = Path(scratch if _is_url(self.folder) else self.folder)
            self.manifest = read_manifest(local)
            if not (local / _SPLIT).is_file():
                raise ValueError(f"folder must hold what export_litdata writes, got {self.folder!r} without {_SPLIT}")
            self._clips = json.loads((local / _SPLIT).read_text(encoding="utf-8"))
        self._refuse_misfit(stage)

    @override
    def train_dataloader(self) -> LitTokenLoader:
        """Returns the training clips; those that do not fill a batch on every process are left out of the epoch."""
        self._refuse_misfit("fit")
        return self._loader("train", shuffle=self.shuffle)

    @override
    def val_dataloader(self) -> LitTokenLoader | list[LitTokenLoader]:
        """Returns the validation clips in order; no loader where the export holds out none."""
        self._refuse_misfit("validate")  # again: the network may have been made after setup, in configure_model
        return self._loader("val", shuffle=False) if self._clips["val"] else []

    @override
    def test_dataloader(self) -> LitTokenLoader:
        """Returns the validation clips, or all clips where the export holds out none."""
        return self._loader("val" if self._clips["val"] else "train", shuffle=False)

    def _refuse_misfit(self, stage: str) -> None:
        if (trainer := self.trainer) is not None:
            network = getattr(trainer.lightning_module, "network", None)
            windows = [getattr(each, "sampler", None) for each in getattr(trainer, "callbacks", []) if stage == "fit"]
            samplers = [each for each in windows if hasattr(each, "frame_blocks") and hasattr(each, "tokens_per_block")]
            refuse_mismatch(self.manifest, folder=self.folder, network=network, samplers=samplers)

    def _loader(self, part: Literal["train", "val"], *, shuffle: bool) -> LitTokenLoader:
        litdata = _litdata()
        dataset = litdata.StreamingDataset(
            _join(self.folder, part),
            shuffle=shuffle,
            drop_last=True if part == "train" else None,  # None: where there are several processes
            seed=self.seed,
            item_shuffle_window=0,  # 0: anywhere in the file; such an order needs clips decoded one by one
            batch_decode=0,
            storage_options=self.storage_options,
            serializers={name: _Refused(name) for name in ("pickle", "graph")},
        )
        processes, parts = dataset.distributed_env.world_size, data_ranks(self.trainer)[1]
        if parts not in (None, processes):
            raise ValueError(
                f"strategy must give data of its own to each process, as litdata does to {processes}, but shares it "
                f"among {parts}; use TokenDataModule with it"
            )
        loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_batch,
            pin_memory=torch.cuda.is_available(),
        )
        if len(loader) == 0:
            raise ValueError(
                f"batch_size must let the {self._clips[part]} {part} clips of {self.folder} fill a batch on each of "
                f"{processes} process(es), got {self.batch_size}; lower it"
            )
        return LitTokenLoader(loader)


def _check_options(storage_options: dict[str, Any] | None) -> None:
    if not isinstance(storage_options, dict | None):
        raise ValueError(f"storage_options must be a dict of the store's options, or None, got {storage_options!r}")


def _litdata() -> Any:
    try:
        return importlib.import_module("litdata")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Token shards in object storage need litdata ({error}): pip install "reco_lightning[litdata]", or, beside '
            "a CPU build of torch, without torchvision: pip install boto3 obstore; pip install --no-deps litdata"
        ) from error


def _stored(shards: TokenShards, place: int) -> dict[str, Any]:
    clip = shards[place]
    return {"tokens": clip["tokens"].numpy().astype(shards.manifest.dtype), "label": int(clip["label"])}


def _batch(clips: Sequence[dict[str, Any]]) -> TokenItem:
    tokens = torch.from_numpy(np.stack([clip["tokens"] for clip in clips]).astype(np.int64))  # (B, N)
    return {"tokens": tokens, "label": torch.tensor([clip["label"] for clip in clips])}


def _is_url(folder: str) -> bool:
    return "://" in folder


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _store(url: str, storage_options: dict[str, Any] | None) -> Any:
    # litdata has no public name for single files; fsspec would bring a second S3 client with settings of its own
    return importlib.import_module("litdata.streaming.fs_provider")._get_fs_provider(url, storage_options)
