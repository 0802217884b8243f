# SPDX-License-Identifier: Apache-2.0
"""Loads the training methods of `recipes/method/*.yaml` as callbacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reco_lightning import recipes
from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.support.argument_checks import check_str
from reco_lightning.windowing.sampler import WindowSampler

__all__ = ["Method", "load_method", "method_names"]

_FOLDER = Path(recipes.__file__).parent / "method"


@dataclass(frozen=True)
class Method:
    """A training method: the tokens that a step optimises, and how.

    Args:
        name: Its name in tables.
        sampler: Arguments of ``WindowSampler`` but for the sizes; ``None`` with ``options`` of ``None`` is plain.
        options: Arguments of ``ReCoCallback`` but for the sampler; ``None`` is plain training, without a callback.

    Raises:
        ValueError: If an argument is of another kind.

    Example:
        >>> load_method("baseline").callback(5, 16) is None
        True
        >>> load_method("reco").callback(5, 16).settings.continuity.weight
        0.1
    """

    name: str
    sampler: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_str(name=self.name)
        if not isinstance(self.sampler, Mapping):
            raise ValueError(f"sampler must be a mapping of arguments, got {self.sampler!r}")
        if not isinstance(self.options, Mapping | None):
            raise ValueError(f"options must be a mapping of arguments, or None, got {self.options!r}")

    def callback(self, frame_blocks: int, tokens_per_block: int, *, seed: int = 0) -> ReCoCallback | None:
        """Returns the callback for a grid of tokens.

        Args:
            frame_blocks: K, frame blocks of a video.
            tokens_per_block: Tokens of a block.
            seed: Seed of the windows.

        Returns:
            A callback for one trainer, ``None`` for plain training.

        Raises:
            ValueError: If an argument of the method is out of its range for this grid.
        """
        if self.options is None:
            return None
        sampler = WindowSampler(frame_blocks, tokens_per_block, seed=seed, **self.sampler)
        return ReCoCallback(sampler, **self.options)

    def changed(self, name: str, **changes: Any) -> Method:
        """Returns the method with other arguments, of the sampler or of the callback, under another name.

        Args:
            name: Its name in tables.
            **changes: Arguments of ``WindowSampler`` or of ``ReCoCallback``.

        Raises:
            ValueError: If the method is plain training, which has no arguments.
        """
        if self.options is None:
            raise ValueError(f"method {self.name!r} is plain training and takes no arguments, got {', '.join(changes)}")
        windows = {key: value for key, value in changes.items() if key in _SAMPLER_ARGUMENTS}
        others = {key: value for key, value in changes.items() if key not in _SAMPLER_ARGUMENTS}
        return Method(name, {**self.sampler, **windows}, {**self.options, **others})


_SAMPLER_ARGUMENTS = ("window_blocks", "stride_blocks", "first_window_prob", "schedule")


def method_names() -> list[str]:
    """Returns the names of the packaged methods.

    Example:
        >>> "reco" in method_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_method(name: str) -> Method:
    """Reads a method.

    Args:
        name: A packaged method, or the path of a YAML file of the same form.

    Returns:
        The method, named like the file.

    Raises:
        ValueError: If there is no such method, or the file holds none.
    """
    refusal = ValueError(
        f"method must be one of {', '.join(method_names())}, or the path of a YAML file like them, got {name!r}"
    )
    if not isinstance(name, str):
        raise refusal
    path = Path(name) if name.endswith((".yaml", ".yml")) or os.sep in name else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise refusal
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = content["trainer"].get("callbacks+", [])
        if not entries:
            return Method(path.stem)
        (entry,) = entries
        options = dict(entry["init_args"])
        sampler = dict(options.pop("sampler")["init_args"])
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} must hold a ReCoCallback with its sampler under trainer, callbacks+, as recipes/method/reco.yaml "
            f"does, but cannot be read so: {error!r}"
        ) from error
    for size in ("frame_blocks", "tokens_per_block", "seed"):
        sampler.pop(size, None)
    return Method(path.stem, sampler, options)
