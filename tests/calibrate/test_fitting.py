"""Whitening and least squares against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import factorize_
from lowrank_ops.calibrate import fitting, normal_equations
from lowrank_ops.calibrate.fitting import Regression, refit
from lowrank_ops.calibrate.moments import Moments
from lowrank_ops.calibrate.whitening import Whitening
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.decompose.tucker import tucker_decompose
from lowrank_ops.linalg import roots
from lowrank_ops.linalg.roots import Root
from tests.support.triangles import moments_of, symmetric, triangle_of


def _moment(size: int, seed: int, spread: float = 1.5) -> Tensor:
    """A positive definite matrix whose eigenvalues span `spread` decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (basis * torch.logspace(0, -spread, size, dtype=torch.float64)) @ basis.T


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _damped(moment: Tensor) -> Tensor:
    level = roots.DAMPING * torch.linalg.eigvalsh(moment)[-1]
    return moment + level * torch.eye(len(moment), dtype=torch.float64)


def _output_error(change: Tensor, moments: Moments) -> float:
    """`tr(G D C D^T)` of damped moments, summed over taps."""
    return float(
        torch.einsum(
            "tu,usk,sz,tzk->",
            _damped(symmetric(moments.gradient)),
            change.flatten(2),
            _damped(symmetric(moments.input)),
            change.flatten(2),
        )
    )


def test_the_norm_of_the_whitened_weight_is_the_output_error() -> None:
    weight, moments = _normal(6, 5, 3, 2), moments_of(_moment(5, 1), _moment(6, 2))
    norm = float(Whitening.of_(copy.deepcopy(moments)).apply(weight).square().sum())
    assert norm == pytest.approx(_output_error(weight, moments), rel=1e-12)


def test_decomposing_the_whitened_weight_keeps_outputs_better_than_the_weights_own_factors() -> None:
    moments = moments_of(_moment(12, 1, 3.0), _moment(10, 2, 3.0))
    whitening = Whitening.of_(copy.deepcopy(moments))
    matrix = _normal(10, 12)
    plain = svd_decompose(matrix, 4)
    found = svd_decompose(whitening.apply(matrix), 4)
    undone = whitening.undo({"in_factor": found.in_factor, "out_factor": found.out_factor})
    errors = [
        _output_error((matrix - out @ inner)[:, :, None], moments)
        for out, inner in ((plain.out_factor, plain.in_factor), (undone["out_factor"], undone["in_factor"]))
    ]
    # the best of its rank in this metric, so the error is the sum of the dropped singular values
    dropped = torch.linalg.svdvals(whitening.apply(matrix))[4:].square().sum()
    assert errors[1] == pytest.approx(float(dropped), rel=1e-9)
    assert errors[1] < errors[0]

    weight = _normal(10, 12, 3, 3)
    plain4 = tucker_decompose(weight, (5, 4))
    found4 = tucker_decompose(whitening.apply(weight), (5, 4))
    undone = whitening.undo({"in_factor": found4.in_factor, "core": found4.core, "out_factor": found4.out_factor})
    both = [
        _output_error(weight - torch.einsum("tb,baij,as->tsij", out, core, inner), moments)
        for out, core, inner in (
            (plain4.out_factor, plain4.core, plain4.in_factor),
            (undone["out_factor"], undone["core"], undone["in_factor"]),
        )
    ]
    assert both[1] < both[0]


def test_directions_without_energy_are_not_amplified() -> None:
    empty = torch.zeros(4, 4, dtype=torch.float64)
    empty[0, 0] = 1.0
    whitening = Whitening.of_(moments_of(empty, empty))
    identity = torch.eye(4, dtype=torch.float64)
    largest = 1 / roots.DAMPING**0.5
    for root in (whitening.input, whitening.gradient):
        assert float(torch.linalg.matrix_norm(root.undo(identity), 2)) == pytest.approx(largest, rel=1e-9)
    none = Whitening.of_(moments_of(torch.zeros(4, 4), torch.zeros(4, 4)))
    assert torch.equal(none.input.undo(identity), identity)


@pytest.fixture
def tiny_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "RIDGE", 1e-12)


def _error(regression: Regression, out: Tensor, inner: Tensor, bias: Tensor, metric: Tensor | None = None) -> float:
    lost = regression.targets - regression.features @ inner.T @ out.T - bias
    return float((lost @ (torch.eye(lost.shape[1], dtype=lost.dtype) if metric is None else metric) * lost).sum())


def _regression(features: Tensor, targets: Tensor, prior: Tensor, gradient: Root | None = None) -> Regression:
    """With a prior `[T, F]` that is not factored."""
    return Regression(features, targets, (prior, torch.eye(prior.shape[1]).to(prior)), gradient)


@pytest.mark.usefixtures("tiny_ridge")
def test_an_exact_map_is_found() -> None:
    features, out, inner, bias = _normal(200, 7), _normal(5, 3, seed=1), _normal(3, 7, seed=2), _normal(5, seed=3)
    regression = _regression(features, features @ inner.T @ out.T + bias, torch.zeros(5, 7))
    for rank in (3, None):
        solution = regression.solve(rank)
        # the ridge's share of the map, 1e-12, times its condition, below 100
        torch.testing.assert_close(solution[0] @ solution[1], out @ inner, rtol=0, atol=1e-9)
        torch.testing.assert_close(solution[2], bias, rtol=0, atol=1e-9)
        assert regression.error(solution) < 1e-9


@pytest.mark.usefixtures("tiny_ridge")
@pytest.mark.parametrize("metric", [None, _moment(5, 4)], ids=["plain", "weighted"])
def test_no_other_map_of_the_rank_is_better(metric: Tensor | None) -> None:
    features = _normal(300, 6) @ _normal(6, 6, seed=9)
    regression = _regression(
        features,
        features @ _normal(6, 5, seed=1) + _normal(300, 5, seed=2),
        torch.zeros(5, 6),
        None if metric is None else Root.of_(triangle_of(metric)),
    )
    metric = None if metric is None else _damped(metric)
    out, inner, bias = regression.solve(2)
    assert out.shape == (5, 2)
    torch.testing.assert_close(out.T @ out, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    best = _error(regression, out, inner, bias, metric)
    # reached by descent from another start: least squares in one factor after the other
    left = _normal(5, 2, seed=5)
    root = torch.eye(5, dtype=torch.float64) if metric is None else torch.linalg.cholesky(metric)
    centred, targets = features - features.mean(0), (regression.targets - regression.targets.mean(0)) @ root
    for _ in range(500):
        right = torch.linalg.lstsq(left, torch.linalg.lstsq(centred, targets).solution.T).solution
        left = torch.linalg.lstsq(centred @ right.T, targets).solution.T
    descended = float((targets - centred @ right.T @ left.T).square().sum())
    assert best == pytest.approx(descended, rel=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_the_same_inside_autocast(relu: bool) -> None:
    features = _normal(300, 6).float()
    regression = _regression(features, _normal(300, 5, seed=2).float(), torch.zeros(5, 6))
    solution = regression.solve(2, relu)
    with torch.autocast("cpu", torch.bfloat16):
        inside = regression.solve(2, relu)
        error = regression.error(solution)
    assert all(torch.equal(*parts) for parts in zip(inside, solution, strict=True))
    assert error == regression.error(solution)


def test_features_that_the_data_do_not_show_keep_the_prior() -> None:
    features = _normal(100, 4)
    features[:, 3] = 0
    prior = _normal(2, 4, seed=1)
    regression = _regression(features, features @ _normal(4, 2, seed=2), prior)
    out, inner, _ = regression.solve()
    torch.testing.assert_close((out @ inner)[:, 3], prior[:, 3], rtol=1e-12, atol=0)


def test_through_a_relu_the_rectified_error_falls_and_the_plain_one_may_rise() -> None:
    features = _normal(2000, 8)
    targets = features @ _normal(8, 16, seed=1) - 1.0
    regression = _regression(features[:, :4], targets, torch.zeros(16, 4))
    plain, rectified = regression.solve(3), regression.solve(3, relu=True)

    def lost(solution: tuple[Tensor, Tensor, Tensor]) -> float:
        out, inner, bias = solution
        return float((targets.clamp(min=0) - (features[:, :4] @ inner.T @ out.T + bias).clamp(min=0)).square().sum())

    assert lost(rectified) < 0.97 * lost(plain)
    assert _error(regression, *rectified) >= _error(regression, *plain)


@pytest.mark.parametrize("metric", [None, _moment(12, 4)], ids=["plain", "weighted"])
@pytest.mark.parametrize("count", [15, 200], ids=["fewer rows than features", "more"])
def test_steps_from_a_near_solution_reach_the_best_of_the_rank(count: int, metric: Tensor | None) -> None:
    features, targets = _normal(count, 20), _normal(count, 12, seed=1)
    root = None if metric is None else Root.of_(triangle_of(metric))
    parts = [_regression(features, targets, torch.zeros(12, 20).double(), root)]
    factored = normal_equations.NormalEquations(parts).factored(1e-3, root)
    best = factored.solve(lambda _, targets: targets, 4)
    reached = best[0], best[1] + 0.1 * _normal(4, 20, seed=2), best[2]
    for _ in range(200):
        reached = factored.solve(lambda _, targets: targets, 4, near=reached)
    torch.testing.assert_close(reached[0] @ reached[1], best[0] @ best[1], rtol=0, atol=1e-8)


def test_behind_a_relu_each_strength_takes_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed: list[int] = []
    leading_svd = normal_equations.leading_svd
    monkeypatch.setattr(
        normal_equations,
        "leading_svd",
        lambda matrix, count, seed: decomposed.append(count) or leading_svd(matrix, count, seed),
    )
    fitted, judged, present = _problem(400, 0.3)
    refit(fitted, judged, (torch.eye(10, 4).double(), torch.zeros(4, 40).double(), present[2]), 4, True)
    assert 2 <= len(decomposed) <= len(fitting.STRENGTHS) + 1  # the fits that are judged, and the last one


def test_the_compromise_behind_a_relu_is_the_best_one() -> None:
    targets, present = _normal(50, 40), _normal(50, 40, seed=1)
    for weight in (0.01, 1.0):
        found = fitting._through_relu(targets, present, weight)

        def cost(values: Tensor, weight: float = weight) -> Tensor:
            return (targets.clamp(min=0) - values.clamp(min=0)).square() + weight * (values - present).square()

        grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
        least = torch.stack([cost(torch.full_like(targets, float(value))) for value in grid]).amin(0)
        assert bool((cost(found) <= least + 1e-12).all())


def _problem(count: int, noise: float, seed: int = 0) -> tuple[Regression, Regression, tuple[Tensor, Tensor, Tensor]]:
    """Rows to fit, held-out rows, and factors at some distance from the map that both follow."""
    features = _normal(count, 40, seed=seed)
    true = _normal(10, 40, seed=1) / 40**0.5
    targets = features @ true.T + noise * _normal(count, 10, seed=seed + 2)
    present = torch.eye(10).double(), true + 0.3 * _normal(10, 40, seed=3) / 40**0.5, torch.zeros(10).double()
    held = count // 4
    fitted, judged = (
        _regression(features[part], targets[part], present[1]) for part in (slice(held, None), slice(held))
    )
    return fitted, judged, present


def _loss_on_new_rows(solution: tuple[Tensor, Tensor, Tensor], noise: float) -> float:
    judged = _problem(8000, noise, seed=50)[1]
    return float(judged.losses(solution).mean())


def test_many_rows_are_fitted_and_few_keep_the_factors() -> None:
    for count, noise, gains in ((2000, 0.3, True), (60, 1.0, False), (8, 1.0, False)):
        fitted, judged, present = _problem(count, noise)
        solution, error = refit(fitted, judged, present, None, False)
        before, after = (_loss_on_new_rows(which, noise) for which in (present, solution))
        plain = _loss_on_new_rows(fitted.solve(), noise)
        # the error of the fit that has not seen the held-out rows; of the fit to all rows it would be too small
        assert error == judged.error(fitted.solve() if gains else present)
        if gains:
            assert judged.error(solution) < error
            assert after < 0.8 * before and after == pytest.approx(plain, rel=0.01)
        else:
            assert after < 1.02 * before < plain  # a fit of the usual ridge is worse than none


def test_a_stronger_pull_is_chosen_where_it_is_better() -> None:
    fitted, judged, present = _problem(120, 0.5)
    solution, _ = refit(fitted, judged, present, None, False)
    found = _loss_on_new_rows(solution, 0.5)
    assert found < 0.8 * _loss_on_new_rows(fitted.solve(), 0.5)
    assert found < 0.98 * _loss_on_new_rows(present, 0.5)


def test_no_rows_to_fit_or_to_judge() -> None:
    fitted, judged, present = _problem(40, 1.0)
    none = Regression(fitted.features[:0], fitted.targets[:0], fitted.prior)
    assert refit(fitted, none, present, None, False) == (present, None)
    assert refit(none, judged, present, None, False) == (present, judged.error(present))
    one = Regression(judged.features[:1], judged.targets[:1], judged.prior)
    assert refit(fitted, one, present, None, False)[0] is present  # one row shows no noise


def test_behind_a_relu_the_rectified_loss_decides() -> None:
    fitted, judged, _ = _problem(2000, 0.3)
    out, inner, bias = fitted.solve()
    shifted = out, inner, bias - 8  # all negative: wrong, and right behind the ReLU
    low = [Regression(part.features, part.targets - 9, part.prior) for part in (fitted, judged)]
    assert refit(*low, shifted, None, True)[0] is shifted
    assert refit(*low, shifted, None, False)[0] is not shifted


def test_rows_that_repeat_each_other_give_no_smaller_standard_error() -> None:
    values = _normal(8)
    error = fitting._standard_error(values)
    assert error == pytest.approx(float(values.std()) / 8**0.5)
    assert fitting._standard_error(values.repeat_interleave(50)) == pytest.approx(error)
    assert fitting._standard_error(values[:1]) == float("inf")


@pytest.mark.parametrize("metric", [None, _moment(5, 4)], ids=["plain", "weighted"])
@pytest.mark.parametrize("rank", [None, 2])
def test_fewer_rows_than_features_give_the_same_map_by_the_smaller_system(
    rank: int | None, metric: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []
    cholesky = normal_equations.cholesky_
    monkeypatch.setattr(normal_equations, "cholesky_", lambda matrix: sides.append(len(matrix)) or cholesky(matrix))
    features, prior = _normal(12, 30), _normal(5, 30, seed=3)
    root = None if metric is None else Root.of_(triangle_of(metric))
    regression = _regression(features, _normal(12, 5, seed=1), prior, root)
    small = regression.solve(rank)
    monkeypatch.setattr(normal_equations.NormalEquations, "by_rows", property(lambda self: False))
    out, inner, bias = regression.solve(rank)
    assert sides == [12, 30]
    # fp64, the ridge makes the condition about a thousand
    torch.testing.assert_close(small[0] @ small[1], out @ inner, rtol=0, atol=1e-9)
    torch.testing.assert_close(small[2], bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("count", [3, 200], ids=["fewer rows than features", "more"])
def test_a_rank_above_the_features_is_no_limit(count: int, relu: bool) -> None:
    """A pair of ranks may ask for it: of a convolution's one hidden channel, 9 features of a window."""
    regression = _regression(_normal(count, 4), _normal(count, 12, seed=1), _normal(12, 4, seed=2))
    out, inner, bias = regression.solve(6, relu)
    assert out.shape == (12, 6) and inner.shape == (6, 4)
    free = regression.solve(None, relu)
    torch.testing.assert_close(out @ inner, free[0] @ free[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(bias, free[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("outputs", [12, 40], ids=["fewer outputs than features", "more"])
@pytest.mark.parametrize("count", [16, 200], ids=["fewer rows than features", "more"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fp32_rows_give_the_map_of_fp64_ones(count: int, outputs: int, weighted: bool) -> None:
    """Their singular vectors come from the Gram matrix of the shorter side."""
    features, targets, prior = _normal(count, 30), _normal(count, outputs, seed=1), _normal(outputs, 30, seed=2)
    moment = _moment(outputs, 4)

    def solve(dtype: torch.dtype) -> Tensor:
        root = Root.of_(triangle_of(moment.to(dtype))) if weighted else None
        rows = (each.to(dtype) for each in (features, targets, prior))
        out, inner, _ = _regression(*rows, root).solve(6)
        assert out.dtype == inner.dtype == dtype
        return (out @ inner).double()

    expected = solve(torch.float64)
    # fp32; the metrics make the condition some thousands
    assert float((solve(torch.float32) - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rank", [None, 10, 6])
@pytest.mark.parametrize("count", [48, 400], ids=["fewer rows than features", "more"])
def test_the_last_fit_is_one_to_all_rows(count: int, rank: int | None, relu: bool) -> None:
    fitted, judged, present = _problem(count, 0.0)
    together = Regression(
        torch.cat([fitted.features, judged.features]), torch.cat([fitted.targets, judged.targets]), fitted.prior
    )
    present = torch.eye(10, rank or 10).double(), torch.zeros(rank or 10, 40).double(), present[2]
    found, _ = refit(fitted, judged, present, rank, relu)
    expected = [together.solve(rank, relu, strength) for strength in fitting.STRENGTHS]
    assert any(
        all(torch.allclose(*parts, rtol=0, atol=1e-9) for parts in zip(found, each, strict=True)) for each in expected
    )


def test_held_out_rows_lessen_the_error_on_new_rows() -> None:
    """150 rows and 50 held-out ones for 40 features: the noise of the fit falls by a quarter and more."""
    noise, before, after = 0.3, 0.0, 0.0
    for seed in (0, 100, 200):
        fitted, judged, present = _problem(200, noise, seed)
        before += _loss_on_new_rows(fitted.solve(), noise) - 10 * noise**2
        after += _loss_on_new_rows(refit(fitted, judged, present, None, False)[0], noise) - 10 * noise**2
    assert after < 0.8 * before


@pytest.mark.parametrize("kind", ["linear", "cp"])
def test_no_square_matrix_of_a_wide_output_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take half a gigabyte in fp64 for 8192 outputs."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 200) if kind == "linear" else nn.Conv2d(12, 200, 3)
    data = torch.randn(400, 12) if kind == "linear" else torch.randn(20, 12, 6, 6)
    sizes: list[int] = []
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda size, **options: sizes.append(size) or eye(size, **options))
    model, method = nn.Sequential(layer, nn.Flatten(), nn.ReLU()), "tucker" if kind == "linear" else "cp"
    report = factorize_(model, method, rank=0.25, calibration=data, progress=False)  # type: ignore[arg-type]
    assert report.replaced[0].output_error is not None
    assert 200 not in sizes
