# SPDX-License-Identifier: Apache-2.0
from .entry_point import COMMANDS as COMMANDS
from .entry_point import Command as Command
from .entry_point import main as main
from .entry_point import resolve_recipes as resolve_recipes
