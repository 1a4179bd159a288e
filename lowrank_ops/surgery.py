"""Finding layers in a model, and putting others in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass
class Site:
    """A layer and everywhere it stands in the model."""

    layer: nn.Module
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def put(self, layer: nn.Module) -> None:
        """Puts `layer` where this one stands."""
        for parent, key in self.places:
            parent._modules[key] = layer


def find_sites(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Site]:
    """The layers below `model` that are wanted, each once, in the model's order."""
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


class Owners:
    """Which modules of a model own which parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    owner = f"{name}.{key}" if name else f"{type(model).__name__}.{key}"
                    self._owners[id(parameter)].append((module, owner))

    def sharing(self, layer: nn.Module) -> str | None:
        """The name of another module's parameter that is also one of this layer's, or None."""
        for parameter in layer._parameters.values():
            for module, name in self._owners.get(id(parameter), []):
                if module is not layer:
                    return name
        return None


def has_hooks(layer: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on the layer itself."""
    return any(getattr(layer, hooks) for hooks in HOOKS)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Makes `target` own the hooks of `source`, as the same dictionaries: handles still remove their hook."""
    for hooks in (*HOOKS, "_is_full_backward_hook"):
        object.__setattr__(target, hooks, getattr(source, hooks))
