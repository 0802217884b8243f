# SPDX-License-Identifier: Apache-2.0
from .model import OmniTokenizer as OmniTokenizer
from .model import nearest_code as nearest_code
