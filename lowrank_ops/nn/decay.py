"""Frobenius decay: weight decay on the product of the factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.init import product_norm_squared
from lowrank_ops.runtime.autocast import no_autocast
from lowrank_ops.runtime.torch_internals import is_sharded


def frobenius_norm_squared(module: FactorizedModule) -> Tensor:
    """`||W||_F^2` of the dense weight of a factorized layer, without forming that weight.

    It is computed from Gram matrices of the factors in float32 or float64, also under autocast, with
    `R1^2 (S + R2 KH KW) + R2^2 (T + R1 KH KW)` multiplications for Tucker, `R^2 (S + KH + KW + T)` for CP and
    `R^2 (S + T)` for a linear layer. It is twice differentiable. Sharded factors (FSDP2) are gathered.

    Returns:
        A scalar in the factors' dtype, float32 for bfloat16 and float16.

    Raises:
        TypeError: `module` is no factorized layer.
    """
    if not isinstance(module, FactorizedModule):
        raise TypeError(
            f"frobenius_norm_squared: module must be a factorized layer, got {type(module).__name__}; for a whole "
            "model there is frobenius_decay"
        )
    with no_autocast():
        return product_norm_squared({name: _whole(factor) for name, factor in module.factors().items()})


def frobenius_decay(model: nn.Module, weight: float) -> Tensor:
    """The penalty `weight / 2 * sum ||W||_F^2` over all factorized layers of `model`, to be added to the loss.

    An optimizer's `weight_decay` on the factors does not decay their product; this penalty does (Khodak et al.,
    arXiv:2105.01029), as `weight_decay=weight` would decay the dense layers. So the optimizer should have no weight
    decay on the factors:

        from lowrank_ops.nn.base import FactorizedModule

        factors = {id(f) for m in model.modules() if isinstance(m, FactorizedModule) for f in m.factors().values()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) in factors], "weight_decay": 0.0},
            {"params": [p for p in model.parameters() if id(p) not in factors]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
        ...
        loss = criterion(model(input), target) + frobenius_decay(model, 1e-4)

    Under DistributedDataParallel and FSDP2 (`fully_shard`) every process adds the same penalty, and the gradient is
    the same as with one process.

    Args:
        model: a network or a single layer; a layer that stands in several places counts once.
        weight: at least 0.

    Returns:
        A scalar with gradients for every factor that requires them.

    Raises:
        ValueError: a negative or non-finite weight, a model without a factorized layer.
        TypeError: `model` is no module, `weight` no number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"frobenius_decay: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"frobenius_decay: weight must be a number, got {weight!r}")
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"frobenius_decay: weight must be finite and at least 0, got {weight}")
    norms = [frobenius_norm_squared(module) for module in model.modules() if isinstance(module, FactorizedModule)]
    if not norms:
        raise ValueError(
            f"frobenius_decay: model must have a factorized layer, {type(model).__name__} has none; weight_decay of "
            "the optimizer does the same for dense layers"
        )
    total = norms[0]
    for norm in norms[1:]:
        total = total + norm.to(total.device)
    return weight / 2 * total


def _whole(factor: Tensor) -> Tensor:
    """The factor gathered from all processes if it is sharded, in float32 or float64."""
    if is_sharded(factor):
        factor = factor.full_tensor()  # type: ignore[attr-defined]
        if factor.requires_grad:
            # Gradients with other strides than the parameter's are not sharded like it by torch 2.11.
            factor.register_hook(Tensor.contiguous)
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
