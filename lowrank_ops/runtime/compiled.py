"""Models that torch.compile has compiled, as a whole or in parts: what this package does, it does to what they wrap."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


def takes_compiled(parameter: str = "model") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that works on a model: it gets an uncompiled one, see `uncompiled`, and returns the one that
    was given where it returns the model."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # whose error has its name
            given = bound.arguments.get(parameter)
            if not isinstance(given, nn.Module):
                return function(*args, **kwargs)
            with uncompiled(given) as model:
                bound.arguments[parameter] = model
                result = function(*bound.args, **bound.kwargs)  # type: ignore[arg-type]
            return given if result is model else result  # type: ignore[return-value]

        return run

    return decorate


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """The model that `torch.compile(model)` wraps, with what `torch.compile(submodule)` wraps in the wrappers' places.

    So names have no `_orig_mod` in them, and no hook is skipped: compiled code knows of those only that were there when
    it was compiled. What `module.compile()` and `torch.compile(function)` have compiled runs as it was written.

    Afterwards the wrappers are in their places again, around what then stands there; torch.compile notices by its
    guards that layers were replaced, and compiles anew.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield model
        return
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        inner = _unwrapped(model)
        for parent in list(inner.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, _wrapper()):
                    parent._modules[key] = _unwrapped(child)
                    stack.callback(_wrap_again, parent, key, child)
        yield inner


def _wrapper() -> type[nn.Module]:
    """The class of `torch.compile(module)`."""
    return sys.modules["torch._dynamo.eval_frame"].OptimizedModule  # type: ignore[no-any-return]


def _unwrapped(model: Any) -> nn.Module:
    while isinstance(model, _wrapper()):
        model = model._modules["_orig_mod"]
    return model  # type: ignore[no-any-return]


def _wrap_again(parent: nn.Module, key: str, wrapper: Any) -> None:
    """Puts a wrapper back, around the module that now stands in its place; not where none does."""
    module = parent._modules.get(key)
    if module is None:
        return
    parent._modules[key] = wrapper
    while isinstance(wrapper._modules["_orig_mod"], _wrapper()):
        wrapper = wrapper._modules["_orig_mod"]
    if wrapper._modules["_orig_mod"] is not module:
        wrapper._modules["_orig_mod"] = module
        wrapper.__setstate__(wrapper.__getstate__())  # its forward is bound to the module
