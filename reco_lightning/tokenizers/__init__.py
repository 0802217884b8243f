# SPDX-License-Identifier: Apache-2.0
"""From videos to token ids and back: the ``VideoTokenizer`` protocol, published tokenizers and a trainable one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reco_lightning.support.lazy_imports import lazy_exports

if TYPE_CHECKING:
    from reco_lightning.tokenizers.base import VideoTokenizer
    from reco_lightning.tokenizers.emu3 import Emu3Tokenizer
    from reco_lightning.tokenizers.larp.model import LARPTokenizer
    from reco_lightning.tokenizers.loading import load_tokenizer
    from reco_lightning.tokenizers.omnitokenizer.model import OmniTokenizer
    from reco_lightning.tokenizers.vidtok import VidTokTokenizer
    from reco_lightning.tokenizers.vqvae import VQVAE

__all__ = [
    "VQVAE",
    "Emu3Tokenizer",
    "LARPTokenizer",
    "OmniTokenizer",
    "VidTokTokenizer",
    "VideoTokenizer",
    "load_tokenizer",
]

# Where each name lives. Imported on first use: one tokenizer's packages are not needed for another.
_HOMES = {
    "VQVAE": "vqvae",
    "Emu3Tokenizer": "emu3",
    "LARPTokenizer": "larp.model",
    "OmniTokenizer": "omnitokenizer.model",
    "VidTokTokenizer": "vidtok",
    "VideoTokenizer": "base",
    "load_tokenizer": "loading",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
