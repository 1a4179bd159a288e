"""Leading singular vectors: which matrices are decomposed, the check of the error, and what happens where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import CPConv1d, CPConv2d, LowRankLinear, factorize_
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.decompose.tucker import tucker_decompose
from lowrank_ops.linalg import singular
from lowrank_ops.linalg.singular import leading_svd, leading_vectors

ROWS, COLUMNS, RANK = 1024, 1200, 48


@contextmanager
def decomposed_sides() -> Iterator[list[int]]:
    """The shorter sides of all matrices that torch.linalg decomposes into eigenvectors or singular vectors."""
    sides: list[int] = []
    names = ("eigh", "eigvalsh", "svd", "svdvals")
    originals = {name: getattr(torch.linalg, name) for name in names}

    def spy(original: Callable) -> Callable:
        def run(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
            sides.append(min(matrix.shape[-2:]))
            return original(matrix, *args, **kwargs)

        return run

    try:
        for name, original in originals.items():
            setattr(torch.linalg, name, spy(original))
        yield sides
    finally:
        for name, original in originals.items():
            setattr(torch.linalg, name, original)


def with_spectrum(values: Tensor, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """`[R, columns]` with these R singular values, fp64."""
    generator = torch.Generator().manual_seed(seed)
    bases = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (len(values), columns)
    )
    return (next(bases) * values) @ next(bases).T


def numbers(count: int = ROWS) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64)


def plateau() -> Tensor:
    """A matrix with more equal singular values than the rank, so that the leading ones are not defined."""
    values = torch.full((ROWS,), 0.05, dtype=torch.float64)
    values[: 2 * RANK] = 1
    return values


SPECTRA = {
    "slow": numbers() ** -0.3,
    "middle": numbers() ** -1,
    "fast": numbers() ** -3,
    "exact": (numbers() <= RANK).double(),
    "below": (numbers() <= RANK // 2).double(),
}


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_few_of_many_are_found_without_a_large_decomposition(spectrum: str, turned: bool) -> None:
    values = SPECTRA[spectrum]
    matrix = with_spectrum(values).float()
    with decomposed_sides() as sides:
        found = svd_decompose(matrix.T if turned else matrix, RANK)
    assert sides and max(sides) <= 2 * (RANK + 16)
    best = float((values[RANK:].square().sum() / values.square().sum()).sqrt())
    # the bound of the check, or the rounding of fp32 where nothing is cut off
    assert found.relative_error <= max((1 + singular.TOLERANCE) * best, 32 * torch.finfo(torch.float32).eps)


def test_noise_is_approximated_as_well_as_possible_too() -> None:
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    with decomposed_sides() as sides:
        found = svd_decompose(matrix, RANK)
    exact = svd_decompose(matrix, RANK, exact=True)
    assert max(sides) < ROWS
    assert exact.relative_error < found.relative_error <= (1 + singular.TOLERANCE) * exact.relative_error


def test_where_the_check_fails_the_decomposition_is_exact() -> None:
    matrix = with_spectrum(plateau()).float()
    with decomposed_sides() as sides:
        found = svd_decompose(matrix, RANK)
    assert max(sides) == ROWS
    values = plateau()
    best = float((values[RANK:].square().sum() / values.square().sum()).sqrt())
    assert found.relative_error == pytest.approx(best, rel=1e-5)


def test_a_bad_basis_does_not_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(singular, "_FIRST_CHECK", 1)
    monkeypatch.setattr(singular, "_ITERATIONS", 1)
    assert singular._randomized(matrix, RANK, 0) is None


@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_the_bound_of_the_check_is_one(sweeps: int, power: float) -> None:
    values = numbers(60) ** -power
    matrix = with_spectrum(values, 80)
    basis = torch.linalg.qr(matrix @ singular.normal(80, 12, 1, matrix)).Q
    for _ in range(sweeps):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    inner, found, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    bound = singular._excess(matrix, basis @ inner, found, matrix @ right.T, 8, 2)
    assert bound >= float(values[:8].square().sum() - found[:8].square().sum()) - 1e-12
    assert bound < float(values[:8].square().sum())


def test_small_matrices_high_ranks_and_whoever_asks_get_the_exact_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("randomized")

    monkeypatch.setattr(singular, "_randomized", never)
    wide = with_spectrum(numbers(200) ** -0.5, 300).float()
    for matrix, count, exact in ((wide, 8, False), (torch.eye(ROWS), 512, False), (torch.eye(ROWS), 8, True)):
        leading_svd(matrix, count, 0, exact)
    with pytest.raises(AssertionError, match="randomized"):
        leading_svd(torch.eye(ROWS), 8, 0)


@pytest.mark.parametrize("turned", [False, True])
def test_fp32_singular_vectors_come_from_the_gram_matrix_of_the_shorter_side(turned: bool) -> None:
    values = numbers(40) ** -2
    matrix = with_spectrum(values, 200).float()
    matrix = matrix.T if turned else matrix
    with decomposed_sides() as sides:
        left, found, right = leading_svd(matrix, 40, 0)
    assert sides == [40]
    # one rounding of each element of the matrix moves a singular value by eps |A|
    torch.testing.assert_close(found.double(), values, rtol=0, atol=2 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(left * found @ right, matrix, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_a_basis_beyond_the_rank_is_filled_up_orthonormally() -> None:
    matrix = with_spectrum(numbers(5), 9).T  # [9, 5]
    vectors = leading_vectors(matrix, 8)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(vectors @ (vectors.T @ matrix), matrix)


def test_a_convolution_is_decomposed_by_its_channels_only() -> None:
    weight = torch.randn(96, 40, 7, 5, generator=torch.Generator().manual_seed(0))
    with decomposed_sides() as sides:
        tucker_decompose(weight, (8, 8))
    # two for the HOSVD, two per sweep of HOOI
    assert set(sides) <= {96, 40} and len(sides) <= 2 + 2 * 10


def test_the_seed_is_all_that_a_randomized_decomposition_depends_on() -> None:
    matrix = with_spectrum(SPECTRA["slow"]).float()
    torch.manual_seed(1)
    first = svd_decompose(matrix, RANK, seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        second = svd_decompose(matrix, RANK, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.in_factor, second.in_factor) and torch.equal(first.out_factor, second.out_factor)


def in_model(**arguments: Any) -> Callable[[bool], object]:
    def run(exact: bool) -> object:
        model = nn.Sequential(nn.Linear(ROWS, ROWS))
        return factorize_(model, rank=16, exact=exact, progress=False, **arguments)

    return run


DECOMPOSING: dict[str, Callable[[bool], object]] = {
    "linear": lambda exact: LowRankLinear.from_linear(nn.Linear(ROWS, ROWS), 16, exact=exact),
    "1x1 convolution": lambda exact: CPConv2d.from_conv2d(nn.Conv2d(ROWS, ROWS, 1), 16, exact=exact),
    "convolution of width 1": lambda exact: CPConv1d.from_conv1d(nn.Conv1d(ROWS, ROWS, 1), 16, exact=exact),
    "factorize_": in_model(),
    "calibrated": in_model(calibration=torch.randn(40, ROWS)),
}


@pytest.mark.parametrize("call", DECOMPOSING)
@pytest.mark.filterwarnings("ignore:.*few calibration data")
def test_exact_where_it_is_asked_for(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def spy(matrix: Tensor, count: int, seed: int) -> None:
        tried.append(count)  # nothing was found, so the exact method runs

    monkeypatch.setattr(singular, "_randomized", spy)
    DECOMPOSING[call](True)
    assert not tried
    DECOMPOSING[call](False)
    assert tried


def test_exact_in_other_processes() -> None:
    """Another process gives the same bits as this one."""
    torch.manual_seed(0)
    layer = nn.Linear(ROWS, ROWS)
    found = []
    for options in ({"exact": True}, {"exact": True, "n_jobs": 2}, {}):
        model = nn.Sequential(nn.Linear(ROWS, ROWS))
        model.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()})
        factorize_(model, rank=16, progress=False, **options)  # type: ignore[arg-type]
        found.append(model[0].relative_error)
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[2] > found[0] * (1 + 1e-6)
