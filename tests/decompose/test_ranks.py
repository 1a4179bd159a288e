"""Rank rules: ints, fractions, energies, pairs; floors, ceilings and rounding to a multiple."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank_ops.decompose.ranks import Energy, cp_rank, linear_rank, tucker_ranks


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def with_spectrum(values: list[float], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix with exactly known singular values."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator)).Q
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).to(dtype)


def test_ints_are_not_changed() -> None:
    assert tucker_ranks(5, weight(24, 40, 3, 5)) == (5, 5)
    assert tucker_ranks((7, 3), weight(24, 40, 3, 5)) == (7, 3)
    assert tucker_ranks((np.int64(7), 3), weight(24, 40, 3, 5)) == (7, 3)
    assert cp_rank(41, weight(24, 40, 3, 5)) == 41
    assert linear_rank(11, weight(24, 40)) == 11


def test_fractions_are_of_the_channels_input_side_first() -> None:
    assert tucker_ranks(0.5, weight(64, 32, 3, 5)) == (16, 32)
    assert tucker_ranks((0.25, 0.5), weight(64, 32, 3, 5)) == (8, 32)
    assert tucker_ranks((0.25, 5), weight(64, 32, 3, 5)) == (8, 5)
    assert cp_rank(0.5, weight(64, 32, 3, 5)) == 32
    assert linear_rank(0.5, weight(64, 32)) == 16


@pytest.mark.parametrize(
    ("fraction", "multiple", "expected"),
    [
        (0.5, 8, 32),  # already a multiple
        (0.35, 8, 24),  # 22.4 -> 22, up to 24
        (0.35, 1, 22),
        (0.35, 16, 32),
        (0.1, 8, 6),  # below the multiple: 8 would cost
        (0.95, 8, 61),  # the next multiple is the full rank: nothing saved, so it would cost
        (1.0, 8, 64),
        (1e-9, 8, 1),  # floor
        (0.0390625, 1, 3),  # 2.5: halves go up
    ],
)
def test_rounding_of_fractions(fraction: float, multiple: int, expected: int) -> None:
    assert linear_rank(fraction, weight(64, 80), multiple=multiple) == expected
    assert tucker_ranks(fraction, weight(64, 64, 3, 1), multiple=multiple) == (expected, expected)


def test_ceilings() -> None:
    assert tucker_ranks((2, 18), weight(64, 2, 3, 3)) == (2, 18)
    # R2 = 0.5 * 64 = 32, but the unfolding along T has at most rank 18, and R1 = 1 supports only 9.
    assert tucker_ranks((2, 0.5), weight(64, 2, 3, 3)) == (2, 18)
    assert tucker_ranks((1, 0.5), weight(64, 2, 3, 3)) == (1, 9)
    assert tucker_ranks((0.5, 1), weight(2, 64, 3, 3)) == (9, 1)
    assert cp_rank(18, weight(64, 2, 3, 3)) == 18
    assert cp_rank(1.0, weight(64, 2, 3, 3)) == 18
    for call in (
        lambda: tucker_ranks((3, 4), weight(64, 2, 3, 3)),
        lambda: tucker_ranks((2, 19), weight(64, 2, 3, 3)),
        lambda: tucker_ranks(24, weight(64, 23, 3, 3)),
        lambda: cp_rank(19, weight(64, 2, 3, 3)),
        lambda: linear_rank(25, weight(24, 40)),
    ):
        with pytest.raises(ValueError, match="must lie between 1 and"):
            call()


@pytest.mark.parametrize("rank", [0, -3, 0.0, -0.5, 1.5, math.nan])
def test_ranks_out_of_range(rank: float) -> None:
    for call in (tucker_ranks, cp_rank):
        with pytest.raises(ValueError, match=r"conv7: .*rank"):
            call(rank, weight(24, 40, 3, 5), name="conv7")
    with pytest.raises(ValueError, match=r"conv7: .*rank"):
        linear_rank(rank, weight(24, 40), name="conv7")


@pytest.mark.parametrize("rank", [None, "8", True, (4, 6)])
def test_ranks_of_a_wrong_type(rank: object) -> None:
    with pytest.raises(TypeError, match=r"fc: .*rank"):
        linear_rank(rank, weight(24, 40), name="fc")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"conv: .*rank"):
        cp_rank(rank, weight(24, 40, 3, 1), name="conv")  # type: ignore[arg-type]


def test_a_triple_and_a_bad_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match="input side first"):
        tucker_ranks((1, 2, 3), weight(24, 40, 3, 5))  # type: ignore[arg-type]
    for multiple in (0, -8, True, 2.0):
        with pytest.raises(ValueError, match="multiple must be an int of at least 1"):
            linear_rank(0.5, weight(24, 40), multiple=multiple)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [0.0, -1.0, 1.01, math.nan])
def test_energy_out_of_range(kept: float) -> None:
    with pytest.raises(ValueError, match=r"kept must lie in \(0, 1\]"):
        Energy(kept)


@pytest.mark.parametrize("kept", ["a", None, True, (0.5, 0.5)])
def test_energy_of_another_type(kept: object) -> None:
    with pytest.raises(TypeError, match="Energy: kept must be a number"):
        Energy(kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_energy_is_the_smallest_rank_that_keeps_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    # Energies 16, 9, 4, 1 of 30: cumulated .533, .833, .967, 1.
    matrix = with_spectrum([4, 3, 2, 1], *shape, dtype)
    expected = {0.1: 1, 0.52: 1, 0.55: 2, 0.82: 2, 0.85: 3, 0.96: 3, 0.98: 4}
    assert {kept: linear_rank(Energy(kept), matrix, multiple=1) for kept in expected} == expected
    if dtype != torch.bfloat16:  # rounding to bf16 truly raises the numerical rank
        assert linear_rank(Energy(1.0), matrix, multiple=1) == 4


def test_energy_looks_at_each_mode_by_itself() -> None:
    # Mode S has rank 2 and mode T rank 3: W = sum over b, a of out[t, b] core[b, a, i, j] in[a, s].
    generator = torch.Generator().manual_seed(2)
    out, core, inner = (torch.randn(*shape, generator=generator) for shape in ((20, 3), (3, 2, 3, 5), (2, 30)))
    tensor = torch.einsum("tb,baij,as->tsij", out, core, inner)
    assert tucker_ranks(Energy(1.0), tensor) == (2, 3)
    assert tucker_ranks((Energy(1.0), 5), tensor) == (2, 5)
    assert cp_rank(Energy(1.0), tensor) == 3


def test_energy_is_rounded_up_never_down() -> None:
    matrix = with_spectrum([1.0] * 12, 32, 40, torch.float32)
    assert linear_rank(Energy(0.7), matrix, multiple=1) == 9
    assert linear_rank(Energy(0.7), matrix) == 16


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_energy_of_zero_tiny_and_huge_weights(scale: float) -> None:
    assert linear_rank(Energy(0.9), torch.zeros(24, 40)) == 1
    matrix = with_spectrum([4, 3, 2, 1], 24, 40, torch.float32)
    assert linear_rank(Energy(0.9), matrix * scale) == linear_rank(Energy(0.9), matrix) == 3


def test_energy_of_a_weight_that_is_not_finite() -> None:
    matrix = weight(24, 40)
    matrix[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"fc2.* 1 NaN or infinite of 960"):
        linear_rank(Energy(0.9), matrix, name="fc2")


def test_ints_and_fractions_read_no_values() -> None:
    assert tucker_ranks(0.5, torch.empty(64, 32, 3, 5, device="meta")) == (16, 32)
    assert cp_rank(9, torch.empty(64, 32, 3, 5, device="meta")) == 9
    with pytest.raises(ValueError, match="needs the values"):
        linear_rank(Energy(0.9), torch.empty(64, 32, device="meta"))
