"""Chains of plain layers that equal one op: `read_tucker`, `read_cp` and `read_linear` give the op's arguments.

These chains are what the usual TensorLy recipes leave in a network (the TensorLy notebook, jacobgil's
pytorch-tensor-decompositions): 1x1, KxK, 1x1 for Tucker-2; 1x1, Kx1 depthwise, 1xK depthwise, 1x1 for CP; the same in
one dimension; Linear, Linear for a matrix. A chain that is not exactly equal to one op is refused with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.model.sites import has_hooks
from lowrank_ops.nn.plain import ACTIVATION_MODULES, activation_name, same_padding
from lowrank_ops.runtime.computed import remedy

AXES = ("height", "width")


class NotOneOp(ValueError):
    """A chain of layers that is not equal to one op; the message says why."""


@dataclass(frozen=True)
class Chain:
    """The arguments of the op that a chain equals.

    Attributes:
        factors: parameter name of the factorized module -> weight of a stage, in that module's shape.
        stages: the layers that these weights belong to, in the order of `factors`.
        bias: of the last layer.
        activation: "none", or the name of the activation after the last layer.
        stride, padding, dilation, kernel_size: of the convolution, one entry per axis; empty for a linear chain.
        padding_mode: as in nn.Conv2d.
    """

    factors: dict[str, Tensor]
    stages: tuple[nn.Module, ...]
    bias: nn.Parameter | None
    activation: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    kernel_size: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution: a window of `kernel` taps, `before` and `after` pixels of padding."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int


def read_tucker(layers: Iterable[nn.Module], axes: int) -> Chain:
    """Reads (1x1, KxK, 1x1), with an activation after them or none; `axes` is 1 or 2. Raises NotOneOp with the
    reason."""
    (first, core, last), activation = _stages(layers, 3, nn.Conv1d if axes == 1 else nn.Conv2d)
    _check_pointwise(first, "stage 1 of 3")
    _check_pointwise(last, "stage 3 of 3")
    if core.groups != 1:
        raise NotOneOp(
            f"stage 2 of 3 has groups={core.groups}: the core of a Tucker-2 block mixes all ranks "
            "(groups=1). A depthwise KxK core is neither a Tucker-2 nor a CP block (CP has a Kx1 and a 1xK "
            "depthwise stage)"
        )
    _check_same_kind((first, core, last))
    return Chain(
        factors={
            "in_factor": first.weight.flatten(1),
            "core": core.weight,
            "out_factor": last.weight.flatten(1),
        },
        stages=(first, core, last),
        bias=last.bias,
        activation=activation,
        stride=core.stride,
        padding=core.padding,
        dilation=core.dilation,
        padding_mode=core.padding_mode,
        kernel_size=core.kernel_size,
    )


def read_cp(layers: Iterable[nn.Module], axes: int) -> Chain:
    """Reads (1x1, Kx1 depthwise, 1xK depthwise, 1x1), or for `axes` = 1 (1, K depthwise, 1), with an activation after
    them or none.

    The two depthwise stages may come in either order, and either may have stride, padding and dilation. Two pointwise
    convolutions are a block of one tap. Raises NotOneOp with the reason."""
    layers = list(layers)
    if sum(isinstance(layer, (nn.Conv1d, nn.Conv2d)) for layer in layers) == 2:
        return _read_pair(layers, axes)
    count = axes + 2
    stages, activation = _stages(layers, count, nn.Conv1d if axes == 1 else nn.Conv2d)
    first, *depthwise, last = stages
    _check_pointwise(first, f"stage 1 of {count}")
    _check_pointwise(last, f"stage {count} of {count}")
    for position, conv in enumerate(depthwise, start=2):
        if not conv.groups == conv.in_channels == conv.out_channels:
            raise NotOneOp(
                f"stage {position} of {count} must be depthwise (groups = in_channels = out_channels), got "
                f"groups={conv.groups} for {conv.in_channels} to {conv.out_channels} channels"
            )
    _check_same_kind(stages)
    composed = [_compose(depthwise, axis, axes) for axis in range(axes)]
    stride = tuple(axis.stride for axis in composed)
    names = ("width_factor",) if axes == 1 else ("height_factor", "width_factor")
    by_axis = depthwise
    if axes == 2 and (depthwise[0].kernel_size[1] > 1 or depthwise[1].kernel_size[0] > 1):
        by_axis = depthwise[::-1]
    return Chain(
        factors={
            "in_factor": first.weight.flatten(1),
            **{name: conv.weight.flatten(1) for name, conv in zip(names, by_axis, strict=True)},
            "out_factor": last.weight.flatten(1),
        },
        stages=(first, *by_axis, last),
        bias=last.bias,
        activation=activation,
        stride=stride,
        padding=_joint_padding(composed),
        dilation=tuple(axis.dilation for axis in composed),
        padding_mode=_joint_mode(depthwise),
        kernel_size=tuple(axis.kernel for axis in composed),
    )


def _read_pair(layers: Iterable[nn.Module], axes: int) -> Chain:
    """Reads two pointwise convolutions, of which the first may have stride and padding: it has no bias, so the zeros
    that it pads stay zeros."""
    (first, last), activation = _stages(layers, 2, nn.Conv1d if axes == 1 else nn.Conv2d)
    _check_pointwise(first, "stage 1 of 2", has_window=True)
    _check_pointwise(last, "stage 2 of 2")
    _check_same_kind((first, last))
    names = ("width_factor",) if axes == 1 else ("height_factor", "width_factor")
    tap = torch.ones_like(first.weight.detach().flatten(1)[:, :1])
    return Chain(
        factors={
            "in_factor": first.weight.flatten(1),
            **dict.fromkeys(names, tap),
            "out_factor": last.weight.flatten(1),
        },
        stages=(first, *[first] * axes, last),
        bias=last.bias,
        activation=activation,
        stride=first.stride,
        padding=_joint_padding([_axis(first, axis) for axis in range(axes)]),
        dilation=(1,) * axes,
        padding_mode=first.padding_mode,
        kernel_size=first.kernel_size,
    )


def read_linear(layers: Iterable[nn.Module]) -> Chain:
    """Reads (Linear without bias, Linear), with an activation after them or none. Raises NotOneOp with the reason."""
    (first, last), activation = _stages(layers, 2, nn.Linear)
    _check_same_kind((first, last))
    return Chain(
        factors={"in_factor": first.weight, "out_factor": last.weight},
        stages=(first, last),
        bias=last.bias,
        activation=activation,
    )


def _stages(layers: Iterable[nn.Module], count: int, kind: type[nn.Module]) -> tuple[list[Any], str]:
    """The `count` layers of class `kind` and the name of the activation after them; checks what every chain must
    fulfil."""
    rest: list[Any] = list(layers)
    activation = "none"
    if len(rest) == count + 1 and type(rest[-1]) is not kind:
        name = activation_name(rest[-1])
        if name is None:
            raise NotOneOp(
                f"{rest[-1]} after the last stage is none of the activations that the ops know "
                f"({', '.join(ACTIVATION_MODULES)}; GELU in its exact form): leave it outside the chain"
            )
        activation = name
        if has_hooks(rest.pop()):
            raise NotOneOp("the activation has forward or backward hooks, which would be lost")
    for position, layer in enumerate(rest):
        if type(layer) is not kind:
            where = "between the stages" if 0 < position < len(rest) - 1 else f"at position {position}"
            raise NotOneOp(
                f"{type(layer).__name__} {where}: one op equals the chain only if nothing but {count} plain "
                f"nn.{kind.__name__} layers stands in it (no activation, normalization, dropout, no subclass "
                "or parametrization)"
            )
    if len(rest) != count:
        raise NotOneOp(f"the chain must have {count} nn.{kind.__name__} stages, got {len(rest)}")
    for position, layer in enumerate(rest, start=1):
        if "weight" not in layer._parameters or "bias" not in layer._parameters:
            raise NotOneOp(f"stage {position} of {count}: its weight or bias is computed at each call: {remedy(layer)}")
        if has_hooks(layer):
            raise NotOneOp(f"stage {position} of {count} has hooks, which would be lost: remove them first")
        if position < count and layer.bias is not None:
            raise NotOneOp(
                f"stage {position} of {count} has a bias: a bias between the stages is not equal to one op, "
                "only the last stage may have one"
            )
    for position, (left, right) in enumerate(itertools.pairwise(rest), start=1):
        given, taken = left.weight.size(0), right.weight.size(1) * getattr(right, "groups", 1)
        if given != taken:
            raise NotOneOp(f"stage {position} gives {given} channels, stage {position + 1} takes {taken}")
    return rest, activation


def _check_pointwise(conv: nn.Conv2d, where: str, has_window: bool = False) -> None:
    if any(size != 1 for size in conv.kernel_size):
        raise NotOneOp(f"{where} must be a pointwise convolution (kernel size 1), got {conv.kernel_size}")
    if conv.groups != 1:
        raise NotOneOp(f"{where} has groups={conv.groups}: a factor is a full matrix (groups=1)")
    if has_window:
        return
    if any(step != 1 for step in conv.stride):
        raise NotOneOp(
            f"{where} has stride {conv.stride}: a stride on a pointwise stage is not the stride of one "
            "convolution; it belongs on the spatial stage"
        )
    if conv.padding != "valid" and conv.padding != "same" and any(conv.padding):
        raise NotOneOp(f"{where} has padding {conv.padding}: padding belongs on the spatial stage")


def _check_same_kind(stages: Sequence[nn.Module]) -> None:
    kinds = {(stage.weight.dtype, stage.weight.device) for stage in stages}  # type: ignore[union-attr]
    if len(kinds) > 1:
        raise NotOneOp(f"the stages have different dtypes or devices: {sorted(map(str, kinds))}")


def _axis(conv: nn.Conv2d, axis: int) -> _Axis:
    kernel, dilation = conv.kernel_size[axis], conv.dilation[axis]
    if conv.padding == "same":
        before, after = same_padding(kernel, dilation)
    else:
        before = after = 0 if conv.padding == "valid" else int(conv.padding[axis])
    return _Axis(kernel, conv.stride[axis], before, after, dilation)


def _compose(depthwise: Sequence[nn.Conv2d], axis: int, axes: int) -> _Axis:
    """The one window along an axis that the depthwise stages, one after the other, are equal to.

    At most one of them has more than one tap; it is the window. A stage of one tap and stride b before it passes on
    every b-th pixel, so the window's stride, dilation and zero padding are multiplied by b. A stage of one tap and
    stride b after it passes on every b-th result, so the window's stride is multiplied by b. The size of the output
    agrees as well: floor((q + r/b) / d) = floor(q / d) for integers q and 0 <= r < b.
    """
    if axes == 1:
        return _axis(depthwise[0], axis)
    first, second = (_axis(conv, axis) for conv in depthwise)
    where = f"along the {AXES[axis]}"
    if first.kernel > 1 and second.kernel > 1:
        raise NotOneOp(
            f"both depthwise stages have more than one tap {where} ({first.kernel} and {second.kernel}): a "
            "CP block has one Kx1 and one 1xK stage"
        )
    if first.kernel > 1:
        if second.before or second.after:
            raise NotOneOp(
                f"the second depthwise stage pads {where} ({second.before} pixels), where its kernel has one "
                "tap: it adds pixels to the result instead of to the input"
            )
        return _Axis(first.kernel, first.stride * second.stride, first.before, first.after, first.dilation)
    if (first.stride > 1 or first.before) and depthwise[1].padding_mode != "zeros" and second.after:
        raise NotOneOp(
            f"the first depthwise stage has a stride or padding {where} before the second one pads with "
            f"padding_mode={depthwise[1].padding_mode!r}: only zero padding commutes with that"
        )
    return _Axis(
        second.kernel,
        first.stride * second.stride,
        first.stride * second.before + first.before,
        first.stride * second.after + first.after,
        first.stride * second.dilation,
    )


def _joint_padding(axes: Sequence[_Axis]) -> tuple[int, ...] | str:
    """The windows' padding as an argument of nn.Conv2d: pixels per axis, or "same"."""
    if all(axis.before == axis.after for axis in axes):
        return tuple(axis.before for axis in axes)
    is_same = all((axis.before, axis.after) == same_padding(axis.kernel, axis.dilation) for axis in axes)
    if is_same and all(axis.stride == 1 for axis in axes):
        return "same"
    raise NotOneOp(
        f"padding of {[(axis.before, axis.after) for axis in axes]} pixels (before, after) per axis is "
        "neither symmetric nor padding='same' at stride 1 on every axis"
    )


def _joint_mode(depthwise: Sequence[nn.Conv2d]) -> str:
    """The padding mode of the stages that pad any pixels; raises NotOneOp where they differ."""
    modes = {
        conv.padding_mode
        for conv in depthwise
        for axis in range(len(conv.kernel_size))
        if _axis(conv, axis).before or _axis(conv, axis).after
    }
    if len(modes) > 1:
        raise NotOneOp(f"the depthwise stages pad with different modes: {sorted(modes)}")
    return modes.pop() if modes else "zeros"
