"""What could become of each layer, at what cost and with what error: the menu that a `Budget` is spent on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_ops.budget.knapsack import Option
from lowrank_ops.budget.sketch import sketched
from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.cp import cp_decompose
from lowrank_ops.linalg.singular import energies, gram
from lowrank_ops.model.calls import LayerCalls, times
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.plain import Layer, is_matrix

Kind = Literal["tucker", "cp", "svd"]

# Ranks that are offered: at most so many values per mode, multiples of 8 (for latency of 16, the lanes of a vector).
_VALUES = 24
# CP's error curve is measured on the leading part of the whitened weight, at these shares of its channels.
_CP_CHANNELS = 96
_CP_SHARES = (0.25, 0.5, 1.0)
_CP_SWEEPS = 25
_SECONDS = 0.1  # of timing per kind of input


@dataclass(frozen=True)
class Choice:
    """A kind of factorization and its ranks."""

    kind: Kind
    rank: int | tuple[int, int]


def empty_module(layer: Layer, choice: Choice) -> Any:
    """The module that a choice means for a layer, on the meta device."""
    weight = layer.weight
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        assert isinstance(choice.rank, int)
        return LowRankLinear(
            layer.in_features, layer.out_features, choice.rank, bias, device="meta", dtype=weight.dtype
        )
    tucker = choice.kind == "tucker"
    kind: Any = (TuckerConv1d if tucker else CPConv1d) if isinstance(layer, nn.Conv1d) else None
    kind = kind or (TuckerConv2d if tucker else CPConv2d)
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        choice.rank,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=bias,
        padding_mode=layer.padding_mode,
        device="meta",
        dtype=weight.dtype,
    )


def options_for(
    layer: Layer,
    weight: Tensor,
    method: str,
    cost: Callable[[nn.Module], float],
    multiple: int,
    name: str,
    seed: int,
) -> list[Option]:
    """All that is offered for a layer, the dense layer itself included.

    Args:
        layer: to be replaced or left.
        weight: its weight, whitened or divided by its norm, `[T, S, KH, KW]` or `[T, S]`, fp64: squared errors of it
            compare between layers.
        method: "tucker", "cp" or "auto", which offers both.
        cost: of a module, the dense layer or a factorized one (on the meta device).
        multiple: ranks are multiples of it.
        name, seed: of the decompositions of CP.
    """
    dense = Option(cost(layer), 0.0)
    if is_matrix(layer):
        found = _matrix_options(layer, weight.flatten(1), cost, multiple)
    else:
        found = []
        image = weight if weight.dim() == 4 else weight.unsqueeze(2)
        if method in ("tucker", "auto"):
            found += _tucker_options(layer, image, cost, multiple)
        if method in ("cp", "auto"):
            found += _cp_options(layer, image, cost, multiple, name, seed)
    return [dense, *(option for option in found if option.cost < dense.cost and _shrinks(layer, option.choice))]


def _shrinks(layer: Layer, choice: Choice) -> bool:
    """Whether a block has fewer parameters and multiplications, as `factorize_` asks of every replacement."""
    module = empty_module(layer, choice)
    return count_parameters(module) < count_parameters(layer) and count_macs(module) < count_macs(layer)  # type: ignore[operator]


def _matrix_options(layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], multiple: int) -> list[Option]:
    lost = energies(weight).cumsum(0).flip(0)
    price = _linear(lambda rank: cost(empty_module(layer, Choice("svd", rank))), len(lost))
    return [
        Option(price(rank), float(lost[rank]) if rank < len(lost) else 0.0, Choice("svd", rank))
        for rank in _offered(len(lost), multiple)
    ]


def _tucker_options(layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], multiple: int) -> list[Option]:
    """The truncated HOSVD's errors for all pairs of ranks at once: sums over what its core loses."""
    core = hosvd_core(weight)
    kept = core.square().flatten(2).sum(2).cumsum(0).cumsum(1)
    out_limit = min(weight.shape[0], weight[0].numel())
    in_limit = min(weight.shape[1], weight[:, 0].numel())
    price = _bilinear(lambda pair: cost(empty_module(layer, Choice("tucker", pair))), in_limit, out_limit)
    total = float(kept[-1, -1])
    return [
        Option(
            price(in_rank, out_rank),
            max(total - float(kept[out_rank - 1, in_rank - 1]), 0.0),
            Choice("tucker", (in_rank, out_rank)),
        )
        for in_rank in _offered(in_limit, multiple)
        for out_rank in _offered(out_limit, multiple)
    ]


def hosvd_core(weight: Tensor) -> Tensor:
    """`[T, S, KH, KW]` in the bases of the channel modes' singular vectors, the leading ones first."""
    bases = [torch.linalg.eigh(gram(ranks.unfolding(weight, mode))).eigenvectors.flip(1) for mode in (0, 1)]
    rotated = (bases[0].T @ weight.flatten(1)).view_as(weight)
    return torch.einsum("tsij,sz->tzij", rotated, bases[1])


def _linear(measure: Callable[[int], float], limit: int) -> Callable[[int], float]:
    """A cost of the form `a + b R` through two measured ranks."""
    places = _measured_ranks(limit)
    line = _linear_through(places, [measure(rank) for rank in places])
    return lambda rank: max(line(rank), 0.0)


def _bilinear(
    measure: Callable[[tuple[int, int]], float], in_limit: int, out_limit: int
) -> Callable[[int, int], float]:
    """A cost of the form `a + b R1 + c R2 + d R1 R2` through four measured pairs."""
    columns, rows = _measured_ranks(in_limit), _measured_ranks(out_limit)
    lines = [_linear_through(columns, [measure((column, row)) for column in columns]) for row in rows]

    def price(in_rank: int, out_rank: int) -> float:
        return max(_linear_through(rows, [line(in_rank) for line in lines])(out_rank), 0.0)

    return price


def _linear_through(places: Sequence[int], values: Sequence[float]) -> Callable[[int], float]:
    (low, high), (first, second) = places, values
    return lambda place: first + (second - first) * (place - low) / max(high - low, 1)


def _measured_ranks(limit: int) -> tuple[int, int]:
    """A low and a high rank, of whole vectors where there is room."""
    low, high = limit // 4, 3 * limit // 4
    return (low // 16 * 16, high // 16 * 16) if low >= 16 else (max(low, 1), max(high, 1))


def _cp_options(
    layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], multiple: int, name: str, seed: int
) -> list[Option]:
    """CP's error at a few ranks on the leading part of the weight, between them by straight lines in log-log.

    Errors below a millionth of the norm count as that (a line through zero has no slope), above it as the norm.
    """
    core = hosvd_core(weight)
    part = core[:_CP_CHANNELS, :_CP_CHANNELS]
    outside = float(core.square().sum() - part.square().sum())
    energy = max(float(part.square().sum()), 1e-300)
    limit = min(max(weight.shape[:2]), weight.numel() // max(weight.shape))
    points: list[tuple[float, float]] = []
    for share in _CP_SHARES:
        rank = max(min(int(share * max(part.shape[:2])), part.numel() // max(part.shape)), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = cp_decompose(part, rank, iterations=_CP_SWEEPS, corrections=0, seed=seed, name=name, progress=False)
        points.append((math.log(rank), math.log(energy * min(max(found.relative_error, 1e-6), 1.0) ** 2)))
    price = _linear(lambda rank: cost(empty_module(layer, Choice("cp", rank))), limit)
    return [
        Option(
            price(rank), outside + math.exp(min(_line(points, math.log(rank)), math.log(energy))), Choice("cp", rank)
        )
        for rank in _offered(limit, multiple)
    ]


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through the points, the outer pieces continued."""
    points = sorted(set(points))
    if len(points) == 1:
        return points[0][1]
    index = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _offered(limit: int, multiple: int) -> list[int]:
    """Multiples up to the limit, at most `_VALUES` of them, and powers of two below the first."""
    step = multiple * max(1, -(-limit // (multiple * _VALUES)))
    small = [rank for rank in (1, 2, 4, 8, 16, 32, 64) if rank < min(step, limit + 1)]
    return [*small, *range(step, limit + 1, step)]


class Clock:
    """Seconds that a layer's recorded calls take, measured once for layers of the same kind and shape.

    The least of the runs: layers and whole models are measured one after the other, and whatever else the machine does
    must not look like a difference between them.
    """

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}

    def of(self, layer: Layer, calls: LayerCalls) -> Callable[[nn.Module], float]:
        """Of modules in the place of `layer`: itself, or factorized ones on the meta device."""
        return lambda module: self._seconds(module, layer, calls)

    def _seconds(self, module: nn.Module, layer: Layer, calls: LayerCalls) -> float:
        key = (repr(module), tuple(sorted((repr(kind), count) for kind, count in calls.inputs.items())))
        if key not in self._known:
            if isinstance(module, FactorizedModule):
                module = sketched(module, layer)
            self._known[key] = times([module], layer.weight.dtype, calls, _SECONDS, min)[0] / 1e3
        return self._known[key]


def count_cost(kind: str, calls: LayerCalls | None, calibrated: bool = False) -> Callable[[nn.Module], float]:
    """Parameters of a module, or its multiply-accumulates in the recorded calls.

    Of a factorized module that will be `calibrated` the bias counts, which the fit gives it if it has none.
    """

    def parameters(module: nn.Module) -> float:
        count = count_parameters(module)
        if calibrated and isinstance(module, FactorizedModule) and module.bias is None:
            count += len(module.factors()["out_factor"])
        return count

    if kind == "params" or calls is None:
        return parameters
    return lambda module: float(macs_in(calls, module) or 0)


def macs_in(calls: LayerCalls, module: nn.Module) -> int | None:
    """Multiply-accumulates of a layer, or of what replaces it, in a run of the model: in its calls, and where the model
    computes with its weight, which a factorized module multiplies out each time. None if they are not known."""
    called = calls.total(lambda shape: count_macs(module, shape))
    if called is None or calls.unknown_reads or calls.nested:
        return None
    product = 0
    if isinstance(module, FactorizedModule):
        outputs, inputs, *taps = module._dense_shape()
        core = module.factors().get("core")
        if core is None:
            product = outputs * inputs * math.prod(taps) * int(module.rank)  # type: ignore[arg-type]
        else:
            product = outputs * core.shape[1] * math.prod(taps) * (core.shape[0] + inputs)
    return called + calls.read_macs + calls.reads * product
