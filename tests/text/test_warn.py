"""Warnings point at the user's line, whatever packages lie between it and this one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lowrank_ops import CPConv2d, factorize_
from lowrank_ops.decompose import cp


def _given_a_mask(model: nn.Module) -> None:
    rows = torch.randn(300, 64)
    factorize_(model, include="0", rank=8, calibration=[[rows, torch.ones_like(rows)]], progress=False)


def _of_cancelling_terms(model: nn.Module) -> None:
    CPConv2d.from_conv2d(model[1], 12, progress=False)


@pytest.mark.parametrize(
    ("call", "words"),
    [(_given_a_mask, "only its first entry is given"), (_of_cancelling_terms, "terms still cancel")],
)
def test_a_warning_names_the_line_that_called_us(
    call: Callable[[nn.Module], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "MAX_TERM_RATIO", 0.1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(16, 16, 3))
    model.forward = lambda rows: model[0](rows)  # type: ignore[method-assign]
    with pytest.warns(Warning, match=words) as caught:
        call(model)
    assert {warning.filename for warning in caught} == {__file__}
