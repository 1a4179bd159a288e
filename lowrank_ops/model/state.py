"""The state that a run of a model may change (buffers, plain attributes, random generators), and how to restore it.

A calibrated layer is compared with its dense original over two runs of the model. Both runs must start from the same
state and draw the same random numbers, and the caller must find the model as it was.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

P = ParamSpec("P")
R = TypeVar("R")

# Names of what nn.Module itself keeps in a module (submodules, parameters, hooks, flags), without the buffers: a run of
# the model changes none of it but buffers.
_OWN = set(nn.Module().__dict__) - {"_buffers"}


class ModelState:
    """A copy of a model's buffers and of the plain attributes of its modules, from which they can be restored.

    Plain attributes are tensors, numbers and other simple values, and lists, dicts, sets and deques of them. There is
    no copy of parameters, of buffers of lazy modules before their first run, and of the contents of other objects.
    """

    def __init__(self, model: nn.Module) -> None:
        seen: dict[int, Callable[[], Any]] = {}
        self._modules = [
            (module, {name: _remember(value, seen) for name, value in _attributes(module).items()})
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Puts back what has changed since this copy was made."""
        for module, saved in self._modules:
            present = _attributes(module)
            for name in present.keys() - saved.keys():
                del module.__dict__[name]
            for name, back in saved.items():
                value = back()
                if present.get(name, self) is not value:
                    module.__dict__[name] = value


def leaves_model_state(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function whose first argument is a model: afterwards the model's state and all random generators are
    as before. The function runs outside of inference_mode, so that the tensors that it makes can be trained."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with torch.inference_mode(False), own_random_numbers():
            if not isinstance(model, nn.Module):
                return function(*args, **kwargs)
            state = ModelState(model)
            try:
                return function(*args, **kwargs)
            finally:
                state.restore()

    return run


@contextmanager
def own_random_numbers(seed: int = 0) -> Iterator[None]:
    """The global generators of torch (CPU and CUDA), NumPy and Python start from `seed`, and are as before afterwards.

    Within it, two runs of a model that draws noise see the same noise, and a shuffling DataLoader without a generator
    of its own gives the same order.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def in_inference_mode(model: nn.Module) -> bool:
    """Whether the model was built under torch.inference_mode: then only inference_mode lets it change its tensors."""
    return any(map(_is_inference, (*model.parameters(), *model.buffers())))


@contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Within it a model that was built under torch.inference_mode has copies of its parameters and buffers, which
    autograd accepts. Other models stay as they are."""
    copies: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        with torch.inference_mode(False):
            for module in model.modules():
                holders: tuple[Any, ...] = (module._parameters, module._buffers, module.__dict__)
                for holder in holders:
                    for name, value in list(holder.items()):
                        if not isinstance(value, Tensor) or not _is_inference(value):
                            continue
                        if id(value) not in copies:
                            plain = value.detach().clone()
                            parameter = isinstance(value, nn.Parameter)
                            copies[id(value)] = nn.Parameter(plain, requires_grad=False) if parameter else plain
                        replaced.append((holder, name, value))
                        holder[name] = copies[id(value)]
        yield
    finally:
        for holder, name, value in replaced:
            holder[name] = value


def _is_inference(value: Tensor) -> bool:
    return not is_lazy(value) and value.is_inference()


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OWN}


def _remember(value: Any, seen: dict[int, Callable[[], Any]]) -> Callable[[], Any]:
    """A function that returns `value` with the content that it has now.

    Args:
        seen: such functions by the ids of values that were met before: each value is remembered once.
    """
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not is_lazy(value):
        back = _remember_tensor(value)
    elif isinstance(value, (dict, list, set, deque, tuple)):
        back = _remember_container(value, seen)
    else:
        return lambda: value
    seen[id(value)] = back
    return back


def _remember_container(value: Any, seen: dict[int, Callable[[], Any]]) -> Callable[[], Any]:
    seen[id(value)] = lambda: value  # a container that holds itself
    keys = list(value) if isinstance(value, dict) else None
    entries = [_remember(entry, seen) for entry in (value.values() if isinstance(value, dict) else value)]

    def back() -> Any:
        contents = [entry() for entry in entries]
        if isinstance(value, tuple):
            return value
        if keys is not None:
            if list(value) != keys or any(value[key] is not entry for key, entry in zip(keys, contents, strict=True)):
                value.clear()
                value.update(zip(keys, contents, strict=True))
        elif isinstance(value, set):
            if value != set(contents):
                value.clear()
                value.update(contents)
        elif len(value) != len(contents) or any(a is not b for a, b in zip(value, contents, strict=True)):
            value.clear()
            value.extend(contents)
        return value

    return back


def _remember_tensor(value: Tensor) -> Callable[[], Tensor]:
    version = None if value.is_inference() else value._version
    copy = value.detach().clone()

    def back() -> Tensor:
        if version is not None and value._version == version:
            return value
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            if value.shape != copy.shape:
                value.resize_(copy.shape)
            value.copy_(copy)
        return value

    return back
