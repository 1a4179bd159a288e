"""Layers whose moments do not fit at the same time are calibrated in groups, with the same result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import Budget, factorize_
from lowrank_ops.calibrate import calibration, moment_groups
from lowrank_ops.compress import work
from lowrank_ops.model.batches import Batches
from lowrank_ops.model.sites import Site, find_sites


class Backwards(nn.Module):
    """Calls its layers in another order than that in which they stand, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 12)
        self.never = nn.Linear(20, 20)
        self.middle = nn.Linear(32, 24)
        self.first = nn.Linear(16, 32)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(input)))))


@pytest.fixture
def model() -> Backwards:
    torch.manual_seed(0)
    return Backwards()


def _data(count: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 16, generator=generator) * torch.logspace(0, -1, 16)


def _sites(model: nn.Module) -> list[Site]:
    return find_sites(model, lambda layer: isinstance(layer, nn.Linear))


def _names(groups: list[list[Site]]) -> list[list[str]]:
    return [[site.names[0] for site in group] for group in groups]


def test_what_fits_is_one_group_and_the_model_does_not_run(model: Backwards) -> None:
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    sites = _sites(model)
    assert moment_groups.moment_groups(model, sites, Batches(_data(), "here")) == [sites]


def test_groups_follow_the_order_of_calls_and_their_limit(model: Backwards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moment_groups, "LEAST", 0)
    sites, batches = _sites(model), Batches(_data(), "here")
    monkeypatch.setattr(moment_groups, "SHARE", 0.0)
    assert _names(moment_groups.moment_groups(model, sites, batches)) == [["first"], ["middle"], ["last", "never"]]
    # of 2,056 parameters; moments of 1,280, 1,600 and 720 entries
    monkeypatch.setattr(moment_groups, "SHARE", 1.2)
    assert _names(moment_groups.moment_groups(model, sites, batches)) == [["first"], ["middle", "last", "never"]]


def test_wide_layers_count_by_their_diagonals(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(16, 40, 3)
    assert moment_groups.moment_bytes(layer) == 4 * (16 * 16 + 40 * 40)
    monkeypatch.setattr(moment_groups, "WIDEST", 32)
    assert moment_groups.moment_bytes(layer) == 4 * (16 * 16 + 40)


@pytest.mark.parametrize("rank", [0.4, Budget(params=0.5)], ids=["rank", "budget"])
def test_groups_give_the_same_factors_bit_for_bit(
    model: Backwards, rank: float | Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    gather = calibration.gather_moments

    def spy(model: nn.Module, layers: Any, *args: Any, **kwargs: Any) -> Any:
        at_once.append(len(layers))
        return gather(model, layers, *args, **kwargs)

    monkeypatch.setattr(calibration, "gather_moments", spy)
    other = copy.deepcopy(model)
    report = factorize_(other, rank=rank, calibration=_data(), progress=False)
    assert at_once == [4]
    at_once.clear()
    monkeypatch.setattr(work, "room", lambda model: float("inf"))  # the rows of the fits stay
    monkeypatch.setattr(moment_groups, "LEAST", 0)
    monkeypatch.setattr(moment_groups, "SHARE", 0.0)
    grouped = factorize_(model, rank=rank, calibration=_data(), progress=False)
    assert set(at_once) <= {1, 2} and len(at_once) <= 3 * (2 if isinstance(rank, Budget) else 1)
    assert len(report.replaced) >= 3
    assert [layer.output_error for layer in grouped.layers] == [layer.output_error for layer in report.layers]
    assert grouped["never"].note == report["never"].note
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Experts(nn.Module):
    """Two layers of which each row takes one; a batch may leave one of them without rows, or uncalled."""

    def __init__(self, calls_empty: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 80)
        self.left = nn.Linear(80, 24)
        self.right = nn.Linear(80, 24)
        self.last = nn.Linear(24, 12)
        self.calls_empty = calls_empty

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self.first(input))
        positive = input[:, 0] > 0
        parts = hidden.new_zeros(len(hidden), 24)
        for layer, rows in ((self.left, positive), (self.right, ~positive)):
            if self.calls_empty or bool(rows.any()):
                parts[rows] = layer(hidden[rows])
        return self.last(torch.relu(parts))


@pytest.mark.parametrize("calls_empty", [True, False])
@pytest.mark.parametrize("limit", [2**28, 4 * (80**2 + 16**2 + 100), 0], ids=["one group", "two groups", "four groups"])
def test_a_layer_without_rows_in_the_first_batch_keeps_its_place(
    calls_empty: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment_groups, "LEAST", limit)
    monkeypatch.setattr(moment_groups, "SHARE", 0.0)
    monkeypatch.setattr(moment_groups, "moment_bytes", lambda layer: 4 * sum(size**2 for size in layer.weight.shape))
    fitted: list[str] = []
    fit = work.fit_in_order_

    def spy(data: Any, fits: Any, *args: Any) -> Any:
        fitted.extend(each.site.names[0] for each in fits)
        return fit(data, fits, *args)

    monkeypatch.setattr(work, "fit_in_order_", spy)
    torch.manual_seed(0)
    model = Experts(calls_empty)
    data = _data()
    batches = [data[data[:, 0] <= 0], data[data[:, 0] > 0]]  # the first one is all for the right layer
    report = factorize_(model, rank=0.25, multiple=1, calibration=batches, progress=False)
    assert [layer.reason for layer in report] == [None] * 4 and len(report.replaced) == 4
    assert fitted == ["first", "left", "right", "last"]
