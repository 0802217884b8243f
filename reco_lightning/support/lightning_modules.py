# SPDX-License-Identifier: Apache-2.0
"""Knows the modules and trainers of both packages that Lightning is published as.

``pytorch_lightning`` has classes of its own. It is never imported here: where a module of it is at hand, somebody has
imported it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from typing_extensions import TypeIs

__all__ = ["is_lightning_module", "loss_of", "sigterm_exception"]


def is_lightning_module(module: object) -> TypeIs[pl.LightningModule]:
    """Returns whether an object is a LightningModule of ``lightning.pytorch`` or of ``pytorch_lightning``.

    Example:
        >>> is_lightning_module(pl.LightningModule()), is_lightning_module(3)
        (True, False)
    """
    other = getattr(sys.modules.get("pytorch_lightning"), "LightningModule", pl.LightningModule)
    return isinstance(module, (pl.LightningModule, other))


def loss_of(result: Any) -> Any:
    """Returns the loss in what a training step returns: the value itself, or that of ``"loss"`` in a mapping."""
    return result.get("loss") if isinstance(result, Mapping) else result


def sigterm_exception(trainer: Any) -> type[BaseException]:
    """Returns the exception by which a trainer of either package ends a run that was told to stop."""
    package = "pytorch_lightning" if type(trainer).__module__.startswith("pytorch_lightning.") else "lightning.pytorch"
    exception: type[BaseException] = importlib.import_module(f"{package}.utilities.exceptions").SIGTERMException
    return exception
