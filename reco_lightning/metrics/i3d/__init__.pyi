# SPDX-License-Identifier: Apache-2.0
from .network import I3DFeatures as I3DFeatures
from .network import InceptionI3D as InceptionI3D
from .network import load_i3d as load_i3d
from .network import same_padding as same_padding
