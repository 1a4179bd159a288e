"""Error-preserving correction of a CP decomposition: the least sensitive factors of no larger error.

Where terms cancel each other, they can change much while their sum changes little. ALS may therefore end at any of many
decompositions of the same error, in some of which the terms' norms are many times the tensor's. Phan et al.,
arXiv:2008.05441, section 3, propose to look for the least sensitive of them. Here the problem is

    minimize   S = sum_n I_n sum_r prod_(m != n) |u_mr|^2     subject to   |W - sum_r u_1r o ... o u_Nr|^2 <= d^2

with u_nr the r-th column of the factor U_n, which has I_n rows, and d the error that ALS has reached. S is, to first
order, the expected squared change of the tensor by noise of variance 1 in every element: noise E in U_n adds E Z^T to
the unfolding, with Z the Khatri-Rao product of the other factors, and E |E Z^T|^2 = I_n |Z|^2.

The factors are updated one at a time. With G = Z^T Z, M = W_(n) Z and the diagonal
D_r = sum_(m != n) I_m prod_(k != m, n) |u_kr|^2, the part of S that depends on U_n is tr(U_n D U_n^T), and the squared
error is |W|^2 - 2 tr(U_n^T M) + tr(U_n G U_n^T). With the multiplier v of the constraint, the solution is
U_n = M (G + v D)^-1: a Tikhonov regularization, whose error grows with v from that of least squares to |W|. So v is
chosen for an error of d. With D^-1/2 G D^-1/2 = V diag(l) V^T and P = M D^-1/2 V

    U_n = P diag(1 / (l + v)) V^T D^-1/2   and   squared error = |W|^2 - sum_k |P_k|^2 (l_k + 2 v) / (l_k + v)^2.

Between updates the columns of a term are scaled to |u_nr|^2 ~ I_n, the scaling of least S (inequality of arithmetic and
geometric means). All summands of D_r are then equal, and D_r is |term r|^(2 - 4 / N) times a constant, which v absorbs.
Where no update improves S, the multipliers of all factors agree, so such a point is stationary for all factors
together.

Each sweep starts from factors extrapolated beyond the end of the last one, as in accelerated gradient methods, and
without momentum after a sweep that failed (adaptive restart: O'Donoghue & Candes, Found. Comput. Math. 15 (2015)). For
terms 80 times too long, this takes a third of the sweeps that it would take without momentum. A sweep that does not
lower S, or ends with an error above d, is undone, so that the sweeps can stop at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from tensorly.cp_tensor import CPTensor
from torch import Tensor

from lowrank_ops.decompose.arithmetic import relative_error, unfolding_dot_khatri_rao

# Below this error its square, a difference of numbers near 1 in fp64, is not known to three digits.
LEAST_ERROR = 1e-6

# The corrected error may exceed the bound by this fraction, for rounding.
MARGIN = 1e-6

# The sweeps end when one lowers the sensitivity by less than this fraction.
TOLERANCE = 1e-3


def correct(
    tensor: Tensor, factors: list[Tensor], sweeps: int, progress: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """Factors of lower sensitivity and, except for `MARGIN`, no larger error; the given ones if none are found.

    Args:
        tensor: of norm 1, fp64.
        factors: `[I_n, R]` in fp64, one per axis of the tensor.
        sweeps: largest number of sweeps over all factors.
        progress: called after each sweep.
    """
    factors = balanced(factors)
    least = expected_change(factors)
    bound = approximation_error(tensor, factors) if sweeps else 1.0
    if not LEAST_ERROR <= bound < 1:
        return factors
    previous, age = factors, 0
    for _ in range(sweeps):
        momentum = age / (age + 3)
        moved = balanced([new + momentum * (new - old) for new, old in zip(factors, previous, strict=True)])
        for mode in range(tensor.ndim):
            moved[mode] = _least_sensitive(tensor, moved, mode, bound)
            moved = balanced(moved)
        progress()
        found = expected_change(moved)
        if found < least and approximation_error(tensor, moved) <= bound * (1 + MARGIN):
            gain, least = 1 - found / least, found
            previous, factors, age = factors, moved, age + 1
            if gain < TOLERANCE:
                break
        elif age:
            previous, age = factors, 0
        else:
            break
    return factors


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same terms, scaled so that within a term the columns of all factors have the same mean square."""
    roots = [len(factor) ** 0.5 for factor in factors]
    shared = (strengths(factors) / math.prod(roots)) ** (1 / len(factors))
    norms = (factor.norm(dim=0) for factor in factors)
    return [
        torch.where(norm > 0, factor * (root * shared / norm), 0.0)
        for factor, root, norm in zip(factors, roots, norms, strict=True)
    ]


def strengths(factors: Sequence[Tensor]) -> Tensor:
    """The norms of the terms, `[R]`."""
    return torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)


def expected_change(factors: Sequence[Tensor]) -> float:
    """S of this module's docstring: `E |W' - W|^2` to first order, for noise of variance 1 in the factors."""
    energies = [factor.square().sum(0) for factor in factors]
    return sum(len(factor) * float(_product(energies, mode).sum()) for mode, factor in enumerate(factors))


def approximation_error(weight: Tensor, factors: Sequence[Tensor]) -> float:
    """`|W - W'|_F / |W|_F` of factors `[T, R]`, `[S, R]`, `[KH, R]`, `[KW, R]`, by the definition."""
    out, inner, height, width = factors
    return relative_error(weight, out, lambda columns: torch.einsum("rs,ir,jr->rsij", columns, height, width), inner.T)


def _least_sensitive(tensor: Tensor, factors: Sequence[Tensor], mode: int, bound: float) -> Tensor:
    """The factor of `mode` with the least S and an error of at most `bound`; the present factor if there is none.

    `factors` must be balanced.
    """
    cost = strengths(factors) ** (2 - 4 / len(factors))
    # A term of norm 0 costs nothing and stays 0.
    scale = cost.clamp(min=float(cost.max()) * torch.finfo(cost.dtype).eps).rsqrt()
    gram = _product([factor.T @ factor for factor in factors], mode)
    values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    values = values.clamp(min=0)
    moments = unfolding_dot_khatri_rao(tensor, CPTensor((torch.ones_like(cost), list(factors))), mode)
    rotated = (moments * scale) @ vectors
    multiplier = _multiplier(values.cpu(), rotated.square().sum(0).cpu(), float(tensor.square().sum()), bound**2)
    if multiplier is None:
        return factors[mode]
    return (rotated / (values + multiplier)) @ vectors.T * scale


def _multiplier(values: Tensor, energies: Tensor, total: float, bound: float) -> float | None:
    """The largest v with `total - sum energies (values + 2 v) / (values + v)^2 <= bound`, found by ever finer grids.

    The left side grows with v. None if it exceeds the bound at the smallest v that rounding distinguishes from 0.
    """

    def allowed(multipliers: Tensor) -> int:
        shifted = values + multipliers[:, None]
        errors = total - (energies * (shifted + multipliers[:, None]) / shifted.square()).sum(1)
        return int((errors <= bound).sum())

    low = float(values[-1]) * torch.finfo(values.dtype).eps
    high = 2 * float(energies.sum()) / (total - bound)  # (l + 2 v) / (l + v)^2 <= 2 / v: above the bound from there on
    if not 0 < low < high:
        return None
    ends = torch.tensor([low, high], dtype=torch.float64).log()
    while ends[1] - ends[0] > 1e-9:
        grid = torch.linspace(float(ends[0]), float(ends[1]), 64, dtype=torch.float64)
        below = allowed(grid.exp())
        if below == 0:
            return None
        ends = grid[below - 1 : below + 1] if below < len(grid) else grid[-1:].expand(2)
    return math.exp(float(ends[0]))


def _product(parts: Sequence[Tensor], left_out: int) -> Tensor:
    """The elementwise product of all parts but one."""
    return torch.stack([part for index, part in enumerate(parts) if index != left_out]).prod(0)
