# SPDX-License-Identifier: Apache-2.0
"""From videos to token ids and back: the ``VideoTokenizer`` protocol and a small trainable tokenizer."""
