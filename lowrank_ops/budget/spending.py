"""A `Budget` spent on a model: one choice per layer, and why the others stay dense."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from lowrank_ops.budget.knapsack import Budget, Option, allocate
from lowrank_ops.budget.menu import Choice, Clock, count_cost, empty_module, macs_in, options_for
from lowrank_ops.budget.sketch import sketched
from lowrank_ops.model.calls import Calls, model_errors, run_example
from lowrank_ops.model.sites import Site, keep_attributes
from lowrank_ops.nn.counts import count_parameters
from lowrank_ops.runtime.modes import synchronize
from lowrank_ops.text.tables import figure
from lowrank_ops.text.warn import warn

# Ranks offered for a latency: whole vectors.
_LANES = 16
# So many allocations are measured as a whole, until one takes at least so much of the target.
_TRIALS, _USED = 6, 0.97
# Warn where this share more of the budget would leave less than this share of the squared error, and that is more than
# this share of what the lowest ranks have.
_MORE, _STEEP, _SEEN = 0.03, 0.5, 0.01
# Dense and factorized model in so many turns; in each so many seconds, or so many runs at least and at most.
_TURNS, _SECONDS, _RUNS = 5, 0.2, (2, 20)


def spend(
    budget: Budget,
    model: nn.Module,
    sites: Sequence[Site],
    weigh: Callable[[Site], Tensor],
    method: str,
    multiple: int,
    seed: int,
    calls: Calls | None,
    example_input: Any,
    calibrated: bool,
    progress: bool,
) -> tuple[dict[int, Choice], dict[int, str]]:
    """Chooses for each site, by the id of its layer: a `Choice`, or why it stays dense.

    Args:
        budget: of the whole model.
        sites: the layers that may be replaced.
        weigh: gives a site's weight, whitened or normalized: see `options.options_for`.
        calls: of the layers on `example_input`, for multiplications and latency.
        calibrated: layers without a bias will get one.

    Raises:
        ValueError: the budget cannot be met; the message says what could be reached.
    """
    clock = Clock()
    menus: list[list[Option]] = []
    with tqdm(sites, desc="options", unit="layer", file=sys.stderr, disable=not progress, leave=False) as bar:
        for site in bar:
            bar.set_postfix_str(site.names[0])
            layer: Any = site.layer
            seen = None if calls is None else calls.of(layer)
            if budget.kind == "latency":
                assert seen is not None
                cost, step = clock.of(layer, seen), max(multiple, _LANES)
            else:
                cost, step = count_cost(budget.kind, seen, calibrated), multiple
            menus.append(options_for(layer, weigh(site), method, cost, step, site.names[0], seed))
    dense = sum(menu[0].cost for menu in menus)
    whole = _whole_cost(budget, model, calls, example_input)
    if budget.kind == "latency" and dense > 0:
        # Layers are timed one by one, later: scaled to the share of the model's time that they have when it runs.
        scale = whole * _share(model, sites, example_input) / dense
        menus = [[replace(option, cost=scale * option.cost) for option in menu] for menu in menus]
        dense *= scale
    target = budget.absolute(whole)
    rest = max(whole - dense, 0.0)
    chosen = _allocate(menus, target, rest, budget.kind, whole)
    if budget.kind == "latency":

        def measured(tried: Sequence[Option]) -> float:
            return whole * _trial(model, sites, tried, example_input)

        chosen = _corrected(chosen, menus, target, rest, whole, measured)
    _warn_where_steep(chosen, menus, target, budget.kind)
    choices: dict[int, Choice] = {}
    reasons: dict[int, str] = {}
    for site, menu, option in zip(sites, menus, chosen, strict=True):
        if option.choice is not None:
            choices[id(site.layer)] = option.choice
        elif len(menu) == 1:
            reasons[id(site.layer)] = f"no factorized block would take fewer {_NOUNS[budget.kind]}"
        else:
            reasons[id(site.layer)] = "dense is the better use of the budget"
    return choices, reasons


def met_already(
    budget: Budget, model: nn.Module, sites: Sequence[Site], calls: Calls | None, example_input: Any
) -> bool:
    """Whether the dense model keeps the budget; warns then that nothing is replaced.

    Raises ValueError where it does not, and there is no layer to replace; and for multiplications where the input
    reaches no layer whose multiplications are known.
    """
    whole = _whole_cost(budget, model, calls, example_input)
    target = budget.absolute(whole)
    wanted = f"factorize_: the budget of {_shown(target, budget.kind)}"
    uncounted = budget.kind == "macs" and not whole
    if not budget.is_fraction and target >= whole and not uncounted:
        taken = f"is met already, the dense model takes {_shown(whole, budget.kind)}"
        warn(f"{wanted} {taken}: nothing is replaced")
        return True
    if not sites:
        raise ValueError(
            f"{wanted} cannot be met: the dense model takes {_shown(whole, budget.kind)}, and none of its layers may "
            "be replaced; factorize_ with a rank instead of a Budget reports why"
        )
    if not whole:
        raise ValueError(
            f"{wanted} cannot be met: the example input reaches no convolution or linear layer; a budget of params "
            "needs none"
        )
    return False


_NOUNS = {"params": "parameters", "macs": "multiplications", "latency": "milliseconds"}


def _allocate(menus: Sequence[Sequence[Option]], target: float, rest: float, kind: str, whole: float) -> list[Option]:
    cheapest = sum(min(option.cost for option in menu) for menu in menus)
    room = target - rest
    if cheapest - 1e-12 * target < room < cheapest:  # sums are rounded
        room = cheapest
    try:
        return allocate(menus, room)
    except ValueError:
        least = rest + cheapest
        raise ValueError(
            f"factorize_: the budget of {_shown(target, kind)} cannot be met; the closest is {_shown(least, kind)} "
            f"({least / whole:.0%} of the dense model's {_shown(whole, kind)}), of which "
            f"{_shown(rest, kind)} lie outside of the layers that may be replaced"
        ) from None


def _corrected(
    chosen: list[Option],
    menus: Sequence[Sequence[Option]],
    target: float,
    rest: float,
    whole: float,
    measured: Callable[[Sequence[Option]], float],
) -> list[Option]:
    """The allocation whose latency, measured as a whole, comes closest below the target; a warning if none is below.

    Layers timed one by one promise more or less than the model keeps. So what is allowed to their sum is moved until
    the model takes what was asked for: not more, and no less either, as the last few percent can cost much accuracy.

    Args:
        chosen: for `target` seconds by the sum of the layers.
        menus, rest, whole: the options, seconds of the dense model outside of their layers, and of all of it.
        measured: seconds of the model with these options.
    """
    least = rest + sum(min(option.cost for option in menu) for menu in menus)
    most = rest + sum(menu[0].cost for menu in menus)
    allowed, fits, fails = target, None, None
    best, fastest, known = chosen, math.inf, dict[tuple[int, ...], float]()
    for trial in range(2 * _TRIALS):
        options = tuple(map(id, chosen))
        if options not in known:
            if len(known) == _TRIALS:
                break
            known[options] = measured(chosen)
        taken = known[options]
        if taken <= target:
            # A longer time allowed has no larger error: the latest that fits is the best.
            fits, best, fastest = (allowed, taken), chosen, taken
            if taken >= _USED * target or all(option.choice is None for option in chosen):
                break
        else:
            fails = (allowed, taken)
            if fits is None and taken < fastest:
                best, fastest = chosen, taken
        aim = target * (1 + _USED) / 2
        if fits is not None and fails is not None:
            share = (aim - fits[1]) / (fails[1] - fits[1])
            allowed = fits[0] + min(max(share, 0.25), 0.75) * (fails[0] - fits[0])
        else:
            allowed = min(max(allowed + 2**trial * (aim - taken), least), most)
        chosen = _allocate(menus, allowed, rest, "latency", whole)
    if fastest > target:
        warn(
            f"factorize_: by its layers alone the model fits the budget of {_shown(target, 'latency')}, but measured "
            f"as a whole it takes {_shown(fastest, 'latency')}",
        )
    return best


def _warn_where_steep(chosen: Sequence[Option], menus: Sequence[Sequence[Option]], target: float, kind: str) -> None:
    """Says so where a little more budget would lessen the error by much: close to what can be reached at all."""
    error = sum(option.error for option in chosen)
    if error <= _SEEN * sum(max(option.error for option in menu) for menu in menus):
        return
    more = allocate(menus, sum(option.cost for option in chosen) + _MORE * target)
    left = sum(option.error for option in more)
    if left < _STEEP * error:
        warn(
            f"factorize_: the budget of {_shown(target, kind)} is close to the least possible, where accuracy is "
            f"lost fast: {_shown((1 + _MORE) * target, kind)} would leave {left / error:.0%} of the squared error "
            "that is expected of its ranks"
        )


def _shown(value: float, kind: str) -> str:
    return f"{figure(1e3 * value)} ms" if kind == "latency" else f"{value:,.0f} {_NOUNS[kind]}"


def _whole_cost(budget: Budget, model: nn.Module, calls: Calls | None, example_input: Any) -> float:
    """What the dense model costs."""
    if budget.kind == "params":
        return float(count_parameters(model))
    assert calls is not None
    if budget.kind == "latency":
        return _seconds(model, example_input)
    return float(sum(macs_in(calls.of(layer), layer) or 0 for layer in calls.layers()))


def _trial(model: nn.Module, sites: Sequence[Site], chosen: Sequence[Option], example_input: Any) -> float:
    """Time with modules of the chosen ranks in place, near their layers, over the dense model's; it is as it was then.

    Both are measured in turn: what else the machine does by now must not look like a slow choice.
    """
    modules: dict[int, nn.Module] = {}
    for site, option in zip(sites, chosen, strict=True):
        if option.choice is not None:
            layer: Any = site.layer
            module = sketched(empty_module(layer, option.choice), layer)
            keep_attributes(layer, module)
            module._read_is_known = True  # the report says so
            modules[id(layer)] = module
    ratios = []
    for _ in range(_TURNS):
        dense = _seconds(model, example_input)
        try:
            for site in sites:
                site.put(modules.get(id(site.layer), site.layer))
            with model_errors("factorize_: the factorized model", model, "example_input"):
                ratios.append(_seconds(model, example_input) / dense)
        finally:
            for site in sites:
                site.put(site.layer)
    return statistics.median(ratios)


def _share(model: nn.Module, sites: Sequence[Site], example_input: Any) -> float:
    """The share of the model's time that passes in the layers of the sites."""
    inside = 0.0
    started: list[float] = []

    def enter(*_: Any) -> None:
        synchronize()
        started.append(time.perf_counter())

    def leave(*_: Any) -> None:
        nonlocal inside
        synchronize()
        inside += time.perf_counter() - started.pop()

    handles = [site.layer.register_forward_pre_hook(enter) for site in sites]
    handles += [site.layer.register_forward_hook(leave) for site in sites]
    shares = []
    try:
        for _ in range(_TURNS):
            inside = 0.0
            begun = time.perf_counter()
            run_example(model, example_input)
            synchronize()
            shares.append(inside / (time.perf_counter() - begun))
    finally:
        for handle in handles:
            handle.remove()
    return statistics.median(shares)


def _seconds(model: nn.Module, example_input: Any) -> float:
    run_example(model, example_input)
    samples: list[float] = []
    while len(samples) < _RUNS[0] or (len(samples) < _RUNS[1] and sum(samples) < _SECONDS):
        started = time.perf_counter()
        run_example(model, example_input)
        synchronize()
        samples.append(time.perf_counter() - started)
    return min(samples)  # as the layers', see `options.Clock`
