"""Plain layers of torch: modules of the activations, padding="same", and layers built from given weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """The pixels before and after an axis that padding="same" adds; an odd pixel goes after, as in nn.Conv2d."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def activation_name(layer: nn.Module) -> str | None:
    """The ops' name of an activation module; None for any other layer, and for GELU's tanh approximation."""
    for name, kind in ACTIVATION_MODULES.items():
        if type(layer) is kind and getattr(layer, "approximate", "none") == "none":
            return name
    return None


def with_activation(layers: Iterable[nn.Module], activation: str) -> nn.Sequential:
    """The layers in an nn.Sequential, followed by the activation's module unless it is "none"."""
    tail = [] if activation == "none" else [ACTIVATION_MODULES[activation]()]
    return nn.Sequential(*layers, *tail)


def conv_layer(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | str = 0,  # type: ignore[assignment]
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> nn.Conv1d | nn.Conv2d:
    """A plain convolution that holds a copy of `weight` `[T, S/groups, *kernel]`, requires_grad included."""
    kind = nn.Conv1d if weight.dim() == 3 else nn.Conv2d
    conv = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=bias is not None,
        padding_mode=padding_mode,  # type: ignore[arg-type]
        device="meta",  # no values to initialize, no random numbers drawn
    )
    conv.weight = copy_parameter(weight)
    conv.bias = None if bias is None else copy_parameter(bias)
    return conv


def linear_layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A plain linear layer that holds a copy of `weight` `[T, S]`, requires_grad included."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = copy_parameter(weight)
    linear.bias = None if bias is None else copy_parameter(bias)  # type: ignore[assignment]
    return linear


@torch.inference_mode(False)  # inference tensors cannot be trained
def copy_parameter(tensor: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """A contiguous copy as a new parameter; `requires_grad` None keeps the tensor's."""
    value = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=tensor.requires_grad if requires_grad is None else requires_grad)


def is_matrix(layer: Layer) -> bool:
    """Whether the layer is a linear layer or a 1x1 convolution."""
    return isinstance(layer, nn.Linear) or all(size == 1 for size in layer.kernel_size)


Layer = nn.Conv1d | nn.Conv2d | nn.Linear
