"""Ranks by variational Bayes: the paper's formulas, planted ranks, noise, scales, and the functions that accept
VBMF."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, nn

from lowrank_ops import VBMF, CPConv2d, LowRankLinear, TuckerConv2d, factorize_
from lowrank_ops.decompose.ranks import cp_rank, linear_rank, tucker_ranks

SHAPES = [(40, 100), (100, 40), (60, 60)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(rows: int, columns: int, rank: int, seed: int, strength: float = 2.0) -> Tensor:
    """White noise of variance 1 plus orthogonal components, `strength` times as long as the noise's largest
    component."""
    left = torch.linalg.qr(randn(rows, rank, seed=seed + 1000)).Q
    right = torch.linalg.qr(randn(columns, rank, seed=seed + 2000)).Q
    return strength * (rows**0.5 + columns**0.5) * left @ right.T + randn(rows, columns, seed=seed)


def rank_of(matrix: Tensor, multiple: int = 1) -> int:
    return linear_rank(VBMF(), matrix, multiple=multiple)


def rank_by_the_paper(matrix: Tensor) -> int:
    """The rank term by term from the formulas, by a full SVD and SciPy; the noise variance on a grid, then refined."""
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    rows, columns = sorted(matrix.shape)
    a = rows / columns

    def phi(z: float) -> float:
        return math.log(z + 1) / z - 0.5

    root = brentq(lambda t: phi(t) + phi(t / a), 1e-6, 100.0, xtol=1e-15)
    threshold = (1 + root) * (1 + a / root)

    def omega(variance: float) -> float:
        total = 0.0
        for value in values:
            x = value**2 / (columns * variance)
            total += x - math.log(x)
            if x > threshold:
                tau = (x - (1 + a) + math.sqrt((x - (1 + a)) ** 2 - 4 * a)) / 2
                total += math.log(tau + 1) + a * math.log(tau / a + 1) - tau
        return total

    kept = math.ceil(rows / (1 + a)) - 1
    lower = max(values[kept] ** 2 / (columns * threshold), np.mean(values[kept:] ** 2) / columns)
    grid = np.geomspace(lower, np.mean(values**2) * len(values) / (rows * columns), 500)
    best = int(np.argmin([omega(variance) for variance in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    variance = minimize_scalar(omega, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return int(np.sum(values > math.sqrt(columns * variance * threshold)))


# The solution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_paper_s_formulas(shape: tuple[int, int]) -> None:
    found = set()
    for seed in range(4):
        # From strong components to weak ones near the threshold, which then decides.
        for strength in (0.5, 0.8, 1.0, 2.0):
            matrix = planted(*shape, rank=7, seed=seed, strength=strength)
            expected = rank_by_the_paper(matrix)
            assert rank_of(matrix) == max(expected, 1), (seed, strength)
            found.add(expected)
    assert min(found) < 2 and max(found) == 7 and len(found) > 2


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_paper_s_formulas_on_a_spectrum_without_a_gap(shape: tuple[int, int]) -> None:
    for seed in range(3):
        decay = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -0.8
        matrix = randn(*shape, seed=seed) * decay
        expected = rank_by_the_paper(matrix)
        assert rank_of(matrix) == expected and 1 < expected < min(shape) / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_planted_ranks(shape: tuple[int, int], rank: int) -> None:
    for seed in range(5):
        assert rank_of(planted(*shape, rank=rank, seed=seed)) == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_pure_noise_has_rank_one_not_zero(shape: tuple[int, int]) -> None:
    for seed in range(5):
        assert rank_by_the_paper(randn(*shape, seed=seed)) == 0
        assert rank_of(randn(*shape, seed=seed)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    # Rounding adds noise of at most 2^-9 of a value, far below the noise of the matrix.
    assert rank_of(planted(40, 100, 5, seed=0).to(dtype)) == 5


@pytest.mark.parametrize("scale", [2.0**-100, 1e-30, 1e30])
def test_the_scale_does_not_matter(scale: float) -> None:
    for seed in range(3):
        for strength in (0.9, 2.0):
            matrix = planted(60, 40, 7, seed, strength).float()
            assert rank_of(matrix * scale) == rank_of(matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_weight_of_exact_rank(dtype: torch.dtype) -> None:
    assert rank_of((randn(40, 4) @ randn(4, 100, seed=1)).to(dtype)) == 4


@pytest.mark.parametrize("shape", [(24, 40), (1, 40), (40, 1), (1, 1)])
def test_zero_and_the_smallest_weights(shape: tuple[int, int]) -> None:
    assert rank_of(torch.zeros(shape)) == 1
    if 1 in shape:
        assert rank_of(torch.ones(shape)) == 1


# As a rank rule ---------------------------------------------------------------------------------------------


def planted_weight() -> Tensor:
    """`[24, 30, 3, 5]` of Tucker ranks (2, 3) plus noise of a tenth of its magnitude."""
    core, inner, out = randn(3, 2, 3, 5, seed=1), randn(2, 30, seed=2), randn(24, 3, seed=3)
    exact = torch.einsum("tb,baij,as->tsij", out, core, inner)
    return exact + 0.1 * exact.square().mean().sqrt() * randn(24, 30, 3, 5, seed=4)


def test_each_mode_by_itself() -> None:
    weight = planted_weight()
    assert tucker_ranks(VBMF(), weight) == (2, 3)
    assert tucker_ranks((VBMF(), 5), weight) == (2, 5)
    assert tucker_ranks((7, VBMF()), weight) == (7, 3)
    assert cp_rank(VBMF(), weight) == 3
    assert linear_rank(VBMF(), weight.flatten(1)) == 3


def test_rounded_up_to_the_multiple() -> None:
    matrix = planted(60, 100, 9, seed=0)
    assert [rank_of(matrix, multiple) for multiple in (1, 4, 8, 16, 64)] == [9, 12, 16, 9, 9]


def test_layers_and_models() -> None:
    conv, linear = nn.Conv2d(30, 24, (3, 5)), nn.Linear(100, 40)
    with torch.no_grad():
        conv.weight.copy_(planted_weight())
        linear.weight.copy_(planted(40, 100, 5, seed=0))
    assert TuckerConv2d.from_conv2d(conv, VBMF()).rank == (2, 3)
    assert CPConv2d.from_conv2d(conv, VBMF()).rank == 3
    assert LowRankLinear.from_linear(linear, VBMF()).rank == 5
    model = nn.Sequential(conv, linear)
    report = factorize_(model, "tucker", VBMF(), progress=False)
    assert [layer.ranks for layer in report] == [(2, 3), (5,)]


def test_bad_input() -> None:
    matrix = planted(24, 40, 3, seed=0)
    with pytest.raises(TypeError, match=r"fc2.* or VBMF\(\), got <class"):
        linear_rank(VBMF, matrix, name="fc2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fc2.*VBMF needs the values of a weight"):
        linear_rank(VBMF(), matrix.to("meta"), name="fc2")
    matrix[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"fc2.* 1 NaN or infinite of 960"):
        linear_rank(VBMF(), matrix, name="fc2")
    with pytest.raises(TypeError, match="VBMF"):
        VBMF(0.5)  # type: ignore[call-arg]
    model = nn.Sequential(nn.Linear(40, 24))
    with torch.no_grad():
        model[0].weight.copy_(matrix)
    before, layer = model[0].weight.clone(), model[0]
    with pytest.raises(ValueError, match=r"0: .* 1 NaN or infinite of 960"):
        factorize_(model, rank=VBMF(), progress=False)
    assert model[0] is layer and torch.equal(layer.weight, before)
