"""Which layers of a model `include=` and `exclude=` select, and which need to be named one by one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lowrank_ops.compress.reasons import Left, Reason
from lowrank_ops.model.sites import Site

Selector = str | type | Callable[[str, nn.Module], bool]
Selectors = Selector | Iterable[Selector] | None

# Layers with at most this many channels on a side stay dense where one rank counts for all layers: half of three
# channels is one, which costs much of the output and saves next to nothing.
_NARROW = 8


def select(model: nn.Module, sites: list[Site], include: Selectors, exclude: Selectors) -> list[Reason | None]:
    """For each site why `include` and `exclude` leave it out, or None. Raises ValueError for one without a match."""
    modules = dict(model.named_modules(remove_duplicate=False))
    excluding = [(selector, _matches(selector, "exclude", sites, modules)) for selector in _listed("exclude", exclude)]
    including = [_matches(selector, "include", sites, modules) for selector in _listed("include", include)]
    reasons: list[Reason | None] = []
    for index in range(len(sites)):
        by = next((selector for selector, found in excluding if found[index]), None)
        if by is not None:
            reasons.append(Left.EXCLUDED.because(selector=_shown(by)))
        elif include is not None and not any(found[index] for found in including):
            reasons.append(Left.NOT_INCLUDED.because())
        else:
            reasons.append(None)
    return reasons


def named(sites: list[Site], include: Selectors) -> list[bool]:
    """For each site whether `include` lists its qualified name itself; patterns, types and callables do not count."""
    names = [selector for selector in _listed("include", include) if isinstance(selector, str)]
    return [any(name in names for name in site.names) for site in sites]


def is_narrow(layer: Any) -> bool:
    """Whether a convolution or linear layer is one that stays dense where one rank counts for all layers."""
    return min(_sides(layer)) <= _NARROW


def too_narrow(site: Site) -> Reason | None:
    """The reason to leave a narrow layer, or None."""
    if not is_narrow(site.layer):
        return None
    inputs, outputs = _sides(site.layer)
    return Left.NARROW.because(limit=_NARROW, inputs=inputs, outputs=outputs, name=site.names[0])


def _sides(layer: Any) -> tuple[int, int]:
    """Channels or features in and out."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _listed(argument: str, selectors: Selectors) -> list[Selector]:
    if selectors is None:
        return []
    several = isinstance(selectors, Iterable) and not isinstance(selectors, (str, type, nn.Module))
    listed: list[Any] = list(selectors) if several else [selectors]  # type: ignore[arg-type]
    for selector in listed:
        if isinstance(selector, nn.Module) or not (isinstance(selector, (str, type)) or callable(selector)):
            raise TypeError(
                f"factorize_: {argument} takes patterns, types and callables (name, layer) -> bool, got "
                f"{type(selector).__name__}; a module goes by its qualified name"
            )
    return listed


def _shown(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", str(selector))


def _matches(selector: Selector, argument: str, sites: list[Site], modules: Mapping[str, nn.Module]) -> list[bool]:
    found = [any(_selected(selector, name, site.layer, modules) for name in site.names) for site in sites]
    if not any(found):
        names = [name for site in sites for name in site.names]
        near = difflib.get_close_matches(selector, names, 3) if isinstance(selector, str) else []
        raise ValueError(
            f"factorize_: {argument} {_shown(selector)} matches no convolution or linear layer; the model "
            f"has {', '.join(near or names[:8]) or 'none'}{'' if near or len(names) <= 8 else ', ...'}"
        )
    return found


def _selected(selector: Selector, name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    parts = name.split(".")
    within = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(outer, selector) for outer in within)
    if isinstance(selector, type):
        return isinstance(layer, selector) or any(isinstance(modules.get(outer), selector) for outer in within)
    return bool(selector(name, layer))
