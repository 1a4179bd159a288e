"""Models that torch.compile has compiled, as a whole or in parts: this package works on the modules inside the compiled
wrappers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from lowrank_ops.runtime.torch_internals import compiled_class

P = ParamSpec("P")
R = TypeVar("R")


def takes_compiled(parameter: str = "model") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator for a function that works on a model and may get a compiled one.

    The function receives the module inside the wrapper (see `uncompiled`). If it returns that module, the caller
    receives the model that it passed in, wrapper included.

    Args:
        parameter: name of the function's parameter that takes the model.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # raises the TypeError with its own name
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
    """Gives the model that `torch.compile(model)` wraps. Submodules that were compiled, `torch.compile(submodule)`, are
    replaced by what they wrap as well.

    Inside the block, qualified names therefore contain no `_orig_mod`, and every hook fires: compiled code knows only
    the hooks that existed when it was compiled. What `module.compile()` and `torch.compile(function)` have compiled
    runs uncompiled too.

    At the end the wrappers of submodules return to their places, around the modules that stand there by then. The
    guards of torch.compile notice that layers were replaced, and it compiles them again.
    """
    wrapper = compiled_class()
    if wrapper is None:
        yield model
        return
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        inner = _unwrapped(model, wrapper)
        for parent in list(inner.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, wrapper):
                    parent._modules[key] = _unwrapped(child, wrapper)
                    stack.callback(_wrap_again, parent, key, child, wrapper)
        yield inner


def _unwrapped(model: Any, wrapper: type[nn.Module]) -> nn.Module:
    """The module inside one or more wrappers."""
    while isinstance(model, wrapper):
        model = model._modules["_orig_mod"]
    return model  # type: ignore[no-any-return]


def _wrap_again(parent: nn.Module, key: str, compiled: Any, wrapper: type[nn.Module]) -> None:
    """Puts a compiled module back at `key`, around the module that stands there now; if none does, it is dropped."""
    module = parent._modules.get(key)
    if module is None:
        return
    parent._modules[key] = compiled
    while isinstance(compiled._modules["_orig_mod"], wrapper):
        compiled = compiled._modules["_orig_mod"]
    if compiled._modules["_orig_mod"] is not module:
        compiled._modules["_orig_mod"] = module
        compiled.__setstate__(compiled.__getstate__())  # binds its forward to the new module
