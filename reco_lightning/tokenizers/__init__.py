# SPDX-License-Identifier: Apache-2.0
"""From videos to token ids and back: the ``VideoTokenizer`` protocol, published tokenizers and a trainable one."""

from __future__ import annotations

import lazy_loader

# one tokenizer's packages are not needed for another
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
