"""Runs, times and recorded calls of a model on an example input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops.model import example as example_module
from lowrank_ops.model import timing
from lowrank_ops.model.calls import InputKind
from lowrank_ops.model.example import Example
from lowrank_ops.model.sites import Site, find_sites, put_in, without_hooks
from lowrank_ops.model.timing import Rounds


class Scaled(nn.Module):
    """Changes its input, calls one layer twice, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        input.mul_(scale)
        return self.twice(self.twice(input)) @ input.T


def sites_of(model: nn.Module) -> list[Site]:
    return find_sites(model, lambda layer: isinstance(layer, nn.Linear))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 2.0), lambda x: [x, 2.0], lambda x: {"input": x}])
def test_a_run_changes_neither_input_nor_flags(wrap: Any) -> None:
    model, input = Scaled().train(), torch.ones(3, 4)
    model.never.eval()
    Example(model, wrap(input)).run()
    assert model.modes == [(False, False)]
    assert torch.equal(input, torch.ones(3, 4))
    assert model.training and model.twice.training and not model.never.training


def test_calls_are_recorded_by_layer() -> None:
    model = Scaled()
    example = Example(model, torch.ones(3, 4))
    layers = [model.twice, model.never]
    calls = example.record(layers)
    assert calls is example.calls and calls.layers() == layers
    kind = InputKind((3, 4), torch.float32, torch.device("cpu"), channels_last=False)
    assert calls.of(model.twice).inputs == {kind: 2} and calls.of(model.twice).output_size == (3, 4)
    assert not calls.of(model.never).inputs and calls.of(model.never).output_size is None
    assert calls.macs_elsewhere == 3 * 3 * 4
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


class Clock:
    """Stands for the module `time`: it goes on only where a layer says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (timing, example_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Slow(nn.Linear):
    """Takes the next of some times, the last one from then on."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        super().__init__(4, 4)
        self.clock, self.seconds = clock, list(seconds)

    def forward(self, input: Tensor) -> Tensor:
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return super().forward(input)


def test_the_least_time_after_a_first_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.Sequential(Slow(clock, 0.01, 0.07, 0.03, 0.05))
    assert Example(model, torch.ones(1, 4)).seconds() == pytest.approx(0.03)


def test_replacements_are_compared_and_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.Sequential(Slow(clock, 0.03), nn.ReLU())
    example, (site,) = Example(model, torch.ones(1, 4)), sites_of(model)
    site.layer.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 1))
    modules = {id(site.layer): Slow(clock, 0.01)}
    assert example.compare([site], modules) == pytest.approx((30, 10))  # without the hooks of the layer
    assert example.ratio([site], modules) == pytest.approx(0.01 / 1.03)
    assert model[0] is site.layer and len(site.layer._forward_hooks) == 1
    assert example.compare([], {}) == pytest.approx((1030, 1030))


def test_the_dense_model_is_back_after_an_error_that_names_the_replacement() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    (site,) = sites_of(model)
    modules = {id(site.layer): nn.Linear(5, 4)}
    with pytest.raises(RuntimeError, match=r"the factorized model fails in 0 \(Linear\), run on example_input"):
        Example(model, torch.ones(1, 4)).ratio([site], modules)
    assert model[0] is site.layer


def test_put_in_leaves_layers_without_a_module() -> None:
    model = Scaled()
    other = nn.Linear(4, 4)
    with put_in(sites_of(model), {id(model.twice): other}):
        assert model.get_submodule("twice") is other and model.never in model.children()
    assert model.get_submodule("twice") is not other


def test_a_layer_without_hooks_shares_its_parameters() -> None:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: pytest.fail("it ran"))
    bare = without_hooks(layer)
    assert bare.weight is layer.weight
    bare(torch.ones(1, 4))
    assert len(layer._forward_hooks) == 1


@pytest.mark.parametrize(("step", "rounds"), [(10.0, 3), (0.0, 7), (0.25, 4), (0.2, 5)])
def test_rounds_end_by_time_between_their_limits(monkeypatch: pytest.MonkeyPatch, step: float, rounds: int) -> None:
    clock = Clock(monkeypatch)
    found = 0
    for found, _ in enumerate(Rounds(least=3, most=7, seconds=1.0), 1):  # noqa: B007
        clock.now += step
    assert found == rounds
