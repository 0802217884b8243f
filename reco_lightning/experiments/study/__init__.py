# SPDX-License-Identifier: Apache-2.0
"""``reco study``: several training methods with several seeds on one small data set, and one table of them all."""
