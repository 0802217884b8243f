# SPDX-License-Identifier: Apache-2.0
# The public names and their homes, once: __init__.py imports them on first use, type checkers read this file.

from .base import VideoTokenizer as VideoTokenizer
from .emu3 import Emu3Tokenizer as Emu3Tokenizer
from .larp.model import LARPTokenizer as LARPTokenizer
from .loading import load_tokenizer as load_tokenizer
from .omnitokenizer.model import OmniTokenizer as OmniTokenizer
from .vidtok import VidTokTokenizer as VidTokTokenizer
from .vqvae import VQVAE as VQVAE
