# SPDX-License-Identifier: Apache-2.0
from .network import Guided as Guided
from .network import LARPTransformer as LARPTransformer
