# SPDX-License-Identifier: Apache-2.0
"""Windowed steps of the settings table's networks on any device, and how far two gradients lie apart."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch.utils._pytree import tree_map

from reco_lightning import ReCoCallback
from reco_lightning.windowing.injection.windowed_step import Injection
from tests.helpers.networks.common import quieten
from tests.helpers.settings import WINDOWS

WEIGHT = 0.5
STEPS = 3


def to(device, batch):
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, batch)


def cut(windows, batch, module, loss, *, autocast=nullcontext, prepare=None, **options):
    """Gradients by parameter name of each window's step, and the engine's name; ``prepare`` comes after the proof."""
    callback = ReCoCallback(WINDOWS, continuity_weight=WEIGHT, **options)
    with autocast():
        selection = callback.settings.select(module, lambda: module.training_step(batch, 0))
    if prepare is not None:
        prepare(module)
    injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
    selection.engine.install()
    found = []
    try:
        for step, window in enumerate(windows):
            torch.manual_seed(100 + step)
            with autocast():
                value, _ = injection.run([window], loss)
            value.backward()
            selection.engine.deactivate()
            found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
            module.zero_grad()
    finally:
        selection.engine.remove()
    return found, selection.engine.name


def windowed_gradients(setting, device, *, windows=None, **options):
    """As ``cut``, of a setting's network with the weights that every test starts from, on a device."""
    module = copy.deepcopy(quieten(setting.make())).to(device).train()
    batch = to(device, setting.draw(0))
    windows = [WINDOWS.sample(step) for step in range(STEPS)] if windows is None else windows
    return cut(windows, batch, module, lambda: module.loss(batch), **options)


def assert_close(own, expected, relative, *, text=""):
    """Each gradient's distance from the expected one, relative to the largest or its own norm, whichever is larger."""
    largest = max(float(gradient.norm()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        gradient = gradient.double()
        mine = own[name].cpu().double() if name in own else torch.zeros_like(gradient)
        distance = float((mine - gradient).norm())
        allowed = relative * max(float(gradient.norm()), 0.05 * largest)
        assert distance <= allowed, f"{text} {name}: {distance:.2e} apart, {allowed:.2e} allowed"
