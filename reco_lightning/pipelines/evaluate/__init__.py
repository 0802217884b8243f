# SPDX-License-Identifier: Apache-2.0
"""`reco evaluate`: generates videos, scores them and writes the report."""
