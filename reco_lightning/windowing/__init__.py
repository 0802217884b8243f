# SPDX-License-Identifier: Apache-2.0
"""The method: which window a step optimises, its losses, the engines that compute it and their injection into a module.

Nothing here knows a model, a data set or a command; the trainer's hooks are in callbacks.
"""
