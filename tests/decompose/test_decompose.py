"""Decompositions of weights: exactness, errors, restarts of CP, memory, determinism, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from lowrank_ops import reference
from lowrank_ops.decompose import arithmetic, cp
from lowrank_ops.decompose import tucker as decompose
from lowrank_ops.decompose.cp import cp_decompose
from lowrank_ops.decompose.ranks import Energy
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.decompose.tucker import tucker_decompose

SHAPE = (24, 18, 3, 5)  # T, S, KH, KW
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tucker_tensor(in_rank: int, out_rank: int, shape: tuple[int, int, int, int] = SHAPE) -> Tensor:
    outputs, inputs, height, width = shape
    core = randn(out_rank, in_rank, height, width, seed=1)
    return reference.tucker_weight(randn(in_rank, inputs), core, randn(outputs, out_rank, seed=2))


def cp_tensor(rank: int, shape: tuple[int, int, int, int] = SHAPE) -> Tensor:
    outputs, inputs, height, width = shape
    factors = (randn(rank, length, seed=i) for i, length in enumerate((inputs, height, width)))
    return reference.cp_weight(*factors, randn(outputs, rank, seed=3))


def degenerate_tensor() -> Tensor:
    """A tensor of rank 4 and border rank 2: two terms that grow and cancel approximate it as closely as wanted."""
    base, other = ([randn(length, seed=seed + i) for i, length in enumerate(SHAPE)] for seed in (0, 10))
    return sum(
        torch.einsum("t,s,i,j->tsij", *[other[m] if m == mode else base[m] for m in range(4)]) for mode in range(4)
    )


def dense(found: object) -> Tensor:
    """The product of the factors in fp64."""
    if isinstance(found, decompose.TuckerFactors):
        return reference.tucker_weight(*(f.double() for f in factors_of(found)))
    if isinstance(found, cp.CPFactors):
        return reference.cp_weight(*(f.double() for f in factors_of(found)))
    return reference.linear_weight(*(f.double() for f in factors_of(found)))


def factors_of(found: object) -> list[Tensor]:
    """The factors in the order of the ops' arguments."""
    return [value for value in vars(found).values() if isinstance(value, Tensor)]


def relative_error(weight: Tensor, found: object) -> float:
    return float((weight.double() - dense(found)).norm() / weight.double().norm())


def rounding(*dtypes: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps / 2 for dtype in dtypes)


def matrix_of(tensor: Tensor) -> Tensor:
    return tensor[:, :, 0, 0]


METHODS: list[tuple[Callable, Callable[[Tensor], Tensor]]] = [
    (tucker_decompose, lambda tensor: tensor),
    (cp_decompose, lambda tensor: tensor),
    (svd_decompose, matrix_of),
]
each_method = pytest.mark.parametrize(("method", "view"), METHODS, ids=["tucker", "cp", "svd"])


# Exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [0, 10])
def test_tucker_recovers_exact_weights(dtype: torch.dtype, iterations: int) -> None:
    weight = tucker_tensor(5, 7).to(dtype)
    found = tucker_decompose(weight, (5, 7), iterations=iterations)
    assert [list(f.shape) for f in factors_of(found)] == [[5, 18], [7, 5, 3, 5], [24, 7]]
    # One rounding of the weight, one of each factor; fp32 and fp64 arithmetic adds sums of S KH KW terms.
    sums = 0 if dtype.itemsize == 2 else SHAPE[1] * SHAPE[2] * SHAPE[3]
    assert found.relative_error <= (4 + sums) * rounding(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_is_the_best_of_its_rank(dtype: torch.dtype) -> None:
    weight = matrix_of(randn(*SHAPE)).to(dtype)
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 7, 18):
        found = svd_decompose(weight, rank)
        best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        assert best - 1e-12 <= found.relative_error <= best + (2 + 24) * rounding(dtype)
        assert found.in_factor.shape == (rank, 18) and found.out_factor.shape == (24, rank)
        # Both factors contain the square roots of the singular values.
        for norms in (found.in_factor.double().norm(dim=1), found.out_factor.double().norm(dim=0)):
            torch.testing.assert_close(norms, values[:rank].sqrt(), rtol=24 * rounding(dtype), atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cp_recovers_exact_weights(dtype: torch.dtype) -> None:
    weight = cp_tensor(4).to(dtype)
    found = cp_decompose(weight, 4, tolerance=1e-13, iterations=2000)
    assert [list(f.shape) for f in factors_of(found)] == [[4, 18], [4, 3], [4, 5], [24, 4]]
    # TensorLy computes the error from squared norms in fp64, so it resolves it only to sqrt(eps).
    assert found.relative_error <= max(5 * rounding(dtype), rounding(torch.float64) ** 0.5)
    assert found.restarts == 0


def test_the_factors_of_a_cp_term_have_one_mean_square() -> None:
    found = cp_decompose(randn(*SHAPE), 6)
    inner, height, width, out = (factor.square() for factor in factors_of(found))
    for other in (height, width, out.T):
        torch.testing.assert_close(other.mean(dim=1), inner.mean(dim=1))


@pytest.mark.parametrize("rank", [18, 30, 100])
def test_cp_ranks_beyond_the_channels(rank: int) -> None:
    weight = randn(*SHAPE)
    narrow, wide = cp_decompose(weight, 12), cp_decompose(weight, rank)
    assert wide.in_factor.shape == (rank, 18) and wide.height_factor.shape == (rank, 3)
    assert wide.relative_error < narrow.relative_error < 1


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@each_method
def test_the_relative_error_is_the_reference_s(method: Callable, view: Callable, dtype: torch.dtype) -> None:
    weight = view(randn(*SHAPE, dtype=dtype))
    found = method(weight, 6)
    assert found.relative_error > 0.1
    assert found.relative_error == pytest.approx(relative_error(weight, found), rel=1e-12)
    assert all(f.dtype == dtype and f.device == weight.device for f in factors_of(found))
    assert not any(f.requires_grad or f.is_inference() for f in factors_of(found))


@pytest.mark.parametrize("ranks", [(5, 7), (12, 3), (2, 20)])
def test_hooi_is_never_worse_than_hosvd_nor_than_tensorly(ranks: tuple[int, int]) -> None:
    weight = randn(*SHAPE)
    hosvd = tucker_decompose(weight, ranks, iterations=0)
    hooi = tucker_decompose(weight, ranks, iterations=50, tolerance=1e-12)
    assert hooi.relative_error < hosvd.relative_error
    with tl.backend_context("pytorch"):
        _, errors = tl.decomposition.partial_tucker(weight, ranks[::-1], [0, 1], n_iter_max=2, tol=0)
    assert hooi.relative_error <= float(errors[-1]) + 1e-12


def test_tucker_bases_are_orthonormal() -> None:
    # R1 = 18 exceeds what the core supports (R2 KH KW = 15): the basis is completed, without a warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tucker_decompose(randn(*SHAPE), (18, 1))
    for basis in (found.in_factor, found.out_factor.T):
        identity = torch.eye(len(basis), dtype=torch.float64)
        torch.testing.assert_close(basis @ basis.T, identity)


def test_energy_bounds_the_error() -> None:
    weight = tucker_tensor(5, 7) + 0.1 * randn(*SHAPE, seed=5)
    for kept in (0.5, 0.9, 0.99):
        assert tucker_decompose(weight, Energy(kept)).relative_error <= (2 * (1 - kept)) ** 0.5
        assert svd_decompose(matrix_of(weight), Energy(kept)).relative_error <= (1 - kept) ** 0.5


# Layout, magnitudes, denormals ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (24, 18, 1, 5), (24, 18, 1, 1), (24, 1, 3, 5), (1, 18, 3, 5)])
def test_shapes_and_the_core_s_memory_format(shape: tuple[int, int, int, int]) -> None:
    weight = randn(*shape)
    tucker, cp = tucker_decompose(weight, 0.5), cp_decompose(weight, 0.5)
    assert tucker.core.is_contiguous(memory_format=torch.channels_last)
    assert dense(tucker).shape == dense(cp).shape == weight.shape
    assert tucker.relative_error < 1 and cp.relative_error < 1


def test_strided_weights_that_require_grad_stay_as_they_are() -> None:
    base = randn(18, 24, 5, 3, dtype=torch.float32)
    weight = base.permute(1, 0, 3, 2).requires_grad_()
    before = weight.detach().clone()
    for method, view in METHODS:
        strided, plain = method(view(weight), 4), method(view(before), 4)
        assert all(torch.equal(a, b) for a, b in zip(factors_of(strided), factors_of(plain), strict=True))
    assert torch.equal(weight, before) and weight.grad is None


@each_method
def test_a_zero_weight_gives_zeros_not_nan(method: Callable, view: Callable) -> None:
    weight = view(torch.zeros(SHAPE))
    for rank in (6, 0.5, Energy(0.9)):
        found = method(weight, rank)
        assert found.relative_error == 0
        assert torch.equal(dense(found), weight.double())
        assert all(torch.isfinite(f).all() for f in factors_of(found))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_method
def test_tiny_and_huge_weights(method: Callable, view: Callable, scale: float) -> None:
    weight = view(randn(*SHAPE, dtype=torch.float32))
    plain, scaled = method(weight, 6), method(weight * scale, 6)
    # Only the scaling itself is rounded; CP and HOOI stop at the same sweep.
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@each_method
def test_denormals_are_flushed(method: Callable, view: Callable, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    weight = randn(*SHAPE)
    # Channels below the normal range: without flushing, their rows of the factors would be denormal.
    weight[:4] *= tiny * 0.1
    weight[:, :3] *= tiny * 0.1
    found = method(view(weight).to(dtype), 6)
    for factor in factors_of(found):
        magnitudes = factor.double().abs()
        assert not ((magnitudes > 0) & (magnitudes < tiny)).any()
    assert (found.out_factor[:4] == 0).any() or (found.in_factor[:, :3] == 0).any()


# Restarts of CP ---------------------------------------------------------------------------------------------


def test_cancelling_terms_are_restarted_with_regularization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "MAX_TERM_RATIO", 2.0)
    weight = degenerate_tensor()
    found = cp_decompose(weight, 2, iterations=200, tolerance=1e-10, corrections=0)
    assert found.restarts >= 1
    inner, height, width, out = (factor.norm(dim=1) for factor in [*factors_of(found)[:3], found.out_factor.T])
    strengths = inner * height * width * out
    assert strengths.norm() / weight.norm() <= 2.0
    assert found.relative_error < 0.5


def test_a_decomposition_that_stays_bad_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "MAX_TERM_RATIO", 0.1)
    with pytest.warns(RuntimeWarning, match=r"features\.3: after 4 runs .* terms still cancel") as caught:
        found = cp_decompose(randn(*SHAPE), 12, name="features.3")
    assert caught[0].filename == __file__
    assert found.restarts == 3
    assert found.relative_error == pytest.approx(relative_error(randn(*SHAPE), found), rel=1e-12)


@pytest.mark.parametrize("failure", ["nan", "diverged", "singular"])
def test_bad_runs_are_restarted(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    runs = []

    def failing_once(*args: object, **kwargs: object) -> object:
        terms, errors = parafac(*args, **kwargs)
        runs.append(kwargs["init"])
        if len(runs) > 1:
            return terms, errors
        if failure == "singular":
            raise torch.linalg.LinAlgError("singular")
        if failure == "nan":
            terms.factors[2][0, 0] = float("nan")
        return terms, [*errors, torch.tensor(1e3)] if failure == "diverged" else errors

    monkeypatch.setattr(cp, "parafac", failing_once)
    found = cp_decompose(randn(*SHAPE), 6)
    assert found.restarts == 1 and len(runs) == 2
    assert not torch.equal(runs[0].factors[0], runs[1].factors[0])
    assert found.relative_error < 1


def test_no_finite_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **kwargs: object) -> object:
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(cp, "parafac", failing)
    with pytest.raises(RuntimeError, match=r"conv5.*rank 6.*lower rank"):
        cp_decompose(randn(*SHAPE), 6, name="conv5")


# The products that replace TensorLy's -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 30])
def test_products_equal_tensorly_s(rank: int) -> None:
    weight = randn(*SHAPE)
    terms = (randn(rank, seed=9), [randn(length, rank, seed=i) for i, length in enumerate(SHAPE)])
    with tl.backend_context("pytorch"):
        for mode in range(4):
            expected = tl.tenalg.unfolding_dot_khatri_rao(weight, terms, mode)
            torch.testing.assert_close(arithmetic.unfolding_dot_khatri_rao(weight, terms, mode), expected)


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from lowrank_ops.decompose.cp import cp_decompose
from lowrank_ops.decompose.tucker import tucker_decompose
from lowrank_ops.decompose.svd import svd_decompose
# 4.8 MB; a full set of singular vectors of an unfolding has S KH KW = 18720 rows and columns: 1.4 GB.
weight = torch.randn(64, 96, 15, 13)
small = weight[:16, :8]  # loads what is loaded lazily
tucker_decompose(small, 4)
cp_decompose(small, 4, iterations=2, corrections=1)
svd_decompose(small[:, :, 0, 0], 4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 18720**2 // 2  # an eighth of that
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(18720, 18720)
    sys.exit("the limit does not bind")
except RuntimeError:
    pass
tucker_decompose(weight, 0.5)
cp_decompose(weight, 256, iterations=2, corrections=1)  # a Khatri-Rao matrix [T S KH, R] would take 189 MB
svd_decompose(weight.flatten(1), 0.5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and an enforced RLIMIT_AS")
def test_memory_stays_below_one_full_set_of_singular_vectors() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]


# Determinism and what stays untouched -----------------------------------------------------------------------


@each_method
def test_deterministic_under_a_seed_whatever_the_global_state(method: Callable, view: Callable) -> None:
    weight = view(randn(*SHAPE))
    torch.manual_seed(1)
    first = method(weight, 6, seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        second = method(weight, 6, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(factors_of(first), factors_of(second), strict=True))
    assert not any(f.is_inference() for f in factors_of(second))
    assert torch.is_grad_enabled()


def test_another_seed_is_another_start_of_cp() -> None:
    weight = randn(*SHAPE)
    first, second = cp_decompose(weight, 30, iterations=2), cp_decompose(weight, 30, iterations=2, seed=1)
    assert not torch.equal(first.in_factor, second.in_factor)


@each_method
def test_tensorly_s_backends_stay_as_they_were(method: Callable, view: Callable) -> None:
    weight = view(randn(*SHAPE))
    bad = weight.clone()
    bad[0] = float("nan")

    def backends() -> list[object]:
        managers = tl.backend, tl.tenalg  # each has one backend for this thread and one for all others
        return [found for manager in managers for found in (manager.current_backend(), manager._backend)]

    before = backends()
    assert tl.get_backend() == "numpy"
    method(weight, 6)
    with pytest.raises(ValueError, match="must be finite"):
        method(bad, 6)
    assert all(a is b for a, b in zip(before, backends(), strict=True))


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@each_method
def test_weights_that_are_not_finite(method: Callable, view: Callable, value: float) -> None:
    weight = view(randn(*SHAPE)).clone()
    weight[2, 3] = value
    with pytest.raises(ValueError, match=r"backbone\.conv1: a weight to decompose must be finite, got"):
        method(weight, 6, name="backbone.conv1")


@each_method
def test_weights_of_the_wrong_kind(method: Callable, view: Callable) -> None:
    weight = view(randn(*SHAPE))
    with pytest.raises(TypeError, match=r"layer4: .* floating point, got torch.int32"):
        method(weight.int(), 6, name="layer4")
    for wrong in (weight[0], weight[:0], weight[None]):
        with pytest.raises(ValueError, match=r"layer4: the weight must be \[T, S"):
            method(wrong, 6, name="layer4")
    with pytest.raises(ValueError, match=r"layer4: .* meta device"):
        method(weight.to("meta"), 6, name="layer4")
    for rank in (0, 10**6, -0.5):
        with pytest.raises(ValueError, match=r"layer4: .*rank"):
            method(weight, rank, name="layer4")
    with pytest.raises(TypeError, match=r"layer4: .*rank"):
        method(weight, "half", name="layer4")
