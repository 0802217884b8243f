# SPDX-License-Identifier: Apache-2.0
"""Video and tokens on disk, and the data modules over them.

The conversion from one to the other belongs to pipelines/tokenize.
"""
