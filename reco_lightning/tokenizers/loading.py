# SPDX-License-Identifier: Apache-2.0
"""Loads any tokenizer from a path by the content of its files.

Used wherever a tokenizer is named by a path: `reco tokenize`, `reco generate` and `SampleVideos`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reco_lightning import tokenizers
from reco_lightning.support.argument_checks import check_int, check_path
from reco_lightning.support.checkpoints import load_module
from reco_lightning.tokenizers.base import VideoTokenizer

__all__ = ["load_tokenizer", "tokenizer_kind"]

_ACCEPTED = (
    "a Lightning checkpoint of a VQVAE, an OmniTokenizer .ckpt, or the folder (config.json and weights) of a LARP "
    "tokenizer, of a transformers Emu3VQVAE or of a diffusers AutoencoderVidTok"
)


def load_tokenizer(source: str | os.PathLike[str], *, vocab_size: int | None = None) -> VideoTokenizer:
    """Loads the tokenizer of a file or folder, whichever it holds.

    What a path holds is told by its content, not by its name. No code in the files is run.

    Args:
        source: A Lightning checkpoint of a `VQVAE`, an OmniTokenizer checkpoint, or the folder of a LARP tokenizer, of
            a transformers `Emu3VQVAE` or of a diffusers `AutoencoderVidTok`.
        vocab_size: Number of ids that it has to know: that of the model whose ids it is to decode. None asks for none.

    Returns:
        The tokenizer, on the CPU, in evaluation mode, with no parameter that asks for a gradient.

    Raises:
        ValueError: There is no such path, it holds no tokenizer, one that knows fewer ids, or weights that do not fit.
        ImportError: The tokenizer needs a package that is not installed; the message names the extra.

    Example:
        >>> load_tokenizer("nowhere.ckpt")
        Traceback (most recent call last):
            ...
        ValueError: tokenizer must be an existing folder or checkpoint file, got 'nowhere.ckpt' (no such file); ...
    """
    check_int(vocab_size=vocab_size, or_none=True)
    kind = tokenizer_kind(source)
    cls: Any = getattr(tokenizers, kind)  # imported now: some need an extra
    try:
        tokenizer = load_module(str(source), cls) if kind == "VQVAE" else cls.from_pretrained(source)
    except FileNotFoundError as error:
        raise ValueError(f"tokenizer must be complete: {error}") from error
    if isinstance(tokenizer, nn.Module):
        tokenizer.cpu().eval().requires_grad_(False)
    if vocab_size is not None and tokenizer.codebook_size < vocab_size:
        raise ValueError(
            f"tokenizer must know the model's {vocab_size} ids, but it knows {tokenizer.codebook_size}; "
            f"give the one that made the training tokens, got {os.fspath(source)!r}"
        )
    return tokenizer


def tokenizer_kind(source: str | os.PathLike[str]) -> str:
    """Returns the name of the tokenizer's class that a file or folder holds; reads names only, no weights.

    Args:
        source: As in `load_tokenizer`.

    Returns:
        "VQVAE", "OmniTokenizer", "LARPTokenizer", "Emu3Tokenizer" or "VidTokTokenizer".

    Raises:
        ValueError: There is no such path, or it holds no tokenizer that is known.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "emu3_vqgan"}))
        >>> tokenizer_kind(folder)
        'Emu3Tokenizer'
    """
    check_path(tokenizer=source)
    path = Path(source)
    if path.is_dir():
        return _folder_kind(path)
    if path.is_file():
        return _file_kind(path)
    raise ValueError(
        f"tokenizer must be an existing folder or checkpoint file, got {os.fspath(source)!r} (no such file); "
        f"give {_ACCEPTED} (what lies on a hub has to be downloaded first)"
    )


def _folder_kind(folder: Path) -> str:
    file = folder / "config.json"
    if not file.is_file():
        files = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
        raise _no_tokenizer(
            folder, f"a folder without config.json, with {files}", "the model's own folder may lie deeper"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _no_tokenizer(folder, f"a config.json that is no JSON ({error})", "download it again") from error
    if not isinstance(config, dict):
        raise _no_tokenizer(folder, f"a config.json with a {type(config).__name__}, no object", "download it again")
    model_type = config.get("model_type")
    if config.get("_class_name") == "AutoencoderVidTok":
        return "VidTokTokenizer"
    if model_type == "emu3_vqgan":
        return "Emu3Tokenizer"
    if isinstance(config.get("bottleneck"), dict):
        return "LARPTokenizer"
    if "vq_config" in config or model_type == "Emu3VisionVQ":
        remedy = "load Emu3ForConditionalGeneration with transformers and save_pretrained its model.vqmodel to a folder"
        raise _no_tokenizer(folder, f"Emu3's tokenizer in another form (model_type {model_type!r})", remedy)
    if {"cls_token_num", "n_layer", "vocab_size"} <= config.keys():
        raise _no_tokenizer(folder, "LARP's video model, which learns from ids", "give the tokenizer that made them")
    name = config.get("_class_name") or config.get("architectures") or model_type
    keys = ", ".join(sorted(config)[:8]) or "none"
    raise _no_tokenizer(folder, f"the config.json of {name}" if name else f"a config.json with the keys {keys}")


def _file_kind(file: Path) -> str:
    names = _safetensors_names(file)
    stored = {"state_dict": dict.fromkeys(names)} if names else _read(file)
    if not isinstance(stored, dict):
        raise _no_tokenizer(file, f"a {type(stored).__name__}")
    options, weights = (
        value if isinstance(value, dict) else {}
        for value in (stored.get("hyper_parameters"), stored.get("state_dict", stored))
    )
    if "codebook.embeddings" in weights or isinstance(options.get("args"), argparse.Namespace):
        return "OmniTokenizer"  # it refuses the language models and the continuous one, which lie beside it, by name
    if {"encoder", "decoder", "quantizer"} <= {str(name).partition(".")[0] for name in weights}:
        return "VQVAE"
    listed = ", ".join(sorted(map(str, weights))[:6]) or "nothing"
    found = f"a checkpoint of {options.get('_class_path', 'something else')} ({listed}, ...)"
    raise _no_tokenizer(file, found, _folder_of(file))


def _safetensors_names(file: Path) -> list[str]:
    """Names of the weights of a safetensors file; none if it is another kind of file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length < 100_000_000 or stream.read(1) != b"{":  # the format's own limit
            return []
        try:
            return [name for name in json.loads(b"{" + stream.read(length - 1)) if name != "__metadata__"]
        except ValueError:
            return []


def _read(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # OmniTokenizer's hyperparameters are one
            # mmap leaves the weights on disk; it needs the zip format, which torch writes since 1.6
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # bytes that are no pickle fail in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = _folder_of(file)
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it holds a {unsafe[1]}, and reading that would run code"
            remedy = (
                "if you trust the file, take the weights out of it once: "
                'torch.save({"state_dict": torch.load(path, weights_only=False)["state_dict"]}, new_path)'
            )
        found = f"a file that torch.load(weights_only=True) does not read ({reason})"
        raise _no_tokenizer(file, found, remedy) from error


def _folder_of(file: Path) -> str:
    return f"the folder {str(file.parent)!r} may be meant" if (file.parent / "config.json").is_file() else ""


def _no_tokenizer(path: Path, found: str, remedy: str = "") -> ValueError:
    message = f"tokenizer must be a tokenizer's checkpoint or folder, but {str(path)!r} holds {found}; give {_ACCEPTED}"
    return ValueError(f"{message}: {remedy}" if remedy else message)
