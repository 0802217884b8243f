# SPDX-License-Identifier: Apache-2.0
"""Generation: the token loop, the choice of a token, and decoding to pixels."""
