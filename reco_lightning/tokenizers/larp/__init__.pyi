# SPDX-License-Identifier: Apache-2.0
from .model import LARPTokenizer as LARPTokenizer
