"""Layers whose weight is computed at each call (weight norm, spectral norm, pruning, parametrizations), and how to make
it an ordinary parameter again."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def remedy(layer: nn.Module) -> str:
    """What a user can do about the computed parameters of `layer`: the calls that make them permanent, as a phrase for
    an error message."""
    calls = []
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            calls.append(f"torch.nn.utils.remove_weight_norm(layer, {hook.name!r})")
        elif isinstance(hook, SpectralNorm):
            calls.append(f"torch.nn.utils.remove_spectral_norm(layer, {hook.name!r})")
        elif isinstance(hook, BasePruningMethod):
            calls.append(f"torch.nn.utils.prune.remove(layer, {hook._tensor_name!r})")
    names = layer.parametrizations if parametrize.is_parametrized(layer) else ()
    calls += [f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})" for name in names]  # type: ignore[union-attr]
    if not calls:
        return "make it an nn.Parameter of the layer first"
    return f"make it permanent first: {', '.join(calls)}"
