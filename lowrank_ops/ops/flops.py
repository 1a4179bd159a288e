"""FLOP formulas of the ops for `torch.utils.flop_counter.FlopCounterMode`.

A formula counts two FLOPs per multiply-accumulate of the block's plain convolutions or matrix products, whatever kernel
runs them, as torch does for its own convolutions. Bias and activation are not counted. A backward op includes the
stages that it recomputes. `torch.profiler`'s `with_flops` cannot count ops of an extension: it has a fixed list of
torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import lowrank_ops.ops.extension  # noqa: F401, registers torch.ops.lowrank_ops

Shape = Sequence[int]


def _tucker_stages(input: Shape, in_factor: Shape, core: Shape, out_factor: Shape, output: Shape) -> list[int]:
    pixels = output[0] * prod(output[2:])
    return [input[0] * prod(input[2:]) * prod(in_factor), pixels * prod(core), pixels * prod(out_factor)]


def _cp_stages(
    input: Shape, in_factor: Shape, height: Shape, width: Shape, out_factor: Shape, output: Shape
) -> list[int]:
    pixels = output[0] * prod(output[2:])
    between = output[0] * output[2] * input[3]  # the height is convolved first
    first = input[0] * prod(input[2:]) * prod(in_factor)
    return [first, between * prod(height), pixels * prod(width), pixels * prod(out_factor)]


def _linear_stages(input: Shape, in_factor: Shape, out_factor: Shape) -> list[int]:
    rows = prod(input[:-1])
    return [rows * prod(in_factor), rows * prod(out_factor)]


def _backward(stages: list[int], activation: str, mask: Sequence[bool]) -> int:
    """FLOPs of a backward op, as `block_gradients` of csrc/ops/backward.cpp works: the stages that it recomputes, then
    one product per gradient. `stages` are multiply-accumulates per stage; `mask` says which gradients are wanted:
    input, factors, bias."""
    wants_input, *wants_weight = mask[:-1]
    count = len(stages)
    needed = [i for i, wanted in enumerate(wants_weight) if wanted]
    recomputed = count if activation != "none" else max(needed, default=0)
    lowest = 0 if wants_input else min(needed, default=count)
    total = sum(stages[:recomputed])
    for i in range(lowest, count):
        total += stages[i] * ((wants_input or i > lowest) + wants_weight[i])
    return 2 * total


_ops: Any = torch.ops.lowrank_ops


@register_flop_formula([_ops.tucker_conv2d, _ops.tucker_conv2d_prepared])
def _tucker(
    input: Shape, in_factor: Shape, core: Shape, out_factor: Shape, *_: Any, out_shape: Shape, **__: Any
) -> int:
    return 2 * sum(_tucker_stages(input, in_factor, core, out_factor, out_shape))


@register_flop_formula([_ops.cp_conv2d, _ops.cp_conv2d_prepared])
def _cp(
    input: Shape, in_factor: Shape, height: Shape, width: Shape, out_factor: Shape, *_: Any, out_shape: Shape, **__: Any
) -> int:
    return 2 * sum(_cp_stages(input, in_factor, height, width, out_factor, out_shape))


@register_flop_formula([_ops.lowrank_linear, _ops.lowrank_linear_prepared])
def _linear(input: Shape, in_factor: Shape, out_factor: Shape, *_: Any, **__: Any) -> int:
    return 2 * sum(_linear_stages(input, in_factor, out_factor))


@register_flop_formula(_ops.tucker_conv2d_backward)
def _tucker_backward(
    grad_output: Shape, input: Shape, in_factor: Shape, core: Shape, out_factor: Shape, *rest: Any, **_: Any
) -> int:
    *_window, activation, mask = rest
    return _backward(_tucker_stages(input, in_factor, core, out_factor, grad_output), activation, mask)


@register_flop_formula(_ops.cp_conv2d_backward)
def _cp_backward(
    grad_output: Shape,
    input: Shape,
    in_factor: Shape,
    height: Shape,
    width: Shape,
    out_factor: Shape,
    *rest: Any,
    **_: Any,
) -> int:
    *_window, activation, mask = rest
    return _backward(_cp_stages(input, in_factor, height, width, out_factor, grad_output), activation, mask)


@register_flop_formula(_ops.lowrank_linear_backward)
def _linear_backward(
    grad_output: Shape, input: Shape, in_factor: Shape, out_factor: Shape, *rest: Any, **_: Any
) -> int:
    *_bias, activation, mask = rest
    return _backward(_linear_stages(input, in_factor, out_factor), activation, mask)
