"""CP without cancelling terms: sensitivity, the error-preserving correction, the effect of rounding, progress bars."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensorly.cp_tensor import CPTensor
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_ops import CPConv2d, factorize_, reference
from lowrank_ops.decompose import cp
from lowrank_ops.decompose import cp_correction as correction
from lowrank_ops.decompose.cp import cp_decompose, sensitivity
from lowrank_ops.decompose.cp_correction import (
    MARGIN,
    approximation_error,
    balanced,
    correct,
    expected_change,
    strengths,
)

SHAPE = (12, 10, 3, 4)  # T, S, KH, KW


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_factors(rank: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [randn(length, rank, seed=mode) for mode, length in enumerate(shape)]


def tensor_of(factors: list[Tensor]) -> Tensor:
    return torch.einsum("tr,sr,ir,jr->tsij", *factors)


def unit(*shape: int, seed: int = 0) -> Tensor:
    tensor = randn(*shape, seed=seed)
    return tensor / tensor.norm()


def directions() -> list[tuple[Tensor, Tensor]]:
    """Orthonormal vectors a and b for each of three axes."""
    bases = [torch.linalg.qr(randn(16, 2, seed=mode)).Q for mode in range(3)]
    return [(basis[:, 0], basis[:, 1]) for basis in bases]


def border_rank_tensor() -> Tensor:
    """(b o a o a + a o b o a + a o a o b) / sqrt(3): rank 3, but approximated as closely as wanted by two terms that
    grow and cancel."""
    terms = [[pair[mode == other] for other, pair in enumerate(directions())] for mode in range(3)]
    return sum(torch.einsum("t,s,i->tsi", *term) for term in terms)[..., None] / 3**0.5


def two_terms(length: float, offset: float) -> list[Tensor]:
    """length ((a + (offset + 1) / length b)^3 - (a + offset / length b)^3) / sqrt(3), close to that tensor."""
    steps = [(offset + 1) / length, offset / length]
    factors = [torch.stack([a + step * b for step in steps], dim=1) for a, b in directions()]
    signs = torch.tensor([length, -length], dtype=torch.float64) / 3**0.5
    return [factors[0] * signs, *factors[1:], torch.ones(1, 2, dtype=torch.float64)]


def gradients(tensor: Tensor, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of the sensitivity and of the squared error with respect to all factors."""
    leaves = [factor.clone().requires_grad_() for factor in factors]
    change = sum(
        len(leaf) * math.prod((other.square().sum(0) for other in leaves if other is not leaf), start=1.0).sum()
        for leaf in leaves
    )
    error = (tensor - tensor_of(leaves)).square().sum()
    found = [torch.autograd.grad(value, leaves) for value in (change, error)]
    first, second = (torch.cat([part.flatten() for part in parts]) for parts in found)
    return first, second


CASES = {
    "random": (unit(*SHAPE), 12),
    "overcomplete": (unit(*SHAPE), 30),
    "border rank": (border_rank_tensor() + 0.01 * unit(16, 16, 16, 1), 2),  # without noise the HOSVD is a saddle
    "one spatial axis": (unit(12, 10, 1, 5), 8),
}
each_case = pytest.mark.parametrize(("tensor", "rank"), CASES.values(), ids=CASES)


# Sensitivity ------------------------------------------------------------------------------------------------


def test_the_sensitivity_is_that_of_the_weight_to_its_factors() -> None:
    """The sensitivity is |J|^2 = E |J noise|^2, with J the derivative of the weight with respect to the factors."""
    factors = (randn(3, 10, seed=1), randn(3, 2, seed=2), randn(3, 4, seed=3), randn(12, 3, seed=4))
    derivatives = torch.autograd.functional.jacobian(reference.cp_weight, factors)
    assert sensitivity(factors) == pytest.approx(sum(float(part.square().sum()) for part in derivatives), rel=1e-12)


def test_the_sensitivity_in_one_dimension() -> None:
    inner, width, out = randn(3, 10, seed=1), randn(3, 4, seed=3), randn(12, 3, seed=4)
    derivatives = torch.autograd.functional.jacobian(
        lambda *factors: torch.einsum("rs,rj,tr->tsj", *factors), (inner, width, out)
    )
    assert sensitivity((inner, width, out)) == pytest.approx(
        sum(float(part.square().sum()) for part in derivatives), rel=1e-12
    )


def test_balanced_factors_are_the_same_terms_at_the_least_sensitivity() -> None:
    factors = random_factors(5)
    factors[1][:, 2] = 0  # a term of norm 0 keeps it
    found = balanced(factors)
    torch.testing.assert_close(tensor_of(found), tensor_of(factors))
    assert all((factor[:, 2] == 0).all() for factor in found)
    least = expected_change(found)
    assert least < expected_change(factors)
    for seed in range(5):  # any other scaling of the terms' columns
        scales = torch.exp(0.1 * randn(4, 5, seed=seed))
        scales[0] = 1 / scales[1:].prod(0)
        moved = [factor * scale for factor, scale in zip(found, scales, strict=True)]
        torch.testing.assert_close(tensor_of(moved), tensor_of(factors))
        assert expected_change(moved) > least


def test_the_factors_report_it() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = cp_decompose(randn(*SHAPE).to(dtype), 12, iterations=5, corrections=2)
        factors = (found.in_factor, found.height_factor, found.width_factor, found.out_factor)
        assert found.sensitivity == sensitivity(factors) > 0
    assert cp_decompose(torch.zeros(SHAPE), 4).sensitivity == 0


def test_reports_have_it_of_cp_layers() -> None:
    model = nn.Sequential(nn.Conv2d(10, 12, 3), nn.Conv2d(12, 12, 1), nn.Linear(12, 10))
    report = factorize_(model, "cp", 4, progress=False)
    for layer, module in zip(report, model, strict=True):
        expected = None if layer.type == "Linear" else sensitivity(list(module.factors().values()))
        assert layer.sensitivity == expected
    assert report["0"].sensitivity > 0
    assert "sensitivity" in report.to_pandas().columns


# The correction ---------------------------------------------------------------------------------------------


@each_case
def test_no_larger_error_and_less_sensitivity(tensor: Tensor, rank: int) -> None:
    plain, found = (cp_decompose(tensor, rank, iterations=50, corrections=sweeps) for sweeps in (0, 20))
    assert plain.restarts == found.restarts == 0
    # The correction keeps the error, by its definition, up to MARGIN. Storing the factors multiplies them by |W|^(1/4):
    # 4 roundings of each element of terms that may be MAX_TERM_RATIO times as long as the weight.
    rounding = 8 * cp.MAX_TERM_RATIO * rank * torch.finfo(torch.float64).eps
    assert found.relative_error <= plain.relative_error * (1 + MARGIN) + rounding
    assert found.sensitivity < plain.sensitivity


@each_case
def test_every_sweep_lowers_the_sensitivity(tensor: Tensor, rank: int) -> None:
    factors = balanced([factor / 3 for factor in random_factors(rank, tuple(tensor.shape))])
    for _ in range(30):  # some sweeps of least squares
        for mode in range(4):
            unfolded = tensor.movedim(mode, 0).flatten(1)
            others = [factor for other, factor in enumerate(factors) if other != mode]
            product = torch.einsum("ar,br,cr->abcr", *others).flatten(0, 2)
            factors[mode] = torch.linalg.lstsq(product, unfolded.T).solution.T
    bound = approximation_error(tensor, factors)
    assert 0 < bound < 1
    seen = [expected_change(balanced(factors))]
    for sweeps in (1, 2, 4, 8):
        moved = correct(tensor, factors, sweeps)
        assert approximation_error(tensor, moved) <= bound * (1 + MARGIN)
        seen.append(expected_change(moved))
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0]


def test_where_it_ends_no_direction_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of sensitivity and error cancel for one multiplier: the point is stationary for all factors
    together."""
    monkeypatch.setattr(correction, "TOLERANCE", 0.0)
    tensor, rank = unit(6, 5, 3, 3), 4
    plain = cp_decompose(tensor, rank, corrections=0)
    start = [plain.out_factor, plain.in_factor.T, plain.height_factor.T, plain.width_factor.T]
    angles = []
    for sweeps in (1, 500):
        change, error = gradients(tensor, correct(tensor, start, sweeps))
        angles.append(float(change @ error / (change.norm() * error.norm())))
    assert angles[1] == pytest.approx(-1, abs=1e-4) and angles[1] < angles[0]


def test_diverged_terms_come_back() -> None:
    """Terms 81 times as long as their sum are corrected to the length that is known to be possible at that error."""
    tensor, diverged = border_rank_tensor(), two_terms(100, 0)
    bound = approximation_error(tensor, diverged)
    # The terms' error: b o b o a and its permutations / 100, b o b o b / 100^2.
    assert bound == pytest.approx(math.hypot(1 / 100, 1e-4 / 3**0.5), rel=1e-9)
    assert float(strengths(diverged).norm()) > 80
    found = correct(tensor, diverged, 1000)
    assert approximation_error(tensor, found) <= bound * (1 + MARGIN)
    # With the offset -1/2 the error is only b o b o b / (4 length^2), so terms of this length exist at that error.
    possible = two_terms((4 * 3**0.5 * bound) ** -0.5, -0.5)
    assert approximation_error(tensor, possible) == pytest.approx(bound, rel=1e-9)
    assert expected_change(found) <= 1.05 * expected_change(balanced(possible))
    assert float(strengths(found).norm()) < 4


def test_a_run_that_can_be_corrected_is_not_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, diverged = border_rank_tensor(), two_terms(100, 0)

    def diverging(*args: object, **kwargs: object) -> tuple[CPTensor, list[float]]:
        return CPTensor((torch.ones(2, dtype=torch.float64), diverged)), [approximation_error(tensor, diverged)]

    monkeypatch.setattr(cp, "parafac", diverging)
    with pytest.warns(RuntimeWarning, match="terms still cancel"):
        assert cp_decompose(tensor, 2, corrections=0).restarts == 3
    found = cp_decompose(tensor, 2)
    assert found.restarts == 0 and found.relative_error == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_less_damage_afterwards(dtype: torch.dtype) -> None:
    tensor, diverged = border_rank_tensor(), two_terms(100, 0)

    def damage(factors: list[Tensor]) -> float:
        rounded = [factor.to(dtype).double() for factor in factors]
        return float((tensor_of(rounded) - tensor_of(factors)).norm())

    # Four roundings per element of every term, each of at most half an eps.
    found = correct(tensor, diverged, 1000)
    most = float(strengths(found).sum()) * ((1 + torch.finfo(dtype).eps / 2) ** 4 - 1)
    assert damage(found) <= most < damage(balanced(diverged))


def test_what_is_exact_or_hopeless_stays_as_it_is() -> None:
    factors = balanced(random_factors(3))
    exact = tensor_of(factors)
    for tensor in (exact / exact.norm(), torch.zeros(SHAPE, dtype=torch.float64)):
        scaled = [factor / exact.norm() ** 0.25 for factor in factors]
        for before, after in zip(scaled, correct(tensor, scaled, 10), strict=True):
            torch.testing.assert_close(after, before)


def test_terms_of_norm_zero_stay_zero() -> None:
    tensor, plain = unit(*SHAPE), cp_decompose(unit(*SHAPE), 12, iterations=20, corrections=0)
    factors = [plain.out_factor, plain.in_factor.T, plain.height_factor.T, plain.width_factor.T]
    wider = [torch.cat([factor, torch.zeros(len(factor), 1)], dim=1) for factor in factors]
    found = correct(tensor, wider, 5)
    assert all(torch.isfinite(factor).all() and (factor[:, -1] == 0).all() for factor in found)
    for without, factor in zip(correct(tensor, factors, 5), found, strict=True):
        torch.testing.assert_close(factor[:, :-1], without)


def test_deterministic() -> None:
    first, second = (cp_decompose(CASES["overcomplete"][0], 30, iterations=20, corrections=5, seed=5) for _ in range(2))
    assert first.sensitivity == second.sensitivity and first.relative_error == second.relative_error
    for name in ("in_factor", "height_factor", "width_factor", "out_factor"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_the_scale_of_the_weight_does_not_matter() -> None:
    weight = randn(*SHAPE)
    plain, scaled = (cp_decompose(values, 12, iterations=20, corrections=5) for values in (weight, weight * 2.0**-40))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-12)
    assert scaled.sensitivity == pytest.approx(plain.sensitivity * 2.0**-60, rel=1e-12)  # |W|^(6/4)


# Progress ---------------------------------------------------------------------------------------------------


def test_the_bar_counts_sweeps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bars = []

    def at_once(**options: Any) -> tqdm:
        bars.append(tqdm(**{**options, "delay": 0, "mininterval": 0}))
        return bars[-1]

    monkeypatch.setattr(cp, "tqdm", at_once)
    cp_decompose(randn(*SHAPE), 12, iterations=7, corrections=3, name="features.3")
    assert "features.3: CP, run 1" in capsys.readouterr().err
    # parafac also calls back before its first sweep.
    assert 1 + 7 < bars[0].n <= 1 + 7 + 3
    cp_decompose(randn(*SHAPE), 12, progress=False)
    assert capsys.readouterr().err == ""
    conv = nn.Conv2d(10, 12, 3)
    CPConv2d.from_conv2d(conv, 4, name="features.3")
    assert capsys.readouterr().err == ""
    CPConv2d.from_conv2d(conv, 4, name="features.3", progress=True)
    assert "features.3: CP, run 1" in capsys.readouterr().err
