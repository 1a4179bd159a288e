"""Ranks for a budget over the whole network: one choice per layer, the least error at the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral, Real
from typing import Any

import numpy as np

# Steps in which the costs of an allocation are counted. Rounding up loses less than one step a layer.
STEPS = 20_000


@dataclass(frozen=True)
class Budget:
    """What the factorized network may cost; give exactly one of the three. Used as `rank=` of `factorize_`.

    `factorize_` then chooses each layer's ranks, or to leave the layer dense, so that the sum of the layers' errors is
    least. With calibration data the error is that of the model's output (`lowrank_ops.fitting`), without, that of the
    weights relative to their norm.

    Args:
        params: parameters of the whole model; a float up to 1 is a fraction of what it has now, an int a number.
        macs: multiply-accumulates of a forward pass on the example input (`example_input=` of `factorize_`, or the
            first batch of the calibration data); a fraction of what convolution and linear layers need now, or an int.
        latency: time of a forward pass on `example_input` on this machine with the present number of threads: a float
            up to 1 is a fraction of the dense model's, a `datetime.timedelta` (or seconds above 1) is absolute.
            Dense layers and factorized ones at several ranks are measured.
        example_input: the input that latency is for; None takes `example_input=` of `factorize_`.

    Raises:
        ValueError: not exactly one budget, a budget that is not positive, a fraction above 1.
        TypeError: a budget that is no number.
    """

    params: int | float | None = None
    macs: int | float | None = None
    latency: float | timedelta | None = None
    example_input: Any = None

    def __post_init__(self) -> None:
        given = [kind for kind in ("params", "macs", "latency") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"Budget: give exactly one of params, macs and latency, got {', '.join(given) or 'none'}")
        value = self.value
        if self.kind == "latency" and isinstance(value, timedelta):
            value = value.total_seconds()
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"Budget: {self.kind} must be a number, got {value!r}")
        if not value > 0:
            raise ValueError(f"Budget: {self.kind} must be positive, got {value}")
        if self.kind != "latency" and not isinstance(value, Integral) and value > 1:
            raise ValueError(
                f"Budget: {self.kind} as a fraction must lie in (0, 1] (an int is a number of its own), got {value}"
            )

    @property
    def kind(self) -> str:
        """ "params", "macs" or "latency"."""
        return next(kind for kind in ("params", "macs", "latency") if getattr(self, kind) is not None)

    @property
    def value(self) -> Any:
        """The budget that was given."""
        return getattr(self, self.kind)

    def absolute(self, dense: float) -> float:
        """The budget in its own unit, when the dense model costs `dense`."""
        if isinstance(self.value, timedelta):
            return self.value.total_seconds()
        fraction = not isinstance(self.value, Integral) and self.value <= 1
        return float(self.value) * (dense if fraction else 1)


@dataclass(frozen=True)
class Option:
    """One way to treat a layer: what it costs, the error that it brings, and what it is (None: dense)."""

    cost: float
    error: float
    choice: Any = None


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option per layer with the least sum of errors among all whose costs sum to at most the budget.

    A multiple-choice knapsack, solved by dynamic programming over costs counted in `STEPS` steps of the budget (rounded
    up, so the budget always holds), then each layer moves to a better option while what rounding left over allows it.

    Raises:
        ValueError: not even the cheapest options fit.
    """
    pruned = [_efficient(layer) for layer in options]
    least = sum(layer[0].cost for layer in pruned)
    if least > budget:
        raise ValueError(f"the least possible is {least:.6g}, the budget {budget:.6g}")
    step = budget / STEPS if budget else 1.0
    best = np.zeros(STEPS + 1)
    taken: list[np.ndarray] = []
    for layer in pruned:
        total = np.full(STEPS + 1, np.inf)
        which = np.zeros(STEPS + 1, dtype=np.int32)
        for index, option in enumerate(layer):
            shift = int(np.ceil(option.cost / step - 1e-9))
            if shift > STEPS:
                continue
            reached = np.full(STEPS + 1, np.inf)
            reached[shift:] = best[: STEPS + 1 - shift] + option.error
            better = reached < total
            total[better], which[better] = reached[better], index
        best = total
        taken.append(which)
    chosen: list[int]
    if np.isfinite(best[-1]):
        chosen, at = [], STEPS
        for layer, which in zip(reversed(pruned), reversed(taken), strict=True):
            index = int(which[at])
            chosen.insert(0, index)
            at -= int(np.ceil(layer[index].cost / step - 1e-9))
    else:  # the cheapest options fit, but not once their costs are rounded up
        chosen = [0] * len(pruned)
    _use_the_rest(pruned, chosen, budget)
    return [layer[index] for layer, index in zip(pruned, chosen, strict=True)]


def _efficient(options: Sequence[Option]) -> list[Option]:
    """The options that no cheaper one beats, by rising cost and falling error."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _use_the_rest(layers: Sequence[Sequence[Option]], chosen: list[int], budget: float) -> None:
    """Spends what is left of the budget, the greatest gain first."""
    left = budget - sum(layer[index].cost for layer, index in zip(layers, chosen, strict=True))
    while True:
        moves = [
            (layer[index].error - layer[other].error, position, other)
            for position, (layer, index) in enumerate(zip(layers, chosen, strict=True))
            for other in range(index + 1, len(layer))
            if layer[other].cost - layer[index].cost <= left
        ]
        if not moves:
            return
        _, position, other = max(moves)
        left -= layers[position][other].cost - layers[position][chosen[position]].cost
        chosen[position] = other
