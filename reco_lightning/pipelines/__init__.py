# SPDX-License-Identifier: Apache-2.0
"""Commands from files to files: videos to tokens, tokens to videos, videos to scores.

The pieces that they put together (data, tokenizers, models, metrics) have their own packages.
"""
