"""`Budget`: the allocation against brute force, and what `factorize_` makes of it."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import Budget, factorize_
from lowrank_ops.budget import menu as options
from lowrank_ops.budget.knapsack import Option, allocate
from lowrank_ops.budget.menu import Block, Offer, count_cost, options_for
from lowrank_ops.model import example as example_module
from lowrank_ops.model.example import Example
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.counts import count_macs, count_parameters


@pytest.mark.parametrize("seed", range(20))
def test_an_allocation_is_the_best_there_is(seed: int) -> None:
    draw = random.Random(seed)
    menus = [
        [Option(draw.randint(1, 40), draw.random()) for _ in range(draw.randint(1, 5))]
        for _ in range(draw.randint(1, 5))
    ]
    least = sum(min(option.cost for option in menu) for menu in menus)
    budget = least + draw.randint(0, 60)
    best = min(
        sum(option.error for option in chosen)
        for chosen in itertools.product(*menus)
        if sum(option.cost for option in chosen) <= budget
    )
    chosen = allocate(menus, budget)
    assert sum(option.cost for option in chosen) <= budget
    assert all(option in menu for option, menu in zip(chosen, menus, strict=True))
    assert sum(option.error for option in chosen) == pytest.approx(best, abs=1e-12)


def test_rounding_never_exceeds_the_budget() -> None:
    menus = [[Option(1 / 3, 1.0), Option(2 / 3, 0.0)] for _ in range(3)]
    assert sum(option.cost for option in allocate(menus, 1.0)) <= 1.0 + 1e-12
    assert [option.error for option in allocate(menus, 2.0)] == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"the least possible is 1, the budget 0\.9"):
        allocate(menus, 0.9)


def test_a_great_layer_takes_the_budget_that_a_small_one_would_waste() -> None:
    menus = [[Option(1, 9.0), Option(10, 0.0)], [Option(1, 1.0), Option(10, 0.0)]]
    assert [option.error for option in allocate(menus, 11)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, ValueError, "exactly one of params, macs and latency, got none"),
        ({"params": 0.5, "macs": 0.5}, ValueError, "got params, macs"),
        ({"params": 1.5}, ValueError, r"params must be a fraction .*, a float in \(0, 1\), .* got 1.5"),
        ({"macs": 2e9}, ValueError, "or a number of its own, an int above 1, got 2000000000.0"),
        ({"macs": 1}, ValueError, "macs must be a fraction .* got 1"),
        ({"macs": 1.0}, ValueError, "macs must be a fraction .* got 1.0"),
        ({"params": 1}, ValueError, "params must be a fraction .* got 1"),
        ({"macs": 0}, ValueError, "macs must be positive and finite, got 0"),
        ({"macs": -0.5}, ValueError, "macs must be positive"),
        ({"params": float("nan")}, ValueError, "params must be positive and finite, got nan"),
        ({"latency": timedelta(0)}, ValueError, "latency must be positive"),
        ({"latency": 1}, ValueError, "latency=1 has no unit: a time is latency='12 ms'"),
        ({"latency": 1.0}, ValueError, r"latency=1.0 has no unit"),
        ({"latency": 1.01}, ValueError, r"latency=1.01 has no unit"),
        ({"latency": 12}, ValueError, "latency=12 has no unit"),
        ({"latency": "12"}, ValueError, "latency as a str must be a number and a unit, s, ms or us .* got '12'"),
        ({"latency": "1 h"}, ValueError, "got '1 h'"),
        ({"latency": "ms"}, ValueError, "got 'ms'"),
        ({"latency": "inf s"}, ValueError, "latency must be positive and finite, got inf s"),
        ({"latency": "-1 s"}, ValueError, "latency must be positive and finite, got -1 s"),
        ({"params": "half"}, TypeError, "params must be a number, got 'half'"),
        ({"params": True}, TypeError, "params must be a number, got True"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Budget(**arguments)


def test_fractions_numbers_and_times() -> None:
    assert Budget(params=0.25).absolute(1000) == 250
    assert Budget(params=250).absolute(1000) == 250
    assert Budget(macs=np.int64(2)).absolute(1000) == 2
    assert Budget(latency=0.5).absolute(0.08) == 0.04
    assert Budget(latency=timedelta(milliseconds=5)).absolute(0.08) == 0.005
    for text, seconds in {"12 ms": 0.012, "1.5s": 1.5, " 800 us ": 8e-4, "1e3 ms": 1.0}.items():
        assert Budget(latency=text).absolute(0.08) == pytest.approx(seconds)


class Network(nn.Sequential):
    """Layers of very different redundancy."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(48, 48, 1),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.Flatten(),
            nn.Linear(64 * 16, 40),
        )
        with torch.no_grad():  # rank 8 but for a little noise
            weight = self[6].weight
            thin = torch.randn(64, 8) @ torch.randn(8, 48 * 9)
            weight.copy_(thin.view_as(weight) * weight.std() / thin.std() + 1e-3 * weight)


INPUT = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("method", ["tucker", "cp", "auto"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "outputs"])
def test_budgets_of_parameters_and_multiplications_are_kept(model: Network, method: str, calibrated: bool) -> None:
    data = INPUT if calibrated else None
    for fraction in (0.3, 0.6):
        smaller = copy.deepcopy(model)
        factorize_(smaller, method, Budget(params=fraction), calibration=data, progress=False)  # type: ignore[arg-type]
        assert 0.8 * fraction < count_parameters(smaller) / count_parameters(model) <= fraction
    cheaper = copy.deepcopy(model)
    budget = Budget(macs=0.5)
    report = factorize_(cheaper, method, budget, calibration=data, example_input=INPUT, progress=False)  # type: ignore[arg-type]
    before, after = report.total("macs_before"), report.total("macs_after")
    assert before is not None and after is not None and 0.4 < after / before <= 0.5


def test_an_int_is_a_number_of_its_own(model: Network) -> None:
    factorize_(model, rank=Budget(params=30_000), progress=False)
    assert 27_000 < count_parameters(model) <= 30_000


def test_the_budget_goes_where_it_helps(model: Network) -> None:
    """Less error than the same fraction everywhere, at the same cost; the layer of low rank pays."""
    with torch.no_grad():
        expected = model(INPUT)

    def error(which: nn.Module) -> float:
        with torch.no_grad():
            return float((which(INPUT) - expected).norm() / expected.norm())

    uniform, spent = copy.deepcopy(model), copy.deepcopy(model)
    factorize_(uniform, rank=0.45, multiple=1, progress=False)
    report = factorize_(spent, rank=Budget(params=count_parameters(uniform)), calibration=INPUT, progress=False)
    assert count_parameters(spent) <= count_parameters(uniform)
    assert error(spent) < 0.7 * error(uniform)
    ranks = report["6"].ranks
    assert ranks is not None and ranks[-1] == 8


def test_layers_that_the_budget_leaves_dense(model: Network) -> None:
    report = factorize_(model, rank=Budget(params=0.97), calibration=INPUT, progress=False)
    reasons = {layer.reason for layer in report.skipped}
    assert "dense is the better use of the budget" in reasons
    assert report["6"].replaced_by is not None  # costs nothing


def test_a_budget_that_cannot_be_met_says_the_closest(model: Network) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"budget of 500 parameters cannot be met; the closest is [\d,]+ parameters"
    ) as info:
        factorize_(model, rank=Budget(params=500), progress=False)
    assert "0 parameters lie outside" in str(info.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    closest = int(str(info.value).split("closest is ")[1].split(" ")[0].replace(",", ""))
    factorize_(model, rank=Budget(params=closest), multiple=8, progress=False)
    assert count_parameters(model) <= closest


def test_a_budget_next_to_the_least_possible_is_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """Where most of the model stays as it is, a few percent of the whole are much of what is left to the layers."""

    def made(share: float) -> list[str]:
        layer = nn.Linear(64, 64, bias=False)
        layer.weight.data = torch.diag(0.5 ** torch.arange(64.0))
        rest = OtherWeight(120)
        factorize_(nn.Sequential(layer, rest), rank=Budget(params=share), multiple=1, progress=False)
        found = [str(recwarn.pop().message) for _ in range(len(recwarn))]
        return [message for message in found if "close to the least possible" in message]

    (message,) = made(0.8)  # 18,496 parameters, 14,400 of them elsewhere: rank 3, and with 3 % more rank 6
    assert re.search(r"budget of 14,797 parameters .*: 15,241 parameters would leave 2% of the squared error", message)
    assert made(0.98) == []  # rank 27, without an error worth a word


def test_a_model_of_factorized_layers_only(model: Network) -> None:
    factorize_(model, rank=Budget(params=0.3), exclude=["0", "4"], progress=False)
    again = nn.Sequential(*(layer for layer in model if isinstance(layer, FactorizedModule)))
    with pytest.raises(ValueError, match=r"model is already factorized, all \d of its layers; to_dense"):
        factorize_(again, rank=Budget(params=0.5), progress=False)
    with pytest.raises(ValueError, match="cannot be met; the closest is"):  # what is left dense is not enough
        factorize_(model, rank=Budget(params=0.05), progress=False)


class OtherWeight(nn.Module):
    """Half of a model's parameters in no layer that can be replaced."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


@pytest.mark.parametrize("budget", [Budget(params=0.5), Budget(params=100), Budget(latency="1 us"), Budget(macs=0.5)])
@pytest.mark.parametrize(
    "model",
    [nn.Sequential(OtherWeight()), nn.Sequential(OtherWeight(), nn.Conv1d(5, 5, 1, groups=5))],
    ids=["no layers", "none to replace"],
)
def test_a_budget_without_a_layer_to_replace_is_an_error(model: nn.Module, budget: Budget) -> None:
    with pytest.raises(ValueError, match=r"cannot be met: the dense model takes .* none of its layers may be replaced"):
        factorize_(model, rank=budget, example_input=torch.ones(2, 5, 32), progress=False)


def test_a_budget_below_the_rest_of_the_model_is_an_error() -> None:
    """Also where the layers that may be replaced cost nothing, because the model does not call them."""

    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.unused = nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 3)

        def forward(self, input: Tensor) -> Tensor:
            return self.grouped(input)

    example = torch.ones(1, 16, 8, 8)
    with pytest.raises(ValueError, match=r"cannot be met; the closest is 41,472 multiplications \(100%"):
        factorize_(Uncalled(), rank=Budget(macs=0.5), example_input=example, progress=False)
    model = nn.Sequential(OtherWeight(), nn.Linear(32, 32))
    with pytest.raises(ValueError, match="of which 1,024 parameters lie outside"):
        factorize_(model, rank=Budget(params=0.3), progress=False)


def test_a_budget_of_multiplications_needs_layers_that_the_input_reaches(model: Network) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input: Tensor) -> Tensor:
            return input

    for macs in (0.5, 10**9):
        with pytest.raises(ValueError, match="the example input reaches no convolution or linear layer"):
            factorize_(Skips(), rank=Budget(macs=macs), example_input=INPUT, progress=False)
    with pytest.raises(ValueError, match="none of its layers may be replaced"):
        factorize_(nn.Sequential(OtherWeight()), rank=Budget(macs=10**9), example_input=torch.ones(2, 32))


@pytest.mark.parametrize("budget", [Budget(params=10**6), Budget(macs=10**12), Budget(latency="1000 s")])
def test_a_budget_that_is_met_already_does_nothing_and_says_so(model: Network, budget: Budget) -> None:
    layers = list(model)
    with pytest.warns(UserWarning, match=r"budget of .* is met already, the dense model takes .*: nothing is replaced"):
        report = factorize_(model, rank=budget, calibration=INPUT, progress=False)
    assert list(model) == layers and not report.replaced
    assert {layer.reason for layer in report} == {"the budget is met without it"}


@pytest.mark.parametrize("method", ["tucker", "cp", "auto"])
def test_a_layer_whose_attributes_no_block_can_have_is_not_counted_on(method: str) -> None:
    """It stays dense, which the budget must know when it is spent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    model[0].rank = 3  # type: ignore[assignment]
    report = factorize_(model, method, Budget(params=0.6), progress=False)
    assert "an attribute 'rank' of its own" in str(report["0"].reason)
    assert count_parameters(model) <= 0.6 * report.model_parameters_before


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_biases_that_calibration_adds_are_in_the_budget(fraction: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 400, 1, bias=False), nn.ReLU(), nn.Conv2d(400, 12, 1, bias=False))
    budget = fraction * count_parameters(model)
    factorize_(model, rank=Budget(params=fraction), calibration=torch.randn(64, 12, 4, 4), progress=False)
    assert count_parameters(model) <= budget and any(isinstance(layer, FactorizedModule) for layer in model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "auto", "rank": 0.5}, r"method 'auto' spends a budget; give rank=Budget"),
        ({"rank": Budget(macs=0.5)}, "a budget of macs needs an input"),
        ({"rank": Budget(latency=0.5)}, "a budget of latency needs an input"),
        ({"rank": Budget(params=0.5), "linear": 8}, "linear must be None or False with a Budget"),
    ],
)
def test_bad_combinations(model: Network, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize_(model, progress=False, **arguments)
    assert not any(isinstance(layer, FactorizedModule) for layer in model.modules())


def _counted(monkeypatch: pytest.MonkeyPatch, scale: Callable[[nn.Module], float]) -> None:
    """Time by multiplications: a clock that does not vary."""
    monkeypatch.setattr(
        options.Clock,
        "of",
        lambda self, layer, calls: (
            lambda module: 1e-9 * scale(module) * (calls.total(lambda shape: count_macs(module, shape)))
        ),
    )

    def whole(example: Example) -> float:
        shapes: list[float] = []
        layers = [layer for layer in example.model.modules() if count_macs(layer) is not None]
        handles = [
            layer.register_forward_hook(
                lambda layer, args, out: shapes.append(1e-9 * scale(layer) * (count_macs(layer, args[0].shape) or 0))
            )
            for layer in layers
        ]
        example.run()
        for handle in handles:
            handle.remove()
        return sum(shapes) + 1e-5

    monkeypatch.setattr(Example, "seconds", whole)
    monkeypatch.setattr(Example, "share_of", lambda example, layers: 1 - 1e-5 / whole(example))


def test_a_latency_budget_counts_time_and_is_checked_on_the_whole_model(
    model: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    _counted(monkeypatch, lambda module: 1.0)
    before = Example(model, INPUT).seconds()
    report = factorize_(model, rank=Budget(latency=0.5, example_input=INPUT), progress=False)
    assert 0.4 * before < Example(model, INPUT).seconds() <= 0.5 * before
    for layer in report.replaced:
        assert layer.ranks is not None and all(rank % 16 == 0 or rank < 16 for rank in layer.ranks)


def test_layers_timed_while_the_machine_is_slow_change_nothing(model: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and the whole model are timed minutes apart: the share that the layers have of it is measured in it."""
    _counted(monkeypatch, lambda module: 1.0)
    budget = Budget(latency=0.5, example_input=INPUT)
    expected = factorize_(copy.deepcopy(model), rank=budget, progress=False)
    undisturbed = options.Clock.of
    monkeypatch.setattr(
        options.Clock,
        "of",
        lambda self, layer, calls: lambda module: 3 * undisturbed(self, layer, calls)(module),
    )
    found = factorize_(model, rank=budget, progress=False)
    assert [layer.ranks for layer in found] == [layer.ranks for layer in expected]


def test_the_share_of_the_layers_is_that_of_the_running_model(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0  # a clock that only the modules move
    monkeypatch.setattr(example_module, "time", SimpleNamespace(perf_counter=lambda: now))

    class Slow(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            nonlocal now
            now += 0.03
            return super().forward(input)

    class Rest(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            nonlocal now
            now += 0.01
            return input

    layer = Slow(4, 4)
    model = nn.Sequential(layer, Rest())
    assert Example(model, torch.ones(1, 4)).share_of([layer]) == pytest.approx(0.75)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_a_latency_that_the_layers_alone_underestimate_is_corrected(
    model: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    _counted(monkeypatch, lambda module: 1.0)
    alone = Example.seconds

    def slower_together(example: Example) -> float:
        factorized = any(isinstance(layer, FactorizedModule) for layer in example.model.modules())
        return alone(example) * (1.2 if factorized else 1.0)

    monkeypatch.setattr(Example, "seconds", slower_together)
    before = Example(model, INPUT).seconds()
    factorize_(model, rank=Budget(latency=0.5, example_input=INPUT), progress=False)
    assert Example(model, INPUT).seconds() <= 0.5 * before


@pytest.mark.parametrize("whole", [lambda alone: 0.75 * alone, lambda alone: 0.45 + 0.2 * alone])
def test_a_latency_budget_is_used_up(
    model: Network, monkeypatch: pytest.MonkeyPatch, whole: Callable[[float], float]
) -> None:
    """Where blocks are faster together than one by one, and where they save little until much is taken away."""
    _counted(monkeypatch, lambda module: 1.0)
    alone = Example.seconds
    before = Example(model, INPUT).seconds()

    def together(example: Example) -> float:
        factorized = any(isinstance(layer, FactorizedModule) for layer in example.model.modules())
        taken = alone(example)
        return before * whole(taken / before) if factorized else taken

    monkeypatch.setattr(Example, "seconds", together)
    factorize_(model, rank=Budget(latency=0.5, example_input=INPUT), progress=False)
    assert 0.48 * before < Example(model, INPUT).seconds() <= 0.5 * before


def test_a_latency_that_only_the_layers_alone_reach_is_approached_and_warned_of(
    model: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrections never ask for less than the closest: that is what is left to do, and it is said."""
    _counted(monkeypatch, lambda module: 1.0)
    alone, largest = Example.seconds, copy.deepcopy(model)
    before = Example(model, INPUT).seconds()
    monkeypatch.setattr(
        Example,
        "seconds",
        lambda example: (
            max(alone(example), 0.6 * before)
            if any(isinstance(layer, FactorizedModule) for layer in example.model.modules())
            else alone(example)
        ),
    )
    with pytest.warns(UserWarning, match=r"budget of .* ms, but .* takes .* ms") as caught:
        report = factorize_(model, rank=Budget(latency=0.5, example_input=INPUT), progress=False)
    assert caught[0].filename == __file__
    assert report.replaced and alone(Example(model, INPUT)) < 0.5 * alone(Example(largest, INPUT))


def test_a_layer_that_would_not_get_faster_is_left(model: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    _counted(
        monkeypatch,
        lambda module: (
            1e4
            if isinstance(module, FactorizedModule) and module.bias is not None and module.out_factor.shape[0] == 48
            else 1.0
        ),
    )
    report = factorize_(model, rank=Budget(latency=0.8, example_input=INPUT), progress=False)
    assert report["2"].reason == "no factorized block would take fewer milliseconds"
    assert report["4"].reason == "no factorized block would take fewer milliseconds"


def test_the_errors_of_the_options_are_those_of_the_decompositions() -> None:
    """Tucker's are those of the truncated HOSVD, a matrix' those of its SVD: exact, and sums over both modes."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(24, 32, 3), nn.Linear(40, 24)
    weight = conv.weight.detach().double()
    by_block = {option.block: option.error for option in options_for(conv, weight, count_parameters, Offer("tucker"))}
    bases = [torch.linalg.svd(weight.transpose(0, mode).flatten(1), full_matrices=False)[0] for mode in (0, 1)]
    for in_rank, out_rank in ((8, 8), (16, 8), (8, 24)):
        left, right = bases[0][:, :out_rank], bases[1][:, :in_rank]
        projected = torch.einsum("tu,uv,vsij,sz,zy->tyij", left, left.T, weight, right, right.T)
        expected = float((weight - projected).square().sum())
        assert by_block[Block("tucker", (in_rank, out_rank))] == pytest.approx(expected, rel=1e-9)
    matrix = linear.weight.detach().double()
    values = torch.linalg.svdvals(matrix).square()
    for option in options_for(linear, matrix, count_parameters, Offer("tucker")):
        if option.block is not None:
            assert option.error == pytest.approx(float(values[option.block.rank :].sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(32, 1, 3, 3), (64, 2, 3, 3), (8, 8, 1, 5), (32, 32, 3, 3)], ids=str)
def test_no_option_loses_more_than_the_weight(shape: tuple[int, ...]) -> None:
    """CP of a few input channels is exact at ranks near those that are tried: no line through zero goes to the sky."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])  # type: ignore[arg-type]
    menu = options_for(layer, weight / weight.norm(), count_parameters, Offer("cp"))
    assert len(menu) > 1 or shape[1] == 1  # as large as the weight at every rank then
    assert all(0 <= option.error <= 1 + 1e-9 for option in menu)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(24, 40, (3, 5), stride=2), nn.Conv1d(24, 40, 3), nn.Conv2d(24, 40, 1), nn.Linear(24, 40)],
    ids=str,
)
@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_the_costs_of_the_options_are_those_of_the_modules(layer: nn.Module, method: str) -> None:
    weight = layer.weight.detach().double()
    found = options_for(layer, weight, count_cost("params", None), Offer(method))
    assert len(found) > 2
    for option in found[1:]:
        module = options.empty_module(layer, option.block)
        assert option.cost == pytest.approx(count_parameters(module), abs=1e-6)
        assert option.cost < count_parameters(layer)
