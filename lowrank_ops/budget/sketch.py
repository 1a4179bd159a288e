"""Values for modules that are timed in their layers' places before the layers are decomposed.

The time of a model depends on the values in it: max pooling branches on them, and a text recogniser ran 4 % longer with
random factors than with its own. So a module that is timed gets factors whose output is near that of its layer. They
come from the range of a few random combinations of the weight's columns (the range finder without power iterations of
Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithm 4.1), which takes about the time of a few runs of the
layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_ops.decompose.ranks import unfolding
from lowrank_ops.linalg.singular import computing_device, normal
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.runtime.autocast import no_autocast


@torch.no_grad()
@no_autocast()
def sketched(module: FactorizedModule, layer: Any) -> FactorizedModule:
    """Gives a module on the meta device factors whose product is near the layer's weight, on the layer's device and in
    its dtype; returns the module.

    Tucker: the weight is projected on the ranges of both channel modes. A matrix: on the range of its outputs. CP: the
    mean over the taps is treated as a matrix, and is the same for each tap. Ranks that exceed the rank of a range are
    filled with zeros.
    """
    weight = layer.weight.detach()
    shapes = {name: factor.shape for name, factor in module.factors().items()}
    image = weight.to(computing_device(weight), torch.float32).reshape(*weight.shape[:2], -1)  # [T, S, K]
    found = _tucker(image, module) if "core" in shapes else _separable(image, module)
    factors = {name: found[name].reshape(shape).to(weight) for name, shape in shapes.items()}
    module._adopt(factors, layer.bias, layer, frozen=None)
    return module


def _tucker(image: Tensor, module: Any) -> dict[str, Tensor]:
    in_factor = _range_of(unfolding(image, 1), module.in_factor.shape[0]).T
    out_factor = _range_of(image.flatten(1), module.out_factor.shape[1])
    core = torch.einsum("tsk,rs,tq->qrk", image, in_factor, out_factor)
    return {"in_factor": in_factor, "core": core, "out_factor": out_factor}


def _separable(image: Tensor, module: Any) -> dict[str, Tensor]:
    mean = image.mean(2)
    out_factor = _range_of(mean, module.out_factor.shape[1])
    taps = {name: torch.ones(factor.shape) for name, factor in module.factors().items()}
    return {**taps, "in_factor": out_factor.T @ mean, "out_factor": out_factor}


def _range_of(matrix: Tensor, count: int) -> Tensor:
    """`[M, count]`: orthonormal columns in the range of `[M, N]`, followed by columns of zeros if its rank is lower."""
    some = min(count, *matrix.shape)
    basis = torch.linalg.qr(matrix @ normal(matrix.shape[1], some, 0, matrix)).Q
    return torch.nn.functional.pad(basis, (0, count - some))
