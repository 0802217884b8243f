# SPDX-License-Identifier: Apache-2.0
"""Real video in: folders of clips, token shards and the data modules over them."""
