# SPDX-License-Identifier: Apache-2.0
"""Text-to-video with a language model of transformers: network, module and generation from captions."""
