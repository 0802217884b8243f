# SPDX-License-Identifier: Apache-2.0
"""LARP's autoregressive model."""
