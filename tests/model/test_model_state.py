"""Calibration leaves a model's state, its data and the random generators as they were, and takes models of any mode."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import Budget, factorize_
from lowrank_ops.model.state import ModelState, own_random_numbers


class Stateful(nn.Module):
    """Keeps all kinds of state between calls, on which its output depends, and draws noise of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.norm = nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 24)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(32))
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.calls = 0
        self.cache: list[Any] = [{"keys": torch.zeros(2)}]
        self.recent: deque[int] = deque([7], maxlen=3)
        self.names = {"a"}

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)  # a new tensor each time
        self.norm.running_mean.mul_(0.9)  # type: ignore[union-attr]
        self.calls += 1
        self.last_seen = hidden.detach()
        self.cache[0]["keys"].add_(1)
        self.cache.append(hidden.detach())
        self.recent.append(self.calls)
        self.names.add("b")
        hidden = F.dropout(self.norm(hidden) + 0.01 * self.calls + self.mean, 0.2, training=True)
        return self.last(hidden)


def _snapshot(model: Stateful) -> dict[str, Any]:
    plain = {name: value for name, value in model.__dict__.items() if not name.startswith("_") and name != "training"}
    return copy.deepcopy({**plain, "buffers": dict(model.named_buffers())})


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)
    if isinstance(left, (list, deque)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


@pytest.mark.parametrize("rank", [8, Budget(params=0.6), Budget(macs=0.6)], ids=["rank", "params", "macs"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_state_and_random_generators_are_as_before(rank: int | Budget, calibrated: bool) -> None:
    torch.manual_seed(0)
    model = Stateful()
    model(torch.randn(8, 24))  # it has state already
    data = torch.randn(256, 24)
    seen, before, buffers = data.clone(), _snapshot(model), list(map(id, model.buffers()))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    options = {"calibration": data} if calibrated else {"example_input": data}
    report = factorize_(model, rank=rank, progress=False, **options)  # type: ignore[arg-type]
    assert report.replaced
    assert _equal(_snapshot(model), before)
    assert list(map(id, model.buffers())) == buffers
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[union-attr]
    assert torch.equal(data, seen)
    model(data)
    assert model.calls == before["calls"] + 1


def test_state_is_as_before_after_an_error() -> None:
    model = Stateful()
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match=r"the model fails in first \(Linear\), run on the calibration data"):
        factorize_(model, rank=8, calibration=[torch.randn(4, 24), torch.randn(4, 23)], progress=False)
    assert _equal(_snapshot(model), before)


def test_both_runs_of_a_model_see_the_same_noise_and_the_same_state() -> None:
    """A map of a rank that loses nothing is found again only where the rows of both runs belong together."""
    torch.manual_seed(0)
    model = Stateful()
    with torch.no_grad():
        for layer in (model.first, model.last):
            layer.weight.copy_(torch.randn(layer.out_features, 4) @ torch.randn(4, layer.in_features) / 4)
    report = factorize_(model, rank=4, calibration=torch.randn(512, 24), progress=False)
    for layer in report:
        assert layer.output_error is not None and layer.output_error < 1e-4


def test_values_in_containers_come_back_in_the_same_objects() -> None:
    model = nn.Module()
    model.loop = [1, {"a": torch.ones(2)}]  # type: ignore[assignment]
    model.loop.append(model.loop)  # type: ignore[operator, union-attr]
    model.table = OrderedDict(x=(torch.zeros(3), 5))  # type: ignore[assignment]
    loop, table, tensor = model.loop, model.table, model.table["x"][0]  # type: ignore[index, union-attr]
    state = ModelState(model)
    tensor.add_(1)  # type: ignore[union-attr, operator]
    table["y"] = 3  # type: ignore[index, operator]
    loop[1]["a"] = None  # type: ignore[index]
    loop.pop(0)  # type: ignore[operator, union-attr]
    model.loop, model.extra = [], 3  # type: ignore[assignment]
    state.restore()
    assert model.loop is loop and loop[0] == 1 and loop[2] is loop  # type: ignore[index]
    assert torch.equal(loop[1]["a"], torch.ones(2))  # type: ignore[index]
    assert model.table is table and list(table) == ["x"] and table["x"][0] is tensor  # type: ignore[call-overload, index]
    assert torch.equal(tensor, torch.zeros(3)) and not hasattr(model, "extra")  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    found = []
    for seed in (1, 1, 2):
        with own_random_numbers(seed):
            found.append(draw())
    assert found[0] == found[1] and all(a != b for a, b in zip(found[0], found[2], strict=True))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.shared = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12)

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1  # outside of inference_mode an error for a model that was built in it
        hidden = F.relu_(self.norm(self.conv(input))).mean((2, 3))
        return self.head(F.relu(self.shared(hidden)))


@pytest.mark.parametrize("called", [False, True], ids=["called outside", "called inside"])
@pytest.mark.parametrize("built", [False, True], ids=["built outside", "built inside"])
def test_inference_mode(built: bool, called: bool) -> None:
    """The same factors as without it; they are ordinary parameters, which can be trained."""

    def result(built: bool, called: bool) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        with torch.inference_mode(built):
            model = Network().eval()
        with torch.inference_mode(called):
            images = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            rank = Budget(macs=0.6, example_input=images[:2])
            report = factorize_(model, rank=rank, calibration=list(images.split(32)), progress=False)
        with torch.inference_mode(built):
            assert int(model.calls) == 0  # type: ignore[arg-type]
            model(images[:2].clone())
        return model, report

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, told = result(False, False)
        found, report = result(built, called)
    assert len(report.replaced) == len(told.replaced) > 0
    assert [layer.output_error for layer in report] == [layer.output_error for layer in told]
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    for layer in report.replaced:
        module = found.get_submodule(layer.name)
        for name in ("in_factor", "out_factor"):
            factor = getattr(module, name)
            assert not factor.is_inference() and factor.requires_grad
    kept = [value.is_inference() for name, value in found.named_parameters() if name.startswith("norm")]
    assert kept == [built, built]


def test_a_model_on_the_meta_device() -> None:
    model = Network().to("meta")
    images = torch.randn(4, 3, 8, 8)
    for options in ({"calibration": images}, {"example_input": images}, {"rank": Budget(params=0.5)}):
        with pytest.raises(
            ValueError,
            match=r"^factorize_: the model cannot run, conv\.weight is on the meta device, .* load the weights first$",
        ):
            factorize_(model, **{"rank": 4, "progress": False, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration: batch 0 is on the meta device"):
        factorize_(Network(), rank=4, calibration=[(torch.empty(1, 3, 8, 8, device="meta"),)], progress=False)


def test_lazy_modules() -> None:
    """They are left alone without calibration, which needs them to have run."""

    def lazy() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.LazyBatchNorm1d(), nn.LazyLinear(64)).eval()

    assert len(factorize_(lazy(), rank=8, progress=False).replaced) == 1
    rows = torch.randn(300, 64)
    with pytest.raises(ValueError, match=r"1\.weight is not initialized yet; run the model once, then calibrate it"):
        factorize_(lazy(), rank=8, calibration=rows, progress=False)
    model = lazy()
    model(rows)
    assert len(factorize_(model, rank=8, calibration=rows, progress=False).replaced) == 2


def test_scripted_modules_inside() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(64), nn.ReLU()).eval())
    model = nn.Sequential(nn.Linear(64, 64), scripted, nn.Linear(64, 64))
    assert len(factorize_(model, rank=8, calibration=torch.randn(300, 64), progress=False).replaced) == 2
