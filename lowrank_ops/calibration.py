"""Calibrated factorization: modules that are fitted, one after the other, to what the dense layers compute.

The model stays one model: to see the dense network its dense layers are put in, to see the factorized one its modules,
as far as they are fitted. Each layer takes one partial run of both per batch, in the order in which the model calls
them; rows of input and output are copied at random positions (`lowrank_ops.moments`), never whole activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops.batches import Batches
from lowrank_ops.fitting import Regression
from lowrank_ops.module_base import FactorizedModule
from lowrank_ops.moments import Moments, draw_positions, input_rows, output_rows, watch
from lowrank_ops.surgery import Site

# The widest features whose normal equations are solved: [8192, 8192] in fp64 is half a gigabyte.
WIDEST = 8192


def positions_for(width: int) -> int:
    """Rows to fit a map of so many features to: enough that the noise of the fit adds about an eighth to the error."""
    return min(8 * width + 2048, 32768)


@dataclass
class Fit:
    """One layer to fit: where it stands, the factorized module for it, how often a run of the model calls it, whether a
    ReLU follows it."""

    site: Site
    module: FactorizedModule
    moments: Moments
    calls: int
    relu: bool = False


def fit_in_order_(
    model: nn.Module, fits: Sequence[Fit], batches: Batches, count: int, step: Callable[[str], Any]
) -> dict[int, float]:
    """Fits the last factors and the bias of modules, in place; the model itself is as before afterwards.

    Args:
        model: with the dense layers in place.
        fits: in the order in which the model calls them.
        batches: calibration data, `count` batches.
        step: called before each batch with the layer's name (progress).

    Returns:
        Relative errors of the outputs on the rows that were used, by id of the dense layer.

    Raises:
        ValueError: a layer or module gives values that are not finite.
    """
    errors: dict[int, float] = {}
    done: list[Fit] = []
    try:
        for fit in fits:
            errors[id(fit.site.layer)] = _fit(model, fit, done, batches, count, step)
            done.append(fit)
    finally:
        _put_dense(fits)
    return errors


def _fit(
    model: nn.Module, fit: Fit, done: Collection[Fit], batches: Batches, count: int, step: Callable[[str], Any]
) -> float:
    layer: Any = fit.site.layer
    features_of, prior, rank = _problem(fit.module)
    positions = max(positions_for(prior.shape[1]) // (count * fit.calls), 1)
    features: list[Tensor] = []
    targets: list[Tensor] = []
    for index, batch in enumerate(batches):
        step(fit.site.names[0])

        def key(call: int, index: int = index) -> str:
            return f"{index} {call}"

        def see_dense(call: int, input: Tensor, output: Tensor) -> None:
            targets.append(output_rows(layer, output, draw_positions(layer, output, positions, key(call))))

        def see_factorized(call: int, input: Tensor, output: Tensor) -> None:
            chosen = draw_positions(layer, output, positions, key(call))
            features.append(features_of(input_rows(layer, input, chosen)))

        _put_dense(done)
        watch(model, layer, batch, fit.calls, see_dense)
        for earlier in done:
            earlier.site.put(earlier.module)
        watch(model, layer, batch, fit.calls, see_factorized)
    regression = Regression(_joined(features), _joined(targets), prior, fit.moments.gradient_root)
    if not bool(torch.isfinite(regression.features).all() and torch.isfinite(regression.targets).all()):
        raise ValueError(
            f"factorize_: {fit.site.names[0]} sees or gives values that are not finite on the calibration data; "
            "exclude it, or leave out the samples that cause them"
        )
    solution = regression.solve(rank, fit.relu)
    _write(fit.module, *solution, whole=rank is not None)
    return regression.error(solution)


def _put_dense(fits: Collection[Fit]) -> None:
    for fit in fits:
        fit.site.put(fit.site.layer)


def _joined(parts: list[Tensor]) -> Tensor:
    rows = torch.cat(parts).detach().cpu()
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _problem(module: FactorizedModule) -> tuple[Callable[[Tensor], Tensor], Tensor, int | None]:
    """What a module's last factors are fitted by: features of input rows `[N, S, K]`, the present map, its rank (None:
    the map is out_factor alone).

    Tucker: all windows of hidden pixels, the map is core and out_factor. A matrix: the input itself, the map is both
    factors. CP, and what is too wide: the features before out_factor.
    """
    factors = {name: factor.detach().double().cpu() for name, factor in module.factors().items()}
    first, last = factors["in_factor"], factors["out_factor"]

    def hidden(rows: Tensor) -> Tensor:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return torch.einsum("psk,rs->prk", rows, first.to(rows))

    core = factors.get("core")
    if core is not None:
        inner = core.flatten(1)
        if inner.shape[1] <= WIDEST:
            return lambda rows: hidden(rows).flatten(1), last @ inner, inner.shape[0]
        return lambda rows: hidden(rows).flatten(1) @ inner.T.to(hidden(rows[:1])), last, None
    taps = _taps(factors)
    if taps.shape[1] == 1 and first.shape[1] <= WIDEST:
        return lambda rows: rows.flatten(1), (last * taps.T) @ first, len(first)
    return lambda rows: torch.einsum("prk,rk->pr", hidden(rows), taps.to(hidden(rows[:1]))), last, None


def _taps(factors: dict[str, Tensor]) -> Tensor:
    """`[R, K]`: the product of CP's spatial factors; ones for a linear layer."""
    taps = factors["in_factor"].new_ones(len(factors["in_factor"]), 1)
    for name in ("height_factor", "width_factor"):
        if name in factors:
            taps = (taps.unsqueeze(2) * factors[name].unsqueeze(1)).flatten(1)
    return taps


@torch.no_grad()
def _write(module: FactorizedModule, out: Tensor, inner: Tensor, bias: Tensor, whole: bool) -> None:
    """The solution of `_problem` as the module's factors; `whole`: the map stands for all last factors."""
    factors = module.factors()
    if not whole:
        factors["out_factor"].copy_(out @ inner)
    else:
        factors["out_factor"].copy_(out)
        if "core" in factors:
            factors["core"].copy_(inner.reshape(factors["core"].shape))
        else:
            factors["in_factor"].copy_(inner)
            for name in ("height_factor", "width_factor"):
                if name in factors:
                    factors[name].fill_(1)
    if module.bias is None:
        module.bias = nn.Parameter(torch.empty_like(module.out_factor[:, 0]), module.out_factor.requires_grad)
    module.bias.copy_(bias)
