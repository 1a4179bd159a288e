"""A budget over the whole network, and its allocation: one option per layer, the least sum of errors at the cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral, Real
from typing import Any

import numpy as np

# An allocation counts costs in whole steps, this many to a budget.
STEPS = 20_000


@dataclass(frozen=True)
class Budget:
    """A limit of what the factorized network costs, used as `rank=` of `factorize_`. Give exactly one of the three.

    `factorize_` then chooses each layer's ranks, or to leave the layer dense, so that the sum of the layers' errors is
    least. With calibration data the error is that of the model's output (`calibrate.fitting`), without, that of the
    weights relative to their norm.

    Args:
        params: parameters of the whole model: a float below 1 is a fraction of what it has now, an int above 1 a
            number.
        macs: multiply-accumulates of a forward pass on the example input (`example_input=` of `factorize_`, or the
            first batch of the calibration data): a fraction, below 1, of what convolution and linear layers need now,
            or an int above 1.
        latency: time of a forward pass on `example_input` on this machine with the present number of threads: a float
            below 1 is a fraction of the dense model's; an absolute time has its unit, as a str, "12 ms", "1.5 s" or
            "800 us", or as a `datetime.timedelta`.
            Dense layers and factorized ones at several ranks are measured, and then the model as a whole. A warning
            says so where the layers' times add up to no more than the budget, but the model takes longer. Near the
            least time that the model can take, the last percent cost much accuracy: a warning says what a little more
            time would give.
        example_input: the input that latency is for; None takes `example_input=` of `factorize_`.

    Raises:
        ValueError: not exactly one budget, a budget that is not positive or not finite, a number that could be a
            fraction as well as a count or a time.
        TypeError: a budget of another type.
    """

    params: int | float | None = None
    macs: int | float | None = None
    latency: float | str | timedelta | None = None
    example_input: Any = None

    def __post_init__(self) -> None:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"Budget: give exactly one of params, macs and latency, got {', '.join(given) or 'none'}")
        value = self.value
        if self.kind == "latency" and isinstance(value, (str, timedelta)):
            amount = _seconds(value)
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"Budget: {self.kind} must be a number, got {value!r}")
        else:
            amount = float(value)
        if not 0 < amount < math.inf:
            raise ValueError(f"Budget: {self.kind} must be positive and finite, got {value}")
        if isinstance(value, Real) and amount >= 1:
            self._refuse_ambiguous(value)

    def _refuse_ambiguous(self, value: Any) -> None:
        """Raises ValueError for a number of 1 or more that may be a fraction by mistake, or that lacks its unit."""
        if self.kind == "latency":
            raise ValueError(
                f"Budget: latency={value!r} has no unit: a time is latency='12 ms', '1.5 s' or a datetime.timedelta, a "
                "fraction of the dense model's time is a float below 1"
            )
        if value == 1 or not isinstance(value, Integral):
            raise ValueError(
                f"Budget: {self.kind} must be a fraction of what the model has now, a float in (0, 1), or a number of "
                f"its own, an int above 1, got {value!r}"
            )

    @property
    def kind(self) -> str:
        """ "params", "macs" or "latency"."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def value(self) -> Any:
        """The budget that was given."""
        return getattr(self, self.kind)

    @property
    def is_fraction(self) -> bool:
        """Whether it is a share of what the dense model costs."""
        return isinstance(self.value, Real) and self.value < 1  # type: ignore[operator]

    def absolute(self, dense: float) -> float:
        """The budget in its own unit (of latency: seconds), when the dense model costs `dense`."""
        if isinstance(self.value, (str, timedelta)):
            return _seconds(self.value)
        return float(self.value) * (dense if self.is_fraction else 1)


_KINDS = ("params", "macs", "latency")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def _seconds(time: str | timedelta) -> float:
    """Seconds in a `timedelta`, or in a text that is a number and a unit. Raises ValueError for another text."""
    if isinstance(time, timedelta):
        return time.total_seconds()
    number, unit = re.fullmatch(r"\s*(.*?)\s*([a-z]*)\s*", time, re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        return float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ValueError(
            f"Budget: latency as a str must be a number and a unit, s, ms or us ('12 ms'), got {time!r}"
        ) from None


@dataclass(frozen=True)
class Option:
    """One way to build a layer.

    Attributes:
        cost: in the unit of the budget.
        error: the squared error that it brings.
        block: the factorized block (`menu.Block`) that it is; None: the dense layer.
    """

    cost: float
    error: float
    block: Any = None


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option per layer with the least sum of errors among all whose costs sum to at most the budget.

    This is a multiple-choice knapsack, solved by dynamic programming over costs that are rounded to whole steps, of
    which the budget has `STEPS`. There is one solution per number of steps; the one with the most steps whose true
    costs fit is taken. Then layers move to better options as long as the rest of the budget pays for it.

    Raises:
        ValueError: not even the cheapest options fit.
    """
    menus = [_undominated(menu) for menu in options]
    least = sum(menu[0].cost for menu in menus)
    allowed = budget * (1 + 1e-12)  # sums of costs are rounded
    if least > allowed:
        raise ValueError(f"the least possible is {least:.6g}, the budget {budget:.6g}")
    step = budget / STEPS or 1.0
    shifts = [[round(option.cost / step) for option in menu] for menu in menus]
    size = STEPS + len(menus) + 1  # sums of rounded costs may pass the budget where those of the costs do not
    best = np.zeros(size)
    taken: list[np.ndarray] = []
    for menu, costs in zip(menus, shifts, strict=True):
        total = np.full(size, np.inf)
        which = np.zeros(size, dtype=np.int32)
        for index, (option, shift) in enumerate(zip(menu, costs, strict=True)):
            if shift < size:
                reached = best[: size - shift] + option.error
                better = reached < total[shift:]
                total[shift:][better], which[shift:][better] = reached[better], index
        best = total
        taken.append(which)
    chosen = [0] * len(menus)
    for capacity in range(size - 1, -1, -1):
        if not np.isfinite(best[capacity]):
            break
        found = _followed_back(taken, shifts, capacity)
        if sum(menu[index].cost for menu, index in zip(menus, found, strict=True)) <= allowed:
            chosen = found
            break
    _use_the_rest(menus, chosen, allowed)
    return [menu[index] for menu, index in zip(menus, chosen, strict=True)]


def _followed_back(taken: Sequence[np.ndarray], shifts: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """The index of each layer's option in the best solution for `capacity` steps.

    Args:
        taken: for each layer, and for each number of steps that it and the layers before it may use, the index of its
            option.
        shifts: for each layer, the costs of its options in steps.
    """
    chosen: list[int] = []
    for which, costs in zip(reversed(taken), reversed(shifts), strict=True):
        index = int(which[capacity])
        chosen.append(index)
        capacity -= costs[index]
    return chosen[::-1]


def _undominated(options: Sequence[Option]) -> list[Option]:
    """The options with a lower error than every cheaper one, by rising cost and falling error."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _use_the_rest(layers: Sequence[Sequence[Option]], chosen: list[int], budget: float) -> None:
    """Moves layers to better options, the greatest gain in error first, as long as the budget allows it."""
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
