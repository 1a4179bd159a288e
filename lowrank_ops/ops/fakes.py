"""The fake (meta) kernels of the ops.

A fake kernel returns a tensor of the shape, dtype and strides of the real result, under symbolic shapes too. It
enforces the rules of `csrc/ops/checks.cpp`, so that `torch.compile` and `torch.export` refuse the same calls, at trace
time. The C++ checks read sizes as numbers and cannot run on symbolic shapes: the rules are repeated here, and
`tests/ops/test_errors.py` compares every message of the one with that of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_ops.ops.extension import ACTIVATIONS, DTYPES
from lowrank_ops.runtime.torch_internals import check_type, check_value, suggest_memory_format

Gradient = Tensor | None


_LARGEST = 2**31 - 1  # that a number of the window may be


def _check_dim(op: str, name: str, tensor: Tensor, dim: int, shape: str) -> None:
    check_value(tensor.dim() == dim, lambda: f"{op}: {name} must be {shape}, got shape {list(tensor.shape)}")


def _check_size(op: str, name: str, tensor: Tensor, axis: int, required: int, why: str) -> None:
    check_value(
        tensor.shape[axis] == required,
        lambda: f"{op}: {name} must have size {required} on axis {axis} ({why}), got shape {list(tensor.shape)}",
    )


def _check_kind(op: str, input: Tensor, factors: dict[str, Tensor], bias: Tensor | None) -> None:
    check_type(
        input.dtype in DTYPES,
        lambda: f"{op}: input must be float32, float64, bfloat16 or float16, got {input.dtype}",
    )

    def check(name: str, tensor: Tensor) -> None:
        check_type(
            tensor.dtype == input.dtype,
            lambda: (
                f"{op}: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}; convert the module or "
                "the input with .to(dtype), or run under torch.autocast"
            ),
        )
        check_value(
            tensor.device == input.device,
            lambda: f"{op}: {name} must be on the input's device {input.device}, got {tensor.device}",
        )

    for name, factor in factors.items():
        check(name, factor)
        message = f"{op}: {name} must have no axis of size 0 (ranks are at least 1), got shape {list(factor.shape)}"
        for size in factor.shape:
            check_value(size > 0, lambda message=message: message)
    if bias is not None:
        check("bias", bias)


def _check_bias(op: str, bias: Tensor | None, out_factor: Tensor) -> None:
    if bias is not None:
        t = out_factor.shape[0]
        message = f"{op}: bias must be [T] = [{t}] (the rows of out_factor) or None, got shape {list(bias.shape)}"
        check_value(bias.dim() == 1, lambda: message)
        check_value(bias.shape[0] == t, lambda: message)


def _check_activation(op: str, activation: str) -> None:
    check_value(
        activation in ACTIVATIONS,
        lambda: f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'",
    )


def _conv_output(
    op: str,
    input: Tensor,
    out_factor: Tensor,
    kernel: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape = [input.shape[0], out_factor.shape[0]]
    for argument, values in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        check_value(
            len(values) == 2,
            lambda argument=argument, values=values: (
                f"{op}: {argument} must have 2 entries (height, width), got {list(values)}"
            ),
        )
        for value in values:
            check_value(
                value <= _LARGEST,
                lambda argument=argument, values=values: (
                    f"{op}: {argument} must be at most {_LARGEST}, got {list(values)}"
                ),
            )
    for axis, name in enumerate(("height", "width")):
        for argument, values, least in (
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        ):
            check_value(
                values[axis] >= least,
                lambda argument=argument, values=values, least=least: (
                    f"{op}: {argument} must be at least {least} on each axis, got {list(values)}"
                ),
            )
        padded = input.shape[2 + axis] + 2 * padding[axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        check_value(
            padded >= reach,
            lambda name=name, padded=padded, reach=reach: (
                f"{op}: the output would be empty: the kernel reaches over {reach} pixels along the {name}, "
                f"the padded input has {padded}; enlarge the padding or the input"
            ),
        )
        shape.append((padded - reach) // stride[axis] + 1)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=suggest_memory_format(input))


def _gradients(output_mask: Sequence[bool], *arguments: Tensor) -> tuple[Gradient, ...]:
    """An unset gradient for each argument that the mask asks for, dense in the argument's memory format."""
    return tuple(
        torch.empty(
            argument.shape,
            dtype=argument.dtype,
            device=argument.device,
            memory_format=suggest_memory_format(argument) if argument.dim() == 4 else torch.contiguous_format,
        )
        if wanted
        else None
        for wanted, argument in zip(output_mask, arguments, strict=True)
    )


def _check_grad_output(op: str, grad_output: Tensor, output: Tensor) -> None:
    def shapes() -> str:
        required, given = list(output.shape), list(grad_output.shape)
        return f"{op}: grad_output must have the output's shape {required}, got {given}"

    check_value(grad_output.dim() == output.dim(), shapes)
    for size, required in zip(grad_output.shape, output.shape, strict=True):
        check_value(size == required, shapes)
    check_type(
        grad_output.dtype == output.dtype,
        lambda: f"{op}: grad_output must have the input's dtype {output.dtype}, got {grad_output.dtype}",
    )
    check_value(
        grad_output.device == output.device,
        lambda: f"{op}: grad_output must be on the input's device {output.device}, got {grad_output.device}",
    )


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"lowrank_ops::{name}")


@_fake("tucker_conv2d")
def _tucker_conv2d(
    input: Tensor,
    in_factor: Tensor,
    core: Tensor,
    out_factor: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    op = "tucker_conv2d"
    _check_activation(op, activation)
    _check_dim(op, "input", input, 4, "[N, S, H, W]")
    _check_dim(op, "in_factor", in_factor, 2, "[R1, S]")
    _check_dim(op, "core", core, 4, "[R2, R1, KH, KW]")
    _check_dim(op, "out_factor", out_factor, 2, "[T, R2]")
    _check_kind(op, input, {"in_factor": in_factor, "core": core, "out_factor": out_factor}, bias)
    _check_size(op, "in_factor", in_factor, 1, input.shape[1], "S, the channels of input")
    _check_size(op, "core", core, 1, in_factor.shape[0], "R1, the rows of in_factor")
    _check_size(op, "out_factor", out_factor, 1, core.shape[0], "R2, the first axis of core")
    _check_bias(op, bias, out_factor)
    return _conv_output(op, input, out_factor, (core.shape[2], core.shape[3]), stride, padding, dilation)


@_fake("cp_conv2d")
def _cp_conv2d(
    input: Tensor,
    in_factor: Tensor,
    height_factor: Tensor,
    width_factor: Tensor,
    out_factor: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    op = "cp_conv2d"
    _check_activation(op, activation)
    factors = {
        "in_factor": in_factor,
        "height_factor": height_factor,
        "width_factor": width_factor,
        "out_factor": out_factor,
    }
    _check_dim(op, "input", input, 4, "[N, S, H, W]")
    for (name, factor), shape in zip(factors.items(), ("[R, S]", "[R, KH]", "[R, KW]", "[T, R]"), strict=True):
        _check_dim(op, name, factor, 2, shape)
    _check_kind(op, input, factors, bias)
    _check_size(op, "in_factor", in_factor, 1, input.shape[1], "S, the channels of input")
    for name, axis in (("height_factor", 0), ("width_factor", 0), ("out_factor", 1)):
        _check_size(op, name, factors[name], axis, in_factor.shape[0], "R, the rows of in_factor")
    _check_bias(op, bias, out_factor)
    kernel = (height_factor.shape[1], width_factor.shape[1])
    return _conv_output(op, input, out_factor, kernel, stride, padding, dilation)


@_fake("lowrank_linear")
def _lowrank_linear(
    input: Tensor, in_factor: Tensor, out_factor: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    op = "lowrank_linear"
    _check_activation(op, activation)
    check_value(input.dim() >= 1, lambda: f"{op}: input must be [..., S], got a tensor of no axes")
    _check_dim(op, "in_factor", in_factor, 2, "[R, S]")
    _check_dim(op, "out_factor", out_factor, 2, "[T, R]")
    _check_kind(op, input, {"in_factor": in_factor, "out_factor": out_factor}, bias)
    _check_size(op, "in_factor", in_factor, 1, input.shape[-1], "S, the last axis of input")
    _check_size(op, "out_factor", out_factor, 1, in_factor.shape[0], "R, the rows of in_factor")
    _check_bias(op, bias, out_factor)
    return input.new_empty([*input.shape[:-1], out_factor.shape[0]])


@_fake("tucker_conv2d_prepared")
def _tucker_conv2d_prepared(*arguments: Any) -> Tensor:
    return _tucker_conv2d(*arguments[:-1])  # without the packed weights


@_fake("cp_conv2d_prepared")
def _cp_conv2d_prepared(*arguments: Any) -> Tensor:
    return _cp_conv2d(*arguments[:-1])  # without the packed weights


@_fake("lowrank_linear_prepared")
def _lowrank_linear_prepared(*arguments: Any) -> Tensor:
    return _lowrank_linear(*arguments[:-1])  # without the packed weights


@_fake("tucker_conv2d_backward")
def _tucker_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    in_factor: Tensor,
    core: Tensor,
    out_factor: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, ...]:
    output = _tucker_conv2d(input, in_factor, core, out_factor, bias, stride, padding, dilation, activation)
    _check_grad_output("tucker_conv2d_backward", grad_output, output)
    return _gradients(output_mask, input, in_factor, core, out_factor, out_factor[:, 0])


@_fake("cp_conv2d_backward")
def _cp_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    in_factor: Tensor,
    height_factor: Tensor,
    width_factor: Tensor,
    out_factor: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, ...]:
    factors = (in_factor, height_factor, width_factor, out_factor)
    output = _cp_conv2d(input, *factors, bias, stride, padding, dilation, activation)
    _check_grad_output("cp_conv2d_backward", grad_output, output)
    return _gradients(output_mask, input, *factors, out_factor[:, 0])


@_fake("lowrank_linear_backward")
def _lowrank_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    in_factor: Tensor,
    out_factor: Tensor,
    bias: Tensor | None,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Gradient, ...]:
    output = _lowrank_linear(input, in_factor, out_factor, bias, activation)
    _check_grad_output("lowrank_linear_backward", grad_output, output)
    rows = input if input.dim() != 4 else input.flatten(0, 2)
    gradients = _gradients(output_mask, rows, in_factor, out_factor, out_factor[:, 0])
    return (None if gradients[0] is None else gradients[0].view(input.shape), *gradients[1:])
