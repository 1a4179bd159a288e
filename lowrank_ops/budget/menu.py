"""The menu of each layer that a `Budget` is spent on: options with their costs and errors."""

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
from lowrank_ops.model.calls import LayerCalls
from lowrank_ops.model.timing import Rounds, layer_seconds
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.plain import Layer, is_matrix

Kind = Literal["tucker", "cp", "svd"]

# Ranks per mode that are offered: at most this many multiples of `Offer.multiple`, and some small ones.
_VALUES = 24
# CP's error is measured at ranks that are these shares of the channels, with this many sweeps of its decomposition, on
# the leading channels of the whitened weight.
_CP_CHANNELS = 96
_CP_SHARES = (0.25, 0.5, 1.0)
_CP_SWEEPS = 25
_ROUNDS = Rounds(least=5, most=50, seconds=0.1)  # per kind of input, where a layer is timed


@dataclass(frozen=True)
class Block:
    """A factorized block: its kind of factorization and its ranks, `(R1, R2)` for Tucker."""

    kind: Kind
    rank: int | tuple[int, int]


@dataclass(frozen=True)
class Offer:
    """Which blocks a layer is offered.

    Attributes:
        method: "tucker", "cp" or "auto", which offers both. A matrix is offered its SVD with each of them.
        multiple: ranks are multiples of it, but for some below it.
        seed: of the decompositions that CP's errors are measured with.
        name: of the layer, for messages.
    """

    method: str
    multiple: int = 8
    seed: int = 0
    name: str = "layer"


def empty_module(layer: Layer, block: Block) -> Any:
    """The module of a block in the place of a layer, on the meta device."""
    weight = layer.weight
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        assert isinstance(block.rank, int)
        return LowRankLinear(layer.in_features, layer.out_features, block.rank, bias, device="meta", dtype=weight.dtype)
    tucker = block.kind == "tucker"
    kind: Any = (TuckerConv1d if tucker else CPConv1d) if isinstance(layer, nn.Conv1d) else None
    kind = kind or (TuckerConv2d if tucker else CPConv2d)
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        block.rank,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=bias,
        padding_mode=layer.padding_mode,
        device="meta",
        dtype=weight.dtype,
    )


def options_for(layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], offer: Offer) -> list[Option]:
    """The options of a layer: itself, then all offered blocks that cost less and are smaller.

    Args:
        layer: the layer to replace or to leave.
        weight: its weight, whitened or divided by its norm, `[T, S, KH, KW]` or `[T, S]`, fp64. Squared errors of such
            weights can be compared between layers.
        cost: of a module: the dense layer, or a factorized one on the meta device.
        offer: which blocks there are.
    """
    dense = Option(cost(layer), 0.0)
    if is_matrix(layer):
        found = _matrix_options(layer, weight.flatten(1), cost, offer.multiple)
    else:
        found = []
        image = weight if weight.dim() == 4 else weight.unsqueeze(2)
        if offer.method in ("tucker", "auto"):
            found += _tucker_options(layer, image, cost, offer.multiple)
        if offer.method in ("cp", "auto"):
            found += _cp_options(layer, image, cost, offer)
    return [dense, *(option for option in found if option.cost < dense.cost and _shrinks(layer, option.block))]


def _shrinks(layer: Layer, block: Block) -> bool:
    """Whether a block has fewer parameters and multiplications than the layer: `factorize_` requires both."""
    module = empty_module(layer, block)
    return count_parameters(module) < count_parameters(layer) and count_macs(module) < count_macs(layer)  # type: ignore[operator]


def _matrix_options(layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], multiple: int) -> list[Option]:
    lost = energies(weight).cumsum(0).flip(0)
    price = _linear(lambda rank: cost(empty_module(layer, Block("svd", rank))), len(lost))
    return [
        Option(price(rank), float(lost[rank]) if rank < len(lost) else 0.0, Block("svd", rank))
        for rank in _offered(len(lost), multiple)
    ]


def _tucker_options(layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], multiple: int) -> list[Option]:
    """The errors are those of the truncated HOSVD: a pair of ranks loses the squares of the core outside of them."""
    core = hosvd_core(weight)
    kept = core.square().flatten(2).sum(2).cumsum(0).cumsum(1)
    out_limit = min(weight.shape[0], weight[0].numel())
    in_limit = min(weight.shape[1], weight[:, 0].numel())
    price = _bilinear(lambda pair: cost(empty_module(layer, Block("tucker", pair))), in_limit, out_limit)
    total = float(kept[-1, -1])
    return [
        Option(
            price(in_rank, out_rank),
            max(total - float(kept[out_rank - 1, in_rank - 1]), 0.0),
            Block("tucker", (in_rank, out_rank)),
        )
        for in_rank in _offered(in_limit, multiple)
        for out_rank in _offered(out_limit, multiple)
    ]


def hosvd_core(weight: Tensor) -> Tensor:
    """The core of the full HOSVD over both channel modes, `[T, S, KH, KW]`: the weight in the bases of their singular
    vectors, the leading ones first."""
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
    """A low and a high rank to measure costs at: multiples of 16 (whole vectors) where the limit allows it."""
    low, high = limit // 4, 3 * limit // 4
    return (low // 16 * 16, high // 16 * 16) if low >= 16 else (max(low, 1), max(high, 1))


def _cp_options(layer: Layer, weight: Tensor, cost: Callable[[nn.Module], float], offer: Offer) -> list[Option]:
    """CP's errors are measured at a few ranks on the leading part of the weight; those of other ranks lie on straight
    lines between them, in the logarithms of rank and error.

    Relative errors below a millionth count as a millionth, since zero has no logarithm, and those above 1 as 1.
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
            found = cp_decompose(
                part, rank, iterations=_CP_SWEEPS, corrections=0, seed=offer.seed, name=offer.name, progress=False
            )
        points.append((math.log(rank), math.log(energy * min(max(found.relative_error, 1e-6), 1.0) ** 2)))
    price = _linear(lambda rank: cost(empty_module(layer, Block("cp", rank))), limit)
    return [
        Option(price(rank), outside + math.exp(min(_line(points, math.log(rank)), math.log(energy))), Block("cp", rank))
        for rank in _offered(limit, offer.multiple)
    ]


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """The piecewise linear function through the points; its outer pieces go on beyond them."""
    points = sorted(set(points))
    if len(points) == 1:
        return points[0][1]
    index = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _offered(limit: int, multiple: int) -> list[int]:
    """At most `_VALUES` multiples no greater than the limit, and powers of two below the first of them."""
    step = multiple * max(1, -(-limit // (multiple * _VALUES)))
    small = [rank for rank in (1, 2, 4, 8, 16, 32, 64) if rank < min(step, limit + 1)]
    return [*small, *range(step, limit + 1, step)]


class Clock:
    """Seconds that a layer's recorded calls take; layers of the same kind and shape are measured once.

    The least time of the runs counts: layers and whole models are measured one after the other, and other work on the
    machine must not look like a difference between them.
    """

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}

    def of(self, layer: Layer, calls: LayerCalls) -> Callable[[nn.Module], float]:
        """A function that gives the seconds of a module in the place of `layer`: of `layer` itself, or of a factorized
        module on the meta device."""
        return lambda module: self._seconds(module, layer, calls)

    def _seconds(self, module: nn.Module, layer: Layer, calls: LayerCalls) -> float:
        key = (repr(module), tuple(sorted((repr(kind), count) for kind, count in calls.inputs.items())))
        if key not in self._known:
            if isinstance(module, FactorizedModule):
                module = sketched(module, layer)
            self._known[key] = layer_seconds([module], layer.weight.dtype, calls, _ROUNDS, min)[0]
        return self._known[key]


def count_cost(kind: str, calls: LayerCalls | None, calibrated: bool = False) -> Callable[[nn.Module], float]:
    """A function that gives the cost of a module: its parameters, or its multiply-accumulates in the recorded calls.

    Args:
        kind: "params" or "macs".
        calls: of the layer in whose place the module is; without them parameters are counted.
        calibrated: whether factorized modules will be fitted to data: the fit gives them a bias, which counts.
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
    """Multiply-accumulates of a layer, or of its replacement, in a run of the model: in its calls, and where the model
    itself computes with its weight, for which a factorized module multiplies its factors each time. None if they are
    not known."""
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
