# SPDX-License-Identifier: Apache-2.0
"""A CheckpointIO plugin that writes checkpoints atomically."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from typing_extensions import override

from reco_lightning.support.atomic_write import atomic_write
from reco_lightning.support.disk_errors import named_disk_errors

__all__ = ["WholeCheckpointIO"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is on the disk.

    Lightning writes to the folder for temporary files and moves from there: where that is another disk than the
    checkpoint's, the move is a copy, and a process killed in it leaves a piece of a file where the good one was. Paths
    that are URLs are left to Lightning.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(plugins=[WholeCheckpointIO()], accelerator="cpu", logger=False)
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What Lightning collected.
            path: The file; one of that name is replaced.
            storage_options: As in `TorchCheckpointIO`, which takes none.

        Raises:
            OSError: The disk is full, or refuses the file; the checkpoint that was there before is as it was.
        """
        if storage_options is not None or "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
            return
        buffer = io.BytesIO()  # torch.save to a file that the disk cuts off raises errors which do not name the reason
        torch.save(checkpoint, buffer)
        size = buffer.getbuffer().nbytes
        remedy = (
            f"it needs {size / 1e6:.1f} MB more; checkpoints written before are as they were: free space, and resume "
            "with --ckpt_path"
        )
        with named_disk_errors(path, remedy), atomic_write(Path(path)) as part:
            part.write_bytes(buffer.getbuffer())
