"""Numbers of parameters and multiply-accumulates of dense and factorized layers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.conv import FactorizedConv
from lowrank_ops.nn.plain import same_padding
from lowrank_ops.runtime.compiled import uncompiled
from lowrank_ops.runtime.torch_internals import ConvBase, ConvTransposeBase


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, bias included. Shared parameters count once, those of lazy layers not at all."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def count_layer_weights(model: nn.Module, layer_name: str) -> int:
    """Number of weights of one layer of a model, dense or factorized, its bias included.

    `Report.to_pandas` has this number in the column `uncompressed_layer_size` for the dense layer and in
    `compressed_layer_size` for the factorized one. Weights that the layer uses twice count once.

    Args:
        model: the network.
        layer_name: the qualified name of a layer in it ("features.3"), or of a container, for the sum of its layers.

    Raises:
        TypeError: `model` is no nn.Module.
        KeyError: no layer of that name; the message has names that come close.
        ValueError: the layer is lazy: its size is unknown until the model has run once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count_layer_weights: model must be an nn.Module, got {type(model).__name__}")
    layers = dict(model.named_modules(remove_duplicate=False))
    with uncompiled(model) as plain:  # reports use the names of the uncompiled model
        layers.update(plain.named_modules(remove_duplicate=False))
    if layer_name not in layers:
        near = difflib.get_close_matches(layer_name, layers, 3) or [name for name in layers if name][:3]
        raise KeyError(
            f"count_layer_weights: layer_name must be the qualified name of a layer of {type(model).__name__}, got "
            f"{layer_name!r}; it has {', '.join(map(repr, near))}, see model.named_modules()"
        )
    if any(map(is_lazy, layers[layer_name].parameters())):
        raise ValueError(f"count_layer_weights: {layer_name!r} is lazy: run the model once, its size is unknown before")
    return count_parameters(layers[layer_name])


def count_macs(layer: nn.Module, input_shape: Sequence[int] | None = None) -> int | None:
    """Multiply-accumulates of a convolution, linear layer or factorized module.

    The count is that of the plain chain of stages: padding is multiplied like pixels; what a fused kernel computes
    twice at the borders of its tiles is not counted.

    Args:
        layer: dense or factorized.
        input_shape: of the layer's input, batched or not. None counts per output pixel (per row for a linear layer);
            the first stage of a strided block then works on more than one pixel.

    Returns:
        The count; None if it is unknown: a lazy layer, a transposed convolution without a shape, another kind of layer.
    """
    if any(map(is_lazy, layer.parameters())):
        return None
    if isinstance(layer, ConvBase):
        return _dense_conv_macs(layer, input_shape)
    if isinstance(layer, FactorizedConv):
        return _factorized_conv_macs(layer, input_shape)
    rows = 1 if input_shape is None else math.prod(input_shape[:-1])
    if isinstance(layer, nn.Linear):
        return rows * layer.in_features * layer.out_features
    if isinstance(layer, FactorizedModule):
        return rows * sum(factor.numel() for factor in layer.factors().values())
    return None


def _dense_conv_macs(layer: ConvBase, input_shape: Sequence[int] | None) -> int | None:
    per_pixel = math.prod(layer.weight.shape)  # [T, S / groups, *kernel], transposed [S, T / groups, *kernel]
    if input_shape is None:
        return None if isinstance(layer, ConvTransposeBase) else per_pixel
    axes = len(layer.kernel_size)
    images = math.prod(input_shape[: -axes - 1])
    sizes = tuple(input_shape[-axes:])
    pixels = sizes if isinstance(layer, ConvTransposeBase) else _output_sizes(layer, sizes)
    return images * per_pixel * math.prod(pixels)


def _factorized_conv_macs(layer: FactorizedConv, input_shape: Sequence[int] | None) -> int:
    steps = layer.dropped_steps()
    if input_shape is None:
        images, outputs = 1, (1,) * layer.axes
        inputs = tuple(stride // step for stride, step in zip(layer.stride, steps, strict=True))
    else:
        images = math.prod(input_shape[: -layer.axes - 1])
        sizes = tuple(input_shape[-layer.axes :])
        outputs = _output_sizes(layer, sizes)
        inputs = tuple(-(-size // step) for size, step in zip(sizes, steps, strict=True))
    first, *spatial, last = layer.factors().values()
    total = first.numel() * math.prod(inputs) + last.numel() * math.prod(outputs)
    done: tuple[int, ...] = ()  # axes along which the data has output pixels by now
    for factor in spatial:
        done = outputs if len(spatial) == 1 else outputs[: len(done) + 1]
        total += factor.numel() * math.prod(done) * math.prod(inputs[len(done) :])
    return images * total


def _output_sizes(layer: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    """Output pixels per axis of a dense or factorized convolution, by nn.Conv2d's formula."""
    result = []
    for axis, size in enumerate(sizes):
        kernel, dilation = layer.kernel_size[axis], layer.dilation[axis]
        if layer.padding == "same":
            padding = sum(same_padding(kernel, dilation))
        else:
            padding = 0 if layer.padding == "valid" else 2 * layer.padding[axis]
        result.append((size + padding - dilation * (kernel - 1) - 1) // layer.stride[axis] + 1)
    return tuple(result)
