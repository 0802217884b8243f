# SPDX-License-Identifier: Apache-2.0
"""Token shards: the format, the writer and the data modules over them."""
