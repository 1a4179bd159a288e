"""Shrunk second moments against their definition, and what they are for: rows that were not seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_ops.calibrate.shrinkage import SecondMoment
from tests.support.triangles import symmetric


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moment(rows: Tensor, groups: int = 1) -> SecondMoment:
    moment = SecondMoment(rows.shape[1])
    for group in rows.chunk(groups):
        moment.add(group)
    return moment


def _oas(rows: Tensor) -> Tensor:
    """Chen et al., eq. 23, around the mean, for independent rows; the mean's part as it is."""
    count, width = len(rows) - 1, rows.shape[1]
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    square, trace = torch.trace(covariance @ covariance), torch.trace(covariance)
    part = ((1 - 2 / width) * square + trace**2) / ((count + 1 - 2 / width) * (square - trace**2 / width))
    part = part.clamp(max=1)
    identity = torch.eye(width, dtype=torch.float64)
    return (1 - part) * covariance + part * trace / width * identity + torch.outer(mean, mean)


@pytest.mark.parametrize("count", [3, 10, 200])
def test_the_shrinkage_is_that_of_the_paper(count: int) -> None:
    rows = _normal(count, 7) * torch.logspace(0, -1, 7, dtype=torch.float64) + 0.5
    # fp64; the covariance is a difference of moments of order 1
    torch.testing.assert_close(symmetric(_moment(rows).shrunk_()), _oas(rows), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_the_trace_stays_and_few_rows_are_never_singular(count: int) -> None:
    rows = _normal(count, 20)
    shrunk = symmetric(_moment(rows, 3).shrunk_())
    assert float(torch.trace(shrunk)) == pytest.approx(float(rows.square().sum()) / count, rel=1e-12)
    assert float(torch.linalg.eigvalsh(shrunk)[0]) > 0.1  # the rows' variance is 1
    if count == 1:
        assert torch.equal(shrunk, torch.eye(20, dtype=torch.float64) * shrunk[0, 0])


def test_many_rows_are_not_shrunk() -> None:
    rows = _normal(20000, 8) * torch.logspace(0, -1, 8, dtype=torch.float64)
    raw = rows.T @ rows / len(rows)
    # about 1 / n of the covariance: 5e-5 of its largest value, 1
    torch.testing.assert_close(symmetric(_moment(rows, 10).shrunk_()), raw, rtol=0, atol=5e-4)


def test_rows_that_repeat_each_other_count_once() -> None:
    rows = _normal(400, 6)
    alone = _moment(rows, 40).independent_rows()
    repeated = _moment(rows[:40].repeat_interleave(10, 0), 40).independent_rows()
    # 40 groups tell their own variance to about a quarter
    assert alone == pytest.approx(400, rel=0.3)
    assert repeated == pytest.approx(40, rel=0.3)
    assert _moment(rows[:1].expand(50, 6), 5).independent_rows() == 50  # no difference: nothing to divide by


def test_groups_of_any_dtype_sum_up() -> None:
    rows = _normal(100, 5)
    moment = SecondMoment(5)
    for part in (rows[:33], rows[33:33], rows[33:]):
        moment.add(part.float())
    assert moment.rows == 100
    torch.testing.assert_close(
        symmetric(moment.total).double(), rows.T @ rows, rtol=1e-5, atol=1e-4
    )  # fp32 sums of 100 products
    with torch.inference_mode():
        moment.add(rows)
    moment.add(rows)
    assert not symmetric(moment.shrunk_()).is_inference()
