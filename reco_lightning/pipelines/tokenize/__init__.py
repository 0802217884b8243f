# SPDX-License-Identifier: Apache-2.0
"""`reco tokenize`: encodes a folder of videos into token shards, resumably."""
