"""Finding layers in a model, and putting others in their places, with hooks and attributes."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Linear)
# Names in the __dict__ of a new module of each kind; for a module, the first kind that it is an instance of counts.
_NEW = {
    nn.Conv1d: set(vars(nn.Conv1d(1, 1, 1, device="meta"))),
    nn.Conv2d: set(vars(nn.Conv2d(1, 1, 1, device="meta"))),
    nn.Linear: set(vars(nn.Linear(1, 1, device="meta"))),
    nn.Module: set(vars(nn.Module())),
}


@dataclass
class Site:
    """A layer, and all places where it stands in the model.

    Attributes:
        places: parent modules, each with the name of this layer in it.
        names: qualified names, in the model's order.
    """

    layer: nn.Module
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def put(self, layer: nn.Module) -> None:
        """Puts `layer` where this one stands."""
        for parent, key in self.places:
            parent._modules[key] = layer


def find_sites(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Site]:
    """The layers inside `model` for which `wanted` holds, each once, in the model's order."""
    sites: dict[int, Site] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in modules.items():
        if name and wanted(layer):
            site = sites.setdefault(id(layer), Site(layer))
            parent_name, _, key = name.rpartition(".")
            site.names.append(name)
            if not any(parent is modules[parent_name] and key == known for parent, known in site.places):
                site.places.append((modules[parent_name], key))
    return list(sites.values())


@contextmanager
def put_in(sites: Sequence[Site], modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within it `modules` (by the layers' ids) stand where the layers of `sites` do; a layer without one stays."""
    try:
        for site in sites:
            site.put(modules.get(id(site.layer), site.layer))
        yield
    finally:
        for site in sites:
            site.put(site.layer)


class Owners:
    """Which modules of a model own which parameters, and which hold others in plain attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    owner = f"{name}.{key}" if name else f"{type(model).__name__}.{key}"
                    self._owners[id(parameter)].append((module, owner))

        self._holders: dict[int, str] = {}
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if key not in _NEW[nn.Module]:
                    owner = f"{name}.{key}" if name else f"{type(model).__name__}.{key}"
                    self._holders.update((id(held), owner) for held in _modules_in(value))

    def held(self, layer: nn.Module) -> str | None:
        """Why a layer cannot be replaced because an attribute holds it too; None if none does."""
        holder = self._holders.get(id(layer))
        if holder is None:
            return None
        return f"the attribute {holder} holds it too, and would keep it: make that an nn.ModuleList or nn.ModuleDict"

    def sharing(self, layer: nn.Module) -> str | None:
        """The name of another module's parameter that is also one of this layer's, or None."""
        for parameter in layer._parameters.values():
            for module, name in self._owners.get(id(parameter), []):
                if module is not layer:
                    return name
        return None


def _modules_in(value: Any) -> list[nn.Module]:
    """The modules in a value: the value itself, or those in lists, tuples, sets, deques and mappings."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    pending = [value]
    while pending:
        entry = pending.pop()
        if isinstance(entry, nn.Module):
            found.append(entry)
        elif isinstance(entry, (list, tuple, set, frozenset, deque, Mapping)) and id(entry) not in seen:
            seen.add(id(entry))
            pending += entry.values() if isinstance(entry, Mapping) else entry
    return found


def has_hooks(layer: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on the layer itself."""
    return any(getattr(layer, hooks) for hooks in HOOKS)


def without_hooks(layer: nn.Module) -> nn.Module:
    """The layer with the same parameters, but none of its forward and backward hooks."""
    bare = copy.copy(layer)
    for hooks in HOOKS:
        object.__setattr__(bare, hooks, OrderedDict())
    return bare


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Makes `target` share the dictionaries of hooks of `source`, so that handles still remove their hooks."""
    for hooks in (*HOOKS, "_is_full_backward_hook"):
        object.__setattr__(target, hooks, getattr(source, hooks))


def plain_kind(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer is of or derives from: nn.Conv1d, nn.Conv2d or nn.Linear."""
    return next(kind for kind in PLAIN if isinstance(layer, kind))


def own_attributes(layer: nn.Module) -> dict[str, Any]:
    """Attributes that were set on a layer (`layer.index = 3`): those that a new layer of its kind does not have. For
    layers that are no convolution or linear layer: those that a new nn.Module does not have."""
    known = next(names for kind, names in _NEW.items() if isinstance(layer, kind))
    return {name: value for name, value in vars(layer).items() if name not in known}


def keep_attributes(layer: nn.Module, replacement: nn.Module) -> None:
    """Copies the attributes that were set on a layer to its replacement, unless it has an attribute of that name."""
    for name, value in own_attributes(layer).items():
        if not hasattr(replacement, name):
            vars(replacement)[name] = value


def clash(layer: nn.Module, replacement: nn.Module) -> str | None:
    """Why a replacement cannot have all attributes of a convolution or linear layer; None if it can."""
    used = [name for name in own_attributes(layer) if isinstance(layer, PLAIN) and hasattr(replacement, name)]
    if not used:
        return None
    return f"it has an attribute {used[0]!r} of its own, a name that {type(replacement).__name__} uses itself"


def identity_for(layer: nn.Module) -> nn.Identity:
    """The module that takes the place of a layer that was folded: it has its training flag, and the attributes that
    were set on it."""
    identity = nn.Identity().train(layer.training)
    keep_attributes(layer, identity)
    return identity


def not_kept(layer: nn.Module) -> str | None:
    """Why a replacement could not have everything that a layer has; None if it can."""
    kind = plain_kind(layer)
    held = [name for name in (*layer._parameters, *layer._buffers, *layer._modules) if name not in ("weight", "bias")]
    if held:
        return f"it holds {', '.join(map(repr, held))} besides weight and bias, which its replacement would lack"
    names = [name for name in dir(type(layer)) if not name.startswith("_") and not hasattr(kind, name)]
    if names:
        return (
            f"{type(layer).__name__} adds {', '.join(map(repr, names))} to nn.{kind.__name__}, which its replacement "
            "would lack"
        )
    replaced = [name for name in own_attributes(layer) if hasattr(kind, name)]
    if replaced:
        return f"its {', '.join(replaced)} was set on the instance (by compile() or the like): do so after factorize_"
    if any(getattr(layer, hooks) for hooks in STATE_HOOKS):
        return "it has state_dict hooks, made for the names weight and bias"
    if any(map(_has_gradient_hooks, layer.parameters())):
        return "its weight or bias has gradient hooks, which new parameters would lack"
    return None


def _has_gradient_hooks(parameter: torch.Tensor) -> bool:
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))
