"""Deep models are fitted in stages: the runs of the model do not grow with the square of the depth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import LowRankLinear, factorize_
from lowrank_ops.calibrate import fit_in_order as calibration
from lowrank_ops.compress import work
from lowrank_ops.model.sites import Site
from lowrank_ops.nn.base import FactorizedModule

DEPTH, BATCHES = 12, 2


class Deep(nn.Module):
    """Counts the calls of all its layers, dense or factorized."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(DEPTH))

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            type(self).called_in_all += 1
            input = input + torch.tanh(layer(input))
        return input

    called_in_all = 0


def _calls_of(model: Deep, stages: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(work, "STAGES", stages)
    Deep.called_in_all = 0
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(BATCHES * 32, 24, generator=generator)
    report = factorize_(model, rank=8, calibration=rows, progress=False)
    assert len(report.replaced) == DEPTH
    assert all(layer.output_error is not None and layer.output_error < 1 for layer in report.replaced)
    assert all(isinstance(layer, FactorizedModule) for layer in model.layers)
    return Deep.called_in_all


def test_runs_of_the_model_by_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    other = DEPTH * (BATCHES + 2)  # for the moments, and torch.fx in train and in eval mode
    # every layer from the model's start, twice but for the first
    alone = BATCHES * (2 * sum(range(1, DEPTH + 1)) - 1)
    assert _calls_of(Deep(), DEPTH, monkeypatch) == other + alone
    # three stages of four layers, each twice up to its last layer
    assert _calls_of(Deep(), 3, monkeypatch) == other + BATCHES * 2 * (4 + 8 + 12)


def test_in_a_stage_the_layers_before_are_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's features come from the decomposed modules before it, so its fit makes up for their errors."""
    torch.manual_seed(0)
    model = Deep()
    seen: list[bool] = []
    record = calibration.watch

    def spy(model: Deep, watched: list, batch: object, seed: int = 0) -> None:
        seen.append(isinstance(model.layers[0], FactorizedModule))
        record(model, watched, batch, seed)

    monkeypatch.setattr(calibration, "watch", spy)
    _calls_of(model, 1, monkeypatch)
    assert seen == [False, True] * BATCHES


def test_the_rows_of_a_stage_fit_into_their_room() -> None:
    """Layers that take their rows from the same runs hold no more than the room; one alone, its moments at least."""
    fits = [
        calibration.Fit(Site(layer), LowRankLinear.from_linear(layer, 8), None, 1, 10_000)
        for layer in (nn.Linear(24, 24) for _ in range(6))
    ]
    alone = next(calibration._stages(fits, 1, 1, float("inf")))[0].bytes
    assert alone == (8 * 24 + 2048) * 4 // 3 * 48 * 4
    stages = list(calibration._stages(fits, 1, 6, 2.5 * alone))
    assert [len(rows) for rows in stages] == [2, 2, 2]
    least = list(calibration._stages(fits, 1, 6, 0.0))
    assert [len(rows) for rows in least] == [1] * 6
    assert all(rows[0].bytes <= 4 * 2 * 24**2 for rows in least)
