"""The three ops as functions, and `call_op`, by which the modules call them too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# This import loads the extension, which registers torch.ops.lowrank_ops.
from lowrank_ops.ops.extension import ACTIVATIONS as ACTIVATIONS
from lowrank_ops.ops.extension import ops_for
from lowrank_ops.runtime.nested import on_values, refuse_nested

HeightWidth = int | tuple[int, int] | list[int]
"""An int for both axes, or (height, width)."""

_PREPARED = {op: f"{op}_prepared" for op in ("tucker_conv2d", "cp_conv2d", "lowrank_linear")}


def tucker_conv2d(
    input: Tensor,
    in_factor: Tensor,
    core: Tensor,
    out_factor: Tensor,
    bias: Tensor | None = None,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    activation: str = "none",
) -> Tensor:
    """Tucker-2 convolution as one op: 1x1 (S to R1), KHxKW (R1 to R2), 1x1 (R2 to T), bias, activation.

    Equals `F.conv2d(input, W, bias, stride, padding, dilation)` followed by the activation, with
    `W[t, s, i, j] = sum_{a, b} out_factor[t, b] core[b, a, i, j] in_factor[a, s]` (Kim et al.,
    arXiv:1511.06530, section 3), up to rounding.

    Args:
        input: `[N, S, H, W]`, float32, float64, bfloat16 or float16, any strides.
        in_factor: `[R1, S]`, same dtype and device as `input`, as are the following.
        core: `[R2, R1, KH, KW]`; stored as `torch.channels_last` it is packed fastest.
        out_factor: `[T, R2]`.
        bias: `[T]` or None.
        stride, padding, dilation: of the core convolution, an int or (height, width); zero padding.
        activation: one of none, relu, relu6, hardswish, silu, gelu (exact, erf).

    Returns:
        `[N, T, OH, OW]` in `input.suggest_memory_format()` (NCHW or channels_last).

    Raises:
        ValueError: shapes that disagree, a stride or dilation below 1, a negative padding, an unknown activation,
            tensors on different devices, or an output with no pixels.
        TypeError: dtypes that differ or are not supported.
    """
    tensors = (input, in_factor, core, out_factor, bias)
    refuse_nested("tucker_conv2d", input)
    return call_op("tucker_conv2d", tensors, (stride, padding, dilation, activation))


def cp_conv2d(
    input: Tensor,
    in_factor: Tensor,
    height_factor: Tensor,
    width_factor: Tensor,
    out_factor: Tensor,
    bias: Tensor | None = None,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    activation: str = "none",
) -> Tensor:
    """CP convolution as one op: 1x1 (S to R), KHx1 depthwise, 1xKW depthwise, 1x1 (R to T), bias, activation.

    Equals `F.conv2d(input, W, bias, stride, padding, dilation)` followed by the activation, with
    `W[t, s, i, j] = sum_r out_factor[t, r] in_factor[r, s] height_factor[r, i] width_factor[r, j]` (Lebedev et
    al., arXiv:1412.6553, section 3), up to rounding.

    Args:
        input: `[N, S, H, W]`, float32, float64, bfloat16 or float16, any strides.
        in_factor: `[R, S]`, same dtype and device as `input`, as are the following.
        height_factor: `[R, KH]`.
        width_factor: `[R, KW]`.
        out_factor: `[T, R]`.
        bias: `[T]` or None.
        stride, padding, dilation: an int or (height, width); zero padding.
        activation: one of none, relu, relu6, hardswish, silu, gelu (exact, erf).

    Returns:
        `[N, T, OH, OW]` in `input.suggest_memory_format()` (NCHW or channels_last).

    Raises:
        ValueError: shapes that disagree, a stride or dilation below 1, a negative padding, an unknown activation,
            tensors on different devices, or an output with no pixels.
        TypeError: dtypes that differ or are not supported.
    """
    tensors = (input, in_factor, height_factor, width_factor, out_factor, bias)
    refuse_nested("cp_conv2d", input)
    return call_op("cp_conv2d", tensors, (stride, padding, dilation, activation))


def lowrank_linear(
    input: Tensor, in_factor: Tensor, out_factor: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Low-rank linear layer as one op: `activation((input in_factor^T) out_factor^T + bias)`.

    Args:
        input: `[..., S]`, float32, float64, bfloat16 or float16, any strides; or a nested tensor
            `[B, ragged, ..., S]` of the layout torch.jagged, contiguous.
        in_factor: `[R, S]`, same dtype and device as `input`, as are the following.
        out_factor: `[T, R]`.
        bias: `[T]` or None.
        activation: one of none, relu, relu6, hardswish, silu, gelu (exact, erf).

    Returns:
        `[..., T]`, contiguous; nested, with the input's offsets, if the input is.

    Raises:
        ValueError: shapes that disagree, an unknown activation, tensors on different devices, a nested tensor
            of another layout.
        TypeError: dtypes that differ or are not supported.
    """
    if isinstance(input, Tensor) and input.is_nested:
        return on_values(
            "lowrank_linear", lambda rows: lowrank_linear(rows, in_factor, out_factor, bias, activation), input
        )
    return call_op("lowrank_linear", (input, in_factor, out_factor, bias), (activation,))


def call_op(
    op: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], packed: Tensor | None = None
) -> Tensor:
    """Calls an op: the only way from Python to the three of them, for the functions above and for the modules.

    Args:
        op: tucker_conv2d, cp_conv2d or lowrank_linear.
        tensors: the op's tensors in the order of its schema: input, factors, bias.
        options: its other arguments in that order: stride, padding and dilation (not for a linear layer), activation.
        packed: the factors as the extension's `prepare` has packed them; None packs them in the call.
    """
    ops = ops_for(*tensors)
    if packed is None:
        return getattr(ops, op)(*tensors, *options)  # type: ignore[no-any-return]
    return getattr(ops, _PREPARED[op])(*tensors, *options, packed)  # type: ignore[no-any-return]
