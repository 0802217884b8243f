# SPDX-License-Identifier: Apache-2.0
from .shards import ClipSource as ClipSource
from .shards import TokenItem as TokenItem
from .shards import TokenShards as TokenShards
from .shards import TokenShardWriter as TokenShardWriter
