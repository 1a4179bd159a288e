"""A `Budget` spent on a model: one option is chosen for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lowrank_ops.budget.knapsack import Budget, Option, allocate
from lowrank_ops.budget.menu import Block, Clock, Offer, count_cost, empty_module, macs_in, options_for
from lowrank_ops.budget.sketch import sketched
from lowrank_ops.model.example import Example
from lowrank_ops.model.sites import Site, keep_attributes
from lowrank_ops.nn.counts import count_parameters
from lowrank_ops.text.progress import progress_bar
from lowrank_ops.text.tables import figure
from lowrank_ops.text.warn import warn

# Ranks for a latency are multiples of this: whole vectors.
_LANES = 16
# At most this many allocations are timed in the whole model; the first that uses this share of the target is taken.
_TRIALS, _USED = 6, 0.97
# A budget near a cliff is warned of: one larger by the share `_MORE` would leave less than `_STEEP` of the squared
# error. Errors below `_SEEN` of the error at the lowest ranks are too small to warn of.
_MORE, _STEEP, _SEEN = 0.03, 0.5, 0.01

NOUNS = {"params": "parameters", "macs": "multiplications", "latency": "milliseconds"}


@dataclass(frozen=True)
class Choice:
    """The decision for one layer: the option that was taken, and how many there were, the dense layer included."""

    option: Option
    offered: int

    @property
    def block(self) -> Block | None:
        """The block that replaces the layer; None: it stays dense."""
        block: Block | None = self.option.block
        return block


@dataclass
class Spending:
    """A budget for one model: the dense model's cost, and the search for the options that keep the budget.

    Costs are parameters, multiply-accumulates or, for a latency, seconds.

    Args:
        budget: for the whole model.
        example: of the model, with recorded calls of the layers; only a budget of parameters can do without (None).
        calibrated: whether the blocks will be fitted to data: then each gets a bias.
        progress: whether to show a progress bar.

    Attributes:
        whole: cost of the dense model.
        target: cost that the factorized model may have.
        rest: the part of the cost outside of the layers that a choice is made for. Set by `choose`, like `menus`.
        menus: the options of these layers; the first of each is the dense layer.
    """

    budget: Budget
    model: nn.Module
    example: Example | None
    calibrated: bool
    progress: bool
    whole: float = field(init=False)
    target: float = field(init=False)
    rest: float = field(init=False, default=0.0)
    menus: Sequence[Sequence[Option]] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.whole = self._dense_cost()
        self.target = self.budget.absolute(self.whole)

    def _dense_cost(self) -> float:
        if self.budget.kind == "params":
            return float(count_parameters(self.model))
        assert self.example is not None
        if self.budget.kind == "latency":
            return self.example.seconds()
        calls = self.example.calls
        return float(sum(macs_in(calls.of(layer), layer) or 0 for layer in calls.layers()))

    def met_already(self, sites: Sequence[Site]) -> bool:
        """Whether the dense model keeps the budget, so that nothing needs to be replaced; a warning says so.

        Args:
            sites: the layers that may be replaced.

        Raises:
            ValueError: the dense model does not keep the budget, and no layer may be replaced; or the budget is one of
                multiplications, and the example input reaches no layer whose multiplications are known.
        """
        kind, wanted = self.budget.kind, f"factorize_: the budget of {self._shown(self.target)}"
        uncounted = kind == "macs" and not self.whole
        if not self.budget.is_fraction and self.target >= self.whole and not uncounted:
            taken = f"is met already, the dense model takes {self._shown(self.whole)}"
            warn(f"{wanted} {taken}: nothing is replaced")
            return True
        if not sites:
            raise ValueError(
                f"{wanted} cannot be met: the dense model takes {self._shown(self.whole)}, and none of its layers may "
                "be replaced; factorize_ with a rank instead of a Budget reports why"
            )
        if not self.whole:
            raise ValueError(
                f"{wanted} cannot be met: the example input reaches no convolution or linear layer; a budget of params "
                "needs none"
            )
        return False

    def choose(self, sites: Sequence[Site], weigh: Callable[[Site], Tensor], offer: Offer) -> list[Choice]:
        """The choice for each site.

        Args:
            sites: the layers that may be replaced.
            weigh: gives a site's weight, whitened or normalized: see `menu.options_for`.
            offer: which options there are; the name is set for each layer.

        Raises:
            ValueError: the budget cannot be met; the message says what could be reached.
        """
        self.menus = self._menus(sites, weigh, offer)
        if self.budget.kind == "latency":
            self._scale_to_the_running_model(sites)
        self.rest = max(self.whole - sum(menu[0].cost for menu in self.menus), 0.0)
        chosen = self._allocate(self.target)
        if self.budget.kind == "latency":
            chosen = self._corrected(chosen, lambda options: self._measured(sites, options))
        self._warn_where_steep(chosen)
        return [Choice(option, len(menu)) for option, menu in zip(chosen, self.menus, strict=True)]

    def _menus(self, sites: Sequence[Site], weigh: Callable[[Site], Tensor], offer: Offer) -> list[list[Option]]:
        clock, menus = Clock(), []
        with progress_bar("options", self.progress, sites, "layer") as bar:
            for site in bar:
                bar.set_postfix_str(site.names[0])
                layer: Any = site.layer
                seen = None if self.example is None else self.example.calls.of(layer)
                if self.budget.kind == "latency":
                    assert seen is not None
                    cost, multiple = clock.of(layer, seen), max(offer.multiple, _LANES)
                else:
                    cost, multiple = count_cost(self.budget.kind, seen, self.calibrated), offer.multiple
                own = replace(offer, multiple=multiple, name=site.names[0])
                menus.append(options_for(layer, weigh(site), cost, own))
        return menus

    def _scale_to_the_running_model(self, sites: Sequence[Site]) -> None:
        """Layers are timed one by one, at another moment than the model: their times are scaled, all alike, so that the
        dense ones add up to the share of the model's time that they have when the model runs."""
        dense = sum(menu[0].cost for menu in self.menus)
        if dense > 0:
            assert self.example is not None
            scale = self.whole * self.example.share_of([site.layer for site in sites]) / dense
            self.menus = [[replace(option, cost=scale * option.cost) for option in menu] for menu in self.menus]

    def _allocate(self, allowed: float) -> list[Option]:
        """The options with the least error among those with which the model costs at most `allowed` by the menus."""
        cheapest = self._cheapest()
        room = allowed - self.rest
        if cheapest - 1e-12 * allowed < room < cheapest:  # sums are rounded
            room = cheapest
        try:
            return allocate(self.menus, room)
        except ValueError:
            least = self.rest + cheapest
            raise ValueError(
                f"factorize_: the budget of {self._shown(allowed)} cannot be met; the closest is {self._shown(least)} "
                f"({least / self.whole:.0%} of the dense model's {self._shown(self.whole)}), of which "
                f"{self._shown(self.rest)} lie outside of the layers that may be replaced; factorize_ with a rank "
                "instead of a Budget reports why each of the others may not"
            ) from None

    def _cheapest(self) -> float:
        return sum(min(option.cost for option in menu) for menu in self.menus)

    def _corrected(self, chosen: list[Option], measured: Callable[[Sequence[Option]], float]) -> list[Option]:
        """The options with which the whole model comes closest to the target from below; a warning if none is below it.

        The model may take more or less time than its layers' times add up to. So the sum that the layers are allowed is
        changed until the model takes the target: not more, but not much less either, since the last few percent of time
        can cost much accuracy.

        Args:
            chosen: the options for `target` seconds by the sum of the layers' times.
            measured: seconds of the whole model with these options.
        """
        least = self.rest + self._cheapest()
        most = self.rest + sum(menu[0].cost for menu in self.menus)
        aim = self.target * (1 + _USED) / 2
        # Pairs of (seconds allowed, seconds measured): the latest within the target, and the latest above it.
        below: tuple[float, float] | None = None
        above: tuple[float, float] | None = None
        allowed, best, fastest = self.target, chosen, math.inf
        known: dict[tuple[int, ...], float] = {}  # measured seconds, by the options' ids
        for trial in range(2 * _TRIALS):
            options = tuple(map(id, chosen))
            if options not in known:
                if len(known) == _TRIALS:
                    break
                known[options] = measured(chosen)
            taken = known[options]
            if taken <= self.target:
                # A larger sum allowed has no larger error: the latest options within the target are the best so far.
                below, best, fastest = (allowed, taken), chosen, taken
                if taken >= _USED * self.target or all(option.block is None for option in chosen):
                    break
            else:
                above = (allowed, taken)
                if below is None and taken < fastest:
                    best, fastest = chosen, taken
            if below is not None and above is not None:
                share = (aim - below[1]) / (above[1] - below[1])
                allowed = below[0] + min(max(share, 0.25), 0.75) * (above[0] - below[0])
            else:
                allowed = min(max(allowed + 2**trial * (aim - taken), least), most)
            chosen = self._allocate(allowed)
        if fastest > self.target:
            warn(
                f"factorize_: the times of the layers add up to no more than the budget of "
                f"{self._shown(self.target)}, but the whole model takes {self._shown(fastest)}, the least of "
                f"{len(known)} allocations that were timed"
            )
        return best

    def _measured(self, sites: Sequence[Site], options: Sequence[Option]) -> float:
        """Seconds of the whole model with modules of these options, whose values are near those of the layers."""
        modules: dict[int, nn.Module] = {}
        for site, option in zip(sites, options, strict=True):
            if option.block is not None:
                layer: Any = site.layer
                module = sketched(empty_module(layer, option.block), layer)
                keep_attributes(layer, module)
                module._read_is_known = True  # no warning of reads here: the report notes them
                modules[id(layer)] = module
        assert self.example is not None
        return self.whole * self.example.ratio(sites, modules)

    def _warn_where_steep(self, chosen: Sequence[Option]) -> None:
        """Warns where a little more budget would lessen the error by much: close to the least possible cost."""
        error = sum(option.error for option in chosen)
        if error <= _SEEN * sum(max(option.error for option in menu) for menu in self.menus):
            return
        more = allocate(self.menus, sum(option.cost for option in chosen) + _MORE * self.target)
        left = sum(option.error for option in more)
        if left < _STEEP * error:
            warn(
                f"factorize_: the budget of {self._shown(self.target)} is close to the least possible, where accuracy "
                f"is lost fast: {self._shown((1 + _MORE) * self.target)} would leave {left / error:.0%} of the squared "
                "error that is expected of its ranks"
            )

    def _shown(self, cost: float) -> str:
        kind = self.budget.kind
        return f"{figure(1e3 * cost)} ms" if kind == "latency" else f"{cost:,.0f} {NOUNS[kind]}"
