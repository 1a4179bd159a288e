"""The same maths as a chain of library calls: the specification, in any dtype, fp64 for judging.

Signatures as in `lowrank_ops.ops.functional`. Also the dense weights that are the products of the factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops.ops.functional import HeightWidth
from lowrank_ops.runtime.autocast import no_autocast


def _hardswish(x: Tensor) -> Tensor:
    """Replaces F.hardswish, which on CUDA multiplies by 1 / 6 in float32 even for float64: an error of 3e-8."""
    return x * F.relu6(x + 3) / 6


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": _hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}


def _pair(value: HeightWidth) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


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
    """Three convolutions; arguments and result as `lowrank_ops.tucker_conv2d`."""
    hidden = F.conv2d(input, in_factor[:, :, None, None])
    hidden = F.conv2d(hidden, core, None, _pair(stride), _pair(padding), _pair(dilation))
    return _ACTIVATIONS[activation](F.conv2d(hidden, out_factor[:, :, None, None], bias))


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
    """Four convolutions, the middle two depthwise; arguments and result as `lowrank_ops.cp_conv2d`."""
    rank = in_factor.shape[0]
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    hidden = F.conv2d(input, in_factor[:, :, None, None])
    hidden = F.conv2d(hidden, height_factor[:, None, :, None], None, (sh, 1), (ph, 0), (dh, 1), groups=rank)
    hidden = F.conv2d(hidden, width_factor[:, None, None, :], None, (1, sw), (0, pw), (1, dw), groups=rank)
    return _ACTIVATIONS[activation](F.conv2d(hidden, out_factor[:, :, None, None], bias))


def lowrank_linear(
    input: Tensor, in_factor: Tensor, out_factor: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Two linear maps; arguments and result as `lowrank_ops.lowrank_linear`."""
    return _ACTIVATIONS[activation](F.linear(F.linear(input, in_factor), out_factor, bias))


@no_autocast()
def tucker_weight(in_factor: Tensor, core: Tensor, out_factor: Tensor) -> Tensor:
    """The dense convolution weight `[T, S, KH, KW]` of Tucker-2 factors: the product that they are factors of."""
    return torch.einsum("tb,baij,as->tsij", out_factor, core, in_factor)


@no_autocast()
def cp_weight(in_factor: Tensor, height_factor: Tensor, width_factor: Tensor, out_factor: Tensor) -> Tensor:
    """The dense convolution weight `[T, S, KH, KW]` of CP factors."""
    terms = torch.einsum("rs,ri,rj->rsij", in_factor, height_factor, width_factor)
    return torch.einsum("tr,rsij->tsij", out_factor, terms)  # out_factor last: only this product sums over R


@no_autocast()
def linear_weight(in_factor: Tensor, out_factor: Tensor) -> Tensor:
    """The dense weight `[T, S]` of the two factors of a linear layer."""
    return out_factor @ in_factor
