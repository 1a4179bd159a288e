"""Checks of the modules' arguments, and of layers that they are to replace."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lowrank_ops.decompose.ranks import VBMF, Energy, Rank
from lowrank_ops.model.sites import plain_kind
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.ops.extension import ACTIVATIONS, DTYPES
from lowrank_ops.runtime.computed import remedy
from lowrank_ops.runtime.torch_internals import ConvBase, ConvTransposeBase


def refusal(layer: nn.Module) -> str | None:
    """Why a convolution or linear layer cannot be replaced by a factorized module; None if it can.

    Where there is something to do about it, the reason says what.
    """
    if isinstance(layer, FactorizedModule):
        return "already factorized; call to_dense() first to factorize it anew"
    if isinstance(layer, ConvTransposeBase):
        return "a transposed convolution: there is no factorized op for it"
    if isinstance(layer, ConvBase) and len(layer.kernel_size) > 2:
        return "a three-dimensional convolution: there is no factorized op for it"
    if "weight" not in layer._parameters or ("bias" not in layer._parameters):
        return f"its weight or bias is computed at each call: {remedy(layer)}"
    if isinstance(layer.weight, UninitializedParameter):
        return "lazy: its shape is unknown until the model has run once"
    plain = plain_kind(layer)
    for method in ("forward", "_conv_forward"):
        if method in vars(layer):
            return f"its {method} was replaced on the instance (by accelerate or the like), which may change it"
        if getattr(type(layer), method, None) is not getattr(plain, method, None):
            return f"{type(layer).__name__} overrides {plain.__name__}.{method}, which may change it"
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = getattr(layer, "groups", 1)
    if groups != 1:
        return groups_reason(int(groups))
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; only {', '.join(map(str, DTYPES))} are supported"
    if weight.is_meta:
        return "its weight is on the meta device and has no values: load them first"
    return None


def check_replaceable(target: str, layer: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Raises ValueError or TypeError unless `layer` is of class `kind` and a module of class `target` can replace it;
    `name` is the layer in the message."""
    if isinstance(layer, FactorizedModule):
        raise ValueError(f"{target}: {name} is {refusal(layer)}")
    if not isinstance(layer, kind):
        raise TypeError(f"{target}: {name} must be an nn.{kind.__name__}, got {type(layer).__name__}")
    reason = refusal(layer)
    if reason is not None:
        raise ValueError(f"{target}: {name} cannot be factorized: {reason}")


def groups_reason(groups: int) -> str:
    """Why a convolution with this number of groups cannot be factorized."""
    return (
        f"groups must be 1, got {groups}: a grouped or depthwise convolution is no single factorized "
        "block; keep it as it is (it has few multiplications), or factorize one convolution per group"
    )


def refuse_energy(name: str, rank: Rank) -> None:
    """Raises TypeError for a rank that depends on a weight's values; `name` is the module in the message."""
    if any(isinstance(entry, (Energy, VBMF)) for entry in (rank if isinstance(rank, (tuple, list)) else (rank,))):
        raise TypeError(
            f"{name}: rank must be an int, a fraction or a pair, got {rank}: a new layer has no weight whose "
            "singular values could be measured; use from_conv2d, from_conv1d or from_linear"
        )


def check_activation(name: str, activation: str) -> str:
    """The activation; raises ValueError if the ops do not have it."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    return activation


def at_least(name: str, argument: str, value: int, smallest: int) -> int:
    """The value; raises TypeError if it is no int, ValueError if it is below `smallest`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an int, got {value!r}")
    if value < smallest:
        raise ValueError(f"{name}: {argument} must be at least {smallest}, got {value}")
    return value


def layers_of(name: str, seq: nn.Sequential) -> list[nn.Module]:
    """The layers of an argument of `from_sequential`; raises TypeError or ValueError if it is no nn.Sequential."""
    if isinstance(seq, FactorizedModule):
        raise ValueError(f"{name}: the chain is already factorized, got {type(seq).__name__}")
    if not isinstance(seq, nn.Sequential):
        raise TypeError(f"{name}: from_sequential takes an nn.Sequential, got {type(seq).__name__}")
    return list(seq)
