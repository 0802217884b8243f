# SPDX-License-Identifier: Apache-2.0
"""Merges one part of a recipe over another, as LightningCLI does, and changes single list entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["merge"]


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lays one part over another, as LightningCLI does with config files, and changes single entries of lists.

    Mappings are merged, other values replaced. `callbacks+: [...]` adds to the list `callbacks`, and
    `callbacks.NAME: {...}` is laid over the `init_args` of its entry whose class is NAME.

    Args:
        below: Content of the part below.
        above: Content of the part above.

    Returns:
        The merged content; the arguments are left as they are.

    Raises:
        ValueError: If an entry to be changed is not there, or a list is set that a part below adds to.

    Example:
        >>> below = {"callbacks": [{"class_path": "Timer", "init_args": {"interval": "step"}}]}
        >>> merge(below, {"callbacks+": [{"class_path": "RichProgressBar"}], "callbacks.Timer": {"interval": "epoch"}})
        {'callbacks': [{'class_path': 'Timer', 'init_args': {'interval': 'epoch'}}, {'class_path': 'RichProgressBar'}]}
    """
    merged = dict(below)
    for key, value in above.items():
        plain, dot, entry = key.partition(".")
        if dot:
            place = plain if plain in merged else f"{plain}+"
            merged[place] = _changed(merged.get(place), entry, value, plain)
        elif key.endswith("+") and (place := key[:-1] if key[:-1] in merged else key) in merged:
            merged[place] = [*merged[place], *value]
        elif f"{key}+" in merged:
            raise ValueError(f"{key} is set by a part above one that adds to it with {key}+; name that part later")
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _changed(entries: Any, name: str, options: Mapping[str, Any], key: str) -> list[Any]:
    found = [entry["class_path"].rpartition(".")[2] for entry in entries or []]
    if found.count(name) != 1:
        raise ValueError(f"{key}.{name} changes the one entry of {key} of this class, got {', '.join(found) or 'none'}")
    place = found.index(name)
    changed = {**entries[place], "init_args": merge(entries[place].get("init_args") or {}, options)}
    return [*entries[:place], changed, *entries[place + 1 :]]
