"""Nested tensors (torch.nested) as inputs: one tensor that holds sequences of different lengths without padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def is_nested(value: object) -> bool:
    """Whether the value is a nested tensor, of either layout."""
    return isinstance(value, Tensor) and value.is_nested


def values_of(tensor: Tensor) -> Tensor:
    """The rows of a jagged nested tensor as one dense tensor `[rows, ...]`; any other tensor unchanged."""
    return tensor.values() if tensor.is_nested and tensor.layout == torch.jagged else tensor


def refuse_nested(name: str, input: Tensor) -> None:
    """Raises ValueError if the input of a convolution is a nested tensor; `name` is the op or module, for the
    message."""
    if isinstance(input, Tensor) and input.is_nested:  # `is_nested`, without a call: this runs in every convolution
        raise ValueError(
            f"{name}: input must be a dense tensor, got a nested tensor; pad it (torch.nested.to_padded_tensor), or "
            "call this on each tensor of input.unbind()"
        )


def on_values(name: str, linear: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Applies a linear layer to a jagged nested tensor: to its values, keeping the offsets. Differentiable.

    Args:
        name: the op or module, for error messages.
        linear: maps `[rows, ..., S]` to `[rows, ..., T]`.
        input: a contiguous jagged nested tensor `[B, ragged, ..., S]`, as nn.Linear takes it.

    Raises:
        ValueError: a nested tensor of the strided layout, or a jagged one that is transposed or has holes.
    """
    if input.layout != torch.jagged:
        raise ValueError(
            f"{name}: a nested input must have the layout torch.jagged, got {input.layout}; convert it with "
            "torch.nested.as_nested_tensor(input.unbind(), layout=torch.jagged), or call this on each tensor of "
            "input.unbind()"
        )
    if not input.is_contiguous():
        raise ValueError(
            f"{name}: a nested input must be contiguous, its ragged axis the second one, without holes; got one of "
            f"shape {tuple(input.shape)} that is not: call input.contiguous() before, or transpose it back"
        )
    offsets: Tensor = input.offsets()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(linear(input.values()), offsets)
