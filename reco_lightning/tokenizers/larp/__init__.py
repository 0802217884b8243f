# SPDX-License-Identifier: Apache-2.0
"""LARP's tokenizer."""
