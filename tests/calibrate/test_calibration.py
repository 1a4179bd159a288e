"""`factorize_(calibration=...)`: what it keeps of a network's outputs, and that errors leave the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import Budget, Energy, LowRankLinear, factorize_
from lowrank_ops.calibrate import fit_in_order as calibration
from lowrank_ops.compress.report import Report
from lowrank_ops.nn.base import FactorizedModule


class Network(nn.Module):
    """Convolutions of all kinds, an in-place ReLU, a layer that is called twice, a recurrent and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.mix = nn.Conv2d(32, 48, 1)
        self.line = nn.Conv1d(48, 40, 3, padding=1)
        self.recurrent = nn.LSTM(40, 16, batch_first=True)
        self.head = nn.Linear(16, 24)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu_(self.down(F.relu(self.stem(input))))
        for _ in range(2):
            hidden = F.relu(self.twice(hidden))
        rows = F.relu(self.line(self.mix(hidden).mean(2)))
        return self.head(self.recurrent(rows.transpose(1, 2))[0])


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


def _images(count: int, seed: int) -> Tensor:
    """Smooth images of few degrees of freedom, so that calibration has something to find."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    return F.interpolate(coarse, size=(12, 12), mode="bilinear")


def _error(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        expected = dense.eval()(images)
        return float((model.eval()(images) - expected).norm() / expected.norm())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _unchanged(model: nn.Module, state: dict[str, Tensor]) -> bool:
    same = model.state_dict().keys() == state.keys() and all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items()
    )
    return same and not any(isinstance(layer, FactorizedModule) for layer in model.modules()) and model.training


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_outputs_on_new_inputs_are_kept_far_better(model: Network, method: str) -> None:
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    factorize_(plain, method, 0.4, progress=False)  # type: ignore[arg-type]
    report = factorize_(model, method, 0.4, calibration=list(_images(96, 1).split(16)), progress=False)  # type: ignore[arg-type]
    assert len(report.replaced) >= 5
    for layer in report.replaced:
        assert layer.output_error is not None and 0 < layer.output_error < 1
        assert layer.weight_error is not None and layer.weight_error > 0
    images = _images(32, 2)
    assert _error(model, dense, images) < 0.5 * _error(plain, dense, images)
    assert "output error" in str(report)


@pytest.mark.parametrize("rank", [0.4, Budget(params=0.6)], ids=["rank", "budget"])
def test_inside_autocast_only_the_model_computes_in_low_precision(model: Network, rank: float | Budget) -> None:
    images = _images(64, 1)
    other = copy.deepcopy(model)
    outside = factorize_(other, rank=rank, calibration=images, progress=False)
    dtypes: set[torch.dtype] = set()
    model.mix.register_forward_hook(lambda layer, args, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        inside = factorize_(model, rank=rank, calibration=images, progress=False)
    assert dtypes == {torch.bfloat16}
    assert [layer.ranks for layer in inside.layers] == [layer.ranks for layer in outside.layers]
    for ours, theirs in zip(inside.replaced, outside.replaced, strict=True):
        # inputs and outputs in bfloat16 (2^-8) may add about a hundredth
        assert ours.output_error == pytest.approx(theirs.output_error, rel=0.05, abs=0.01)


def test_a_layer_without_bias_gets_one_and_dtypes_stay(model: Network) -> None:
    model = model.to(torch.bfloat16)
    factorize_(model, rank=0.4, calibration=_images(64, 1).to(torch.bfloat16), progress=False)
    assert model.down.bias is not None and model.down.bias.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_layers_are_fitted_to_the_inputs_that_the_factorized_layers_give(
    model: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of the second layer are what the first module makes of the images, those of the first the images."""
    seen: list[tuple[str, Tensor]] = []
    original = calibration.input_rows

    def spy(layer: nn.Module, input: Tensor, positions: Tensor) -> Tensor:
        seen.append((str(layer), input.clone()))
        return original(layer, input, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "input_rows", spy)
    images = _images(4, 1)  # 576 positions: looked at in one part
    stem, down = str(model.stem), str(model.down)
    factorize_(model, rank=0.4, include=["stem", "down"], calibration=images, progress=False)
    assert [name for name, _ in seen] == [stem, down]
    assert torch.equal(seen[0][1], images)
    with torch.no_grad():
        assert torch.equal(seen[1][1], F.relu(model.stem(images)))


def test_a_rank_that_loses_nothing_gives_the_dense_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 40, 3), nn.ReLU(), nn.Conv2d(40, 6, 3)).double()
    with torch.no_grad():  # of exact rank
        for layer in (model[0], model[2]):
            layer.weight.copy_(
                torch.einsum(
                    "tb,baij,as->tsij",
                    torch.randn(len(layer.weight), 3, dtype=torch.float64),
                    torch.randn(3, 3, 3, 3, dtype=torch.float64),
                    torch.randn(3, layer.weight.shape[1], dtype=torch.float64),
                )
            )
    dense = copy.deepcopy(model)
    images = torch.randn(40, 6, 10, 10, dtype=torch.float64)
    factorize_(model, rank=3, include=["0", "2"], calibration=images, progress=False)
    # exact but for the damping, which keeps exact solutions exact, and the ridge, whose prior they are
    assert _error(model, dense, torch.randn(4, 6, 10, 10, dtype=torch.float64)) < 1e-10


def test_the_same_data_give_the_same_factors(model: Network) -> None:
    other = copy.deepcopy(model)
    for which in (model, other):
        torch.manual_seed(torch.seed() % 1000)
        factorize_(which, "cp", 0.3, calibration=_images(16, 1), progress=False)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_too_wide_features_fit_the_last_factor_only(model: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WIDEST", 8)
    dense = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    factorize_(plain, rank=0.4, progress=False)
    factorize_(model, rank=0.4, calibration=_images(64, 1), progress=False)
    images = _images(16, 2)
    assert _error(model, dense, images) < _error(plain, dense, images)


def test_a_layer_that_the_data_never_reach(model: Network) -> None:
    """It keeps its weight as it would without calibration, and the report says so."""
    model.spare = nn.Linear(40, 40)
    alone = LowRankLinear.from_linear(model.spare, 16)  # 0.4 of 40, rounded up to a multiple of 8
    report = factorize_(model, rank=0.4, calibration=_images(96, 1), progress=False)
    assert report["spare"].note == "the calibration data do not reach it: its factors keep its weight alone"
    assert report["spare"].calibration_rows == 0 and report["spare"].output_error is None
    assert torch.equal(model.spare.to_dense().weight, alone.to_dense().weight)  # type: ignore[operator]
    assert report["head"].calibration_rows == 96 * 6 and report["head"].note is None
    assert "do not reach it" in " ".join(str(report).split())


def test_a_budget_weighs_a_layer_that_the_data_never_reach_like_the_others(model: Network) -> None:
    model.spare = nn.Linear(40, 40)
    report = factorize_(model, rank=Budget(params=0.5), calibration=_images(96, 1), progress=False)
    error = report["spare"].weight_error
    assert error is None or error < 0.9  # neither cut to nothing
    assert report.model_parameters_after <= 0.5 * report.model_parameters_before


def test_data_that_reach_no_layer_are_an_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(30, 30)

        def forward(self, input: Tensor) -> Tensor:
            return input * 2

    model = Idle()
    state = _state(model)
    with pytest.raises(ValueError, match="reach none of the 1 layers to replace"):
        factorize_(model, rank=0.4, calibration=torch.randn(8, 3), progress=False)
    assert _unchanged(model, state)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (_images(4, 1).masked_fill(_images(4, 1) > 1, float("nan")), ValueError, "calibration: batch 0 holds .* NaN"),
        ([], ValueError, "calibration has no batch"),
        ([_images(2, 1), 3], TypeError, "^factorize_: calibration: batch 1 must be a tensor"),
        (iter([_images(2, 1)]), TypeError, "read only once"),
        (torch.randn(4, 5, 12, 12), RuntimeError, r"the model fails in stem \(Conv2d\), .*: .*5 channels"),
        ((_images(2, 1), _images(2, 1)), RuntimeError, "the model fails on the calibration data: .*positional arg"),
        (_images(4, 1) * 1e38, ValueError, "not finite on the calibration data"),
    ],
    ids=["nan", "empty", "kind", "iterator", "shape", "arguments", "overflow"],
)
def test_bad_calibration_data(model: Network, data: object, kind: type[Exception], message: str) -> None:
    state = _state(model)
    with pytest.raises(kind, match=message):
        factorize_(model, rank=Energy(0.7), calibration=data, progress=False)
    assert _unchanged(model, state)


def test_hooks_do_not_see_the_calibration_twice_and_handles_work(model: Network) -> None:
    calls: list[int] = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    report = factorize_(model, rank=0.4, calibration=_images(8, 1), progress=False)
    assert isinstance(report, Report)
    calls.clear()
    model(_images(2, 2))
    handle.remove()
    model(_images(2, 2))
    assert calls == [1]


def test_other_processes_give_the_same_modules(model: Network) -> None:
    """Bit for bit, with hooks that could not be sent to them; and those of this process up to rounding."""
    torch.manual_seed(0)
    handle = model.stem.register_forward_hook(lambda *_: None)
    models = {}
    for n_jobs in (None, 1, 2):
        models[n_jobs] = copy.deepcopy(model)
        factorize_(models[n_jobs], "cp", 0.4, calibration=_images(8, 1), n_jobs=n_jobs, progress=False)
    handle.remove()
    serial, spread = models[1].state_dict(), models[2].state_dict()
    assert all(torch.equal(value, spread[name]) for name, value in serial.items())
    images = _images(4, 2)
    # fp64 decompositions and fits of fp32 layers, in another order of summation at most
    assert _error(models[None], models[1], images) < 1e-3
