# SPDX-License-Identifier: Apache-2.0
"""`reco predict`: generation requests as a data module, and the callback that writes the videos."""
