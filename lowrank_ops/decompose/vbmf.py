"""How many singular values stand out of the noise: empirical variational Bayesian matrix factorization (EVBMF).

Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14 (2013): a matrix `[L, M]`, L <= M, is taken for a product `B A^T` plus white noise of
variance s. With priors and s estimated from the matrix itself (empirical Bayes), the free energy's global minimum keeps
the components of singular value above `sqrt(M s x0)`,

    x0 = (1 + t0) (1 + a / t0),   a = L / M,   t0 the zero of  f(t) + f(t / a),   f(z) = log(z + 1) / z - 1/2,

and s minimizes the sum of psi(g / (M s)) over all squared singular values g, where

    psi(x) = x - log x + (x > x0) (log(t + 1) + a log(t / a + 1) - t),   t = (c + sqrt(c^2 - 4 a)) / 2,   c = x - 1 - a.

That function of s has several minima. It is smooth but for kinks where a component crosses the threshold, and varies
over factors of s that are not near 1: the grid below takes steps of 2 %, and refines the best one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP = 0.02  # of the logarithm of the noise variance
GOLDEN = (5**0.5 - 1) / 2


def components_above_noise(energies: Tensor, columns: int) -> int:
    """The rank of the global solution of EVBMF, possibly 0, with an estimated noise variance.

    Args:
        energies: the squared singular values of a matrix `[L, M]`, L <= M: `[L]`, fp64, positive, any order.
        columns: M.
    """
    rows = len(energies)
    ratio = rows / columns
    threshold = _threshold(ratio)
    descending = energies.sort(descending=True).values / columns
    # No minimum keeps as many components as ceil(L / (1 + a)): the noise is at least what that leaves.
    kept = math.ceil(rows / (1 + ratio)) - 1
    low = math.log(max(float(descending[kept]) / threshold, float(descending[kept:].mean())))
    high = math.log(float(descending.mean()))

    def free_energy(noise: Tensor) -> Tensor:
        """For each logarithm of a noise variance, up to a constant."""
        return _terms(descending / noise.exp()[:, None], ratio, threshold).sum(1) + rows * noise

    grid = torch.linspace(low, high, max(math.ceil((high - low) / STEP), 1) + 1, dtype=torch.float64)
    values = torch.cat([free_energy(part) for part in grid.split(64)])  # 64 rows of L numbers at a time
    best = int(values.argmin())
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    while right - left > 1e-9:
        inner = torch.tensor([right - GOLDEN * (right - left), left + GOLDEN * (right - left)], dtype=torch.float64)
        first, second = free_energy(inner)
        left, right = (left, float(inner[1])) if first <= second else (float(inner[0]), right)
    return int((descending > threshold * math.exp((left + right) / 2)).sum())


def _terms(ratios: Tensor, ratio: float, threshold: float) -> Tensor:
    """psi of each x, without its -log x, which is log s up to a constant."""
    centred = (ratios - 1 - ratio).clamp(min=2 * ratio**0.5)  # beyond the threshold this changes nothing
    t = (centred + (centred.square() - 4 * ratio).clamp(min=0).sqrt()) / 2
    return ratios + torch.where(ratios > threshold, (t + 1).log() + ratio * (t / ratio + 1).log() - t, 0.0)


def _threshold(ratio: float) -> float:
    """x0, with t0 by bisection. It is about `2.513 sqrt(a)`: f falls, and `t0 <= 2.513 <= t0 / a` is its zero."""

    def slope(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 2.5 * ratio, 2.6
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if slope(middle) + slope(middle / ratio) > 0 else (low, middle)
    return (1 + high) * (1 + ratio / high)
