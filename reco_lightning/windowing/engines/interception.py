# SPDX-License-Identifier: Apache-2.0
"""Intercepts other people's code reversibly: a module's method, or calls of a torch function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from reco_lightning.windowing.engines.attention import multi_head_attention

__all__ = ["FunctionInterceptor", "PatchedMethod"]


def _plain_method(module: nn.Module, name: str) -> MethodType:
    return MethodType(getattr(type(module), name), module)


def _itself(value: Any) -> Any:
    return value


class PatchedMethod:
    """Stands in for a method of one module until removed; parameter names, hooks and ``state_dict`` are untouched.

    A deep copy or a pickle of the module holds the plain method, or what another library had put in its place: averaged
    copies and checkpoints never carry the patch.

    Args:
        module: The module whose method is replaced.
        name: The method's name, such as ``"forward"``.
        handler: Called with the original method and the call's arguments.

    Example:
        >>> import torch
        >>> layer = nn.Identity()
        >>> patch = PatchedMethod(layer, "forward", lambda original, x: original(x) + 1)
        >>> patch.install()
        >>> layer(torch.zeros(1)).item()
        1.0
        >>> patch.remove()
        >>> layer(torch.zeros(1)).item()
        0.0
    """

    def __init__(self, module: nn.Module, name: str, handler: Callable[..., Any]) -> None:
        self.module = module
        self.name = name
        self.handler = handler
        self._own: Any = None
        self._installed = False
        # What inspect.signature and Lightning look through.
        self.__wrapped__: Callable[..., Any] = getattr(module, name)

    def install(self) -> None:
        """Puts the handler in place; what stood there, another library's patch included, becomes the original."""
        if self._installed:
            return
        self._installed = True
        if self.module.__dict__.get(self.name) is self:  # left there by a removal under a patch that has gone since
            return
        self._own = self.module.__dict__.get(self.name)
        self.__wrapped__ = getattr(self.module, self.name)
        self.module.__dict__[self.name] = self

    def remove(self) -> None:
        """Puts back what stood there before ``install``; under somebody's later patch it only ceases to act."""
        if not self._installed:
            return
        self._installed = False
        if self.module.__dict__.get(self.name) is not self:
            return
        if self._own is not None:
            self.module.__dict__[self.name] = self._own
        else:
            del self.module.__dict__[self.name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the handler in the method's place."""
        if not self._installed:
            return self.__wrapped__(*args, **kwargs)
        return self.handler(self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return _plain_method(memo.get(id(self.module), self.module), self.name)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._own is not None:
            return _itself, (self._own,)
        return _plain_method, (self.module, self.name)


class FunctionInterceptor(TorchFunctionMode):
    """Hands, while entered, the calls of chosen torch functions to handlers, however the caller imported them.

    Args:
        handlers: For each function its replacement, called with the same arguments; one that returns ``NotImplemented``
            leaves the call as it is. Inside a handler the tap is off.
        fallback: Called with every other function, its positional and its keyword arguments.

    Example:
        >>> import torch
        >>> with FunctionInterceptor({F.relu: lambda x, **_: x + 1}):
        ...     F.relu(torch.zeros(1)).item()
        1.0
    """

    def __init__(
        self,
        handlers: Mapping[Callable[..., Any], Callable[..., Any]],
        fallback: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.handlers = handlers
        self.fallback = fallback
        self._attention = handlers.get(scaled_dot_product_attention)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # the method calls super(), which torch.compile does not trace
        handler = self.handlers.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func is F.multi_head_attention_forward and self._attention is not None:
            # torch runs its body with the tap off
            return multi_head_attention(self._attention, *args, **(kwargs or {}))
        if self.fallback is not None and not torch.compiler.is_compiling():
            return self.fallback(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
