"""Calibration with few rows: never worse than the weights alone on new rows, and an error in the report that holds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lowrank_ops import factorize_

# What counts as noise: the estimate of the best factors from rows of which nothing is to be learned (independent,
# of one variance) costs up to 1 %; errors on 4096 new rows of 512 outputs are exact to 0.1 %.
NOISE = 1.02


def _error(model: nn.Module, dense: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        expected = dense(rows)
        return float((model(rows) - expected).norm() / expected.norm())


def _independent(count: int, seed: int) -> Tensor:
    return torch.randn(count, 512, generator=torch.Generator().manual_seed(seed))


def _correlated(count: int, seed: int) -> Tensor:
    """Rectified, with a mean and variances that fall by 1 / index^1.5, as features of networks do."""
    mix = torch.randn(512, 512, generator=torch.Generator().manual_seed(99)) / 512**0.5
    scales = torch.arange(1, 513).float() ** -0.75
    return F.relu(20 * (_independent(count, seed) * scales) @ mix + 0.3)


@pytest.mark.parametrize("count", [1, 4, 64, 128, 1024])
@pytest.mark.parametrize("draw", [_independent, _correlated])
@pytest.mark.filterwarnings("ignore:factorize_. few calibration data")
def test_few_rows_are_no_worse_than_the_weights_alone(draw: Callable[[int, int], Tensor], count: int) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(512, 512))
    weights_only, model = copy.deepcopy(dense), copy.deepcopy(dense)
    factorize_(weights_only, rank=64, progress=False)
    report = factorize_(model, rank=64, calibration=draw(count, 1), progress=False)
    new = draw(4096, 2)
    found, alone = _error(model, dense, new), _error(weights_only, dense, new)
    assert found < NOISE * alone
    if draw is _correlated and count >= 64:
        assert found < 0.6 * alone  # there is much to gain, and it is gained
    told = report["0"].output_error
    if count == 1:
        assert told is None  # no row to hold out
    else:
        # a quarter of the rows: of four it is one, of 64 sixteen
        assert told == pytest.approx(found, rel={4: 0.5, 64: 0.25, 128: 0.15, 1024: 0.05}[count])


@pytest.mark.parametrize("count", [4, 32, 64, 256])
@pytest.mark.filterwarnings("ignore:factorize_. few calibration data")
def test_fits_to_the_outputs_of_factorized_layers_are_no_worse_either(count: int) -> None:
    """The second layer sees inputs that differ from the dense ones: a fit of few rows would follow their noise."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512))
    weights_only, model = copy.deepcopy(dense), copy.deepcopy(dense)
    factorize_(weights_only, rank=48, progress=False)
    report = factorize_(model, rank=48, calibration=_independent(count, 1), progress=False)
    new = _independent(4096, 2)
    found = _error(model, dense, new)
    assert found < NOISE * _error(weights_only, dense, new)
    assert report["2"].output_error == pytest.approx(found, rel=0.5 if count == 4 else 0.25)


class Experts(nn.Module):
    """Each row goes to the expert of its largest score, which factorized layers before may change."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.before = nn.Linear(96, 96)
        self.experts = nn.ModuleList(nn.Linear(96, 96) for _ in range(count))

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.before(rows)
        output = torch.zeros_like(rows)
        chosen = rows[:, : len(self.experts)].argmax(1)
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).nonzero().flatten()
            if len(mine):
                output[mine] = expert(rows[mine])
        return output


def test_experts_that_saw_few_rows_or_none() -> None:
    """The reported errors were 0.00, the true ones far above those of the weights alone."""
    torch.manual_seed(0)
    dense = Experts(16)
    weights_only, model = copy.deepcopy(dense), copy.deepcopy(dense)
    factorize_(weights_only, rank=24, progress=False)
    with pytest.warns(
        UserWarning, match=r"few calibration data for \d+ of 17 layers: before \(36 calibration rows for 96"
    ):
        report = factorize_(model, rank=24, calibration=list(torch.randn(36, 96).split(12)), progress=False)
    new = torch.randn(2000, 96)
    few = 0
    for name, expert in dense.named_modules():
        if not isinstance(expert, nn.Linear):
            continue
        rows = report[name].calibration_rows
        assert rows is not None
        few += rows <= 4
        found = _error(model.get_submodule(name), expert, new)
        assert found < NOISE * _error(weights_only.get_submodule(name), expert, new)
        told = report[name].output_error
        assert told is None or told > 0.5 * found
        note = report[name].note
        assert (
            note is not None and ("do not reach it" if rows == 0 else f"{rows} calibration rows for 96 inputs") in note
        )
    assert few >= 12 and report["before"].calibration_rows == 36


def test_enough_rows_warn_of_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = factorize_(model, rank=8, calibration=torch.randn(400, 40), progress=False)
    assert [layer.note for layer in report] == [None, None]
    assert [layer.calibration_rows for layer in report] == [400, 400]


def test_held_out_rows_are_seen_by_nothing() -> None:
    """Other values in the held-out rows change the reported error and not a bit of a layer that is not fitted to them;
    other values in the rest change the layer."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 32))
    rows = torch.randn(4, 32)  # one batch, whose last row is held out: too few to be fitted to
    factors, errors = [], []
    for changed in (None, 3, 0):
        data = rows.clone()
        if changed is not None:
            data[changed] = torch.randn(32) * torch.linspace(3, 0, 32)
        model = copy.deepcopy(dense)
        with pytest.warns(UserWarning, match="few calibration data"):
            report = factorize_(model, rank=8, calibration=data, progress=False)
        factors.append(model[0].in_factor.detach().clone())
        errors.append(report["0"].output_error)
    assert errors[1] != errors[0]
    # the metric of the outputs comes from random projections, of which the held-out rows' values are no part
    torch.testing.assert_close(factors[1], factors[0], rtol=0, atol=0)
    assert not torch.equal(factors[2], factors[0])


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffled_loader_gives_the_same_rows_in_every_pass(own: bool) -> None:
    """Otherwise a row that one pass holds out is fitted to in the next."""
    seen: list[int] = []

    class Rows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> Tensor:
            seen.append(index)
            return torch.randn(48, generator=torch.Generator().manual_seed(index))

    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(Rows(), batch_size=16, shuffle=True, generator=generator)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
    factorize_(model, rank=8, calibration=loader, progress=False)
    passes = [seen[start : start + 96] for start in range(0, len(seen), 96)]
    assert len(passes) == 4  # counting, moments, and two layers
    assert all(each == passes[0] for each in passes) and passes[0] != sorted(passes[0])


def test_the_report_shows_what_few_rows_mean() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="few calibration data for 2 of 2 layers") as caught:
        report = factorize_(model, rank=8, calibration=torch.randn(20, 64), progress=False)
    assert caught[0].filename == __file__
    assert "20 calibration rows for 64 inputs" in " ".join(str(report).split())
    table = report.to_pandas()
    assert list(table["calibration_rows"]) == [20, 20] and all("lean on its weight" in note for note in table["note"])
    plain = factorize_(nn.Sequential(nn.Linear(64, 64)), rank=8, progress=False)
    assert plain["0"].calibration_rows is None and plain["0"].note is None and "notes" not in str(plain)


def test_layers_that_stay_dense_are_not_warned_of() -> None:
    """A head that sees one row for each sequence, and whose rank is above its limit: no factors lean on anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 96)), nn.Flatten(), nn.Linear(96, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = factorize_(model, rank=40, calibration=torch.randn(20, 50, 96), progress=False)
    assert report["0"].replaced_by == "LowRankLinear" and report["4"].replaced_by is None
