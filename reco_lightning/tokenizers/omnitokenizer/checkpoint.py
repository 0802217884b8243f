# SPDX-License-Identifier: Apache-2.0
"""Reads the files of the OmniTokenizer release (Wang et al., arXiv 2406.09399).

A file is read with `torch.load(weights_only=True)`: no code in it is run.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reco_lightning.tokenizers.exact_weights import load_exactly

__all__ = ["load_weights", "read_checkpoint", "used_weights"]

_RELEASED = (
    "imagenet_ucf, imagenet_k600, imagenet_mit, imagenet_sthv2, celebahq_ucf, celebahq_k600, ffhq_ucf, ffhq_k600, "
    "celebahq, ffhq and imagenet_only (.ckpt)"
)
_CONTINUOUS = "a continuous VAE, which has no ids"
_LANGUAGE = "a language model over OmniTokenizer's ids, no tokenizer"
_DIFFUSION = "a diffusion model, no tokenizer"

# Other files of the release, which are large and need not be read to be refused.
_OTHER_FILES = {
    "imagenet_ucf_vae.ckpt": _CONTINUOUS,
    "imagenet_k600_vae.ckpt": _CONTINUOUS,
    "imagenet_class_lm.ckpt": _LANGUAGE,
    "ucf_class_lm.ckpt": _LANGUAGE,
    "k600_fp_lm.ckpt": _LANGUAGE,
    "dit.pt": _DIFFUSION,
    "latte_17frms.pt": _DIFFUSION,
}

# Networks that only training needs: discriminators, perceptual losses and their teachers.
_TRAINING = re.compile(r"((image|video)_discriminator|perceptual_model|video_perceptual\w*|\w*teacher\w*)\..+")

# What a GPT holds, by itself or inside the module that also holds its tokenizer.
_LANGUAGE_KEY = re.compile(
    r"(transformer|first_stage_model|gpt)\.|(.*\.)?(tok_emb|pos_emb|wte|wpe|(blocks|h)\.\d+\.attn)\b"
)

# Stored with the tokenizer but never read by it: statistics of the codebook, norms of cross-attention, and the spatial
# positions of layers without space.
_UNREAD = re.compile(
    r"codebook\.(N|z_avg|codebook_usage)"
    r"|(en|de)coder\.(enc|dec)_(spatial|temporal)_transformer\.layers\.\d+\.1\.context_norm\.(gamma|beta)"
    r"|(en|de)coder\.(enc|dec)_temporal_transformer\.layers\.\d+\.1\.spatial_rel_pos_bias"
    r"\.net\.(0\.0|1\.0|2)\.(weight|bias)"
)


def read_checkpoint(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the state dict and training options of a file of the release.

    Args:
        source: A `.ckpt` of the release, a state dict saved with torch, or one in a `.safetensors` file.

    Returns:
        The state dict as stored, on the CPU, and the options; none for a bare state dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is another model of the release, or cannot be read.

    Example:
        >>> read_checkpoint("ucf_class_lm.ckpt")
        Traceback (most recent call last):
            ...
        ValueError: ucf_class_lm.ckpt is a language model over OmniTokenizer's ids, no tokenizer; ...
    """
    path = Path(source)
    if path.name in _OTHER_FILES:
        raise _refusal(path, _OTHER_FILES[path.name])
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir() if item.suffix in (".ckpt", ".pt", ".safetensors"))
        raise ValueError(f"path must be a checkpoint file, got the folder {str(path)!r}; it holds {files or 'none'}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}; download one of {_RELEASED} from the release first")
    stored = _read(path)
    weights = stored.get("state_dict", stored)
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        found = ", ".join(sorted(map(str, stored))[:6]) or "nothing"
        raise ValueError(f"{path.name} must hold a state dict, with or without training options, but holds {found}")
    options = stored.get("hyper_parameters", {}) if weights is not stored else {}
    options = options.get("args", options) if isinstance(options, Mapping) else options
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    options = dict(options) if isinstance(options, Mapping) else {}
    other = _other_model(weights, options)
    if other:
        raise _refusal(path, other)
    return dict(weights), options


def used_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the part of an official state dict that encoding and decoding read.

    Left out by name are networks that only training needs (discriminators, perceptual losses, teachers), statistics of
    the codebook, and parameters that the published code stores without reading them. Unknown names stay.

    Args:
        weights: The state dict.

    Returns:
        A smaller one, in the same order.

    Example:
        >>> import torch
        >>> names = ("codebook.embeddings", "codebook.N", "video_discriminator.model0.0.bias", "surprise")
        >>> list(used_weights({name: torch.zeros(1) for name in names}))
        ['codebook.embeddings', 'surprise']
    """
    return {key: value for key, value in weights.items() if not (_TRAINING.fullmatch(key) or _UNREAD.fullmatch(key))}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Fills a module with a state dict that must fit it exactly.

    Args:
        module: Of any device but meta.
        weights: One tensor for each key of its state dict.
        source: What to call the weights in an error.

    Raises:
        ValueError: Keys are missing, unknown or of another shape; all are listed, and nothing was loaded.

    Example:
        >>> import torch
        >>> load_weights(torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2), "scale": torch.ones(1)}, "line.ckpt")
        Traceback (most recent call last):
            ...
        ValueError: line.ckpt must hold exactly the weights of Linear. Missing: bias. Unknown: scale. ...
    """
    load_exactly(
        module,
        weights,
        claim=f"{source} must hold exactly the weights of {type(module).__name__}",
        remedy="Download the file again; a layout that no release has is not supported",
    )


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{path.name} needs safetensors: pip install "reco_lightning[tokenizers]"'
            ) from error
        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mmap leaves what is not used on disk; only the zip format can do that
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are no pickle fail in many ways
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {unsafe[1]}, no weight" if unsafe else str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path.name} cannot be read without running code in it ({reason}). If you trust it, take the weights out "
            'once: torch.save(torch.load(path, map_location="cpu", weights_only=False)["state_dict"], new_path)'
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path.name} must hold a checkpoint or a state dict, got a {type(stored).__name__}")
    return stored


def _other_model(weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> str | None:
    before, codes = weights.get("pre_vq_conv.1.weight"), weights.get("post_vq_conv.1.weight")
    if options.get("use_vae") or (before is not None and codes is not None and before.shape[0] == 2 * codes.shape[1]):
        return _CONTINUOUS
    if "codebook.embeddings" not in weights and any(_LANGUAGE_KEY.match(key) for key in weights):
        return _LANGUAGE
    return None


def _refusal(path: Path, kind: str) -> ValueError:
    return ValueError(f"{path.name} is {kind}; the VQ tokenizers of the release are {_RELEASED}")
