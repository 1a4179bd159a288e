"""The number of singular values above the noise, by empirical variational Bayesian matrix factorization (EVBMF).

Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14 (2013), model a matrix `[L, M]`, L <= M, as a product `B A^T` plus white noise of variance s.
With priors and s estimated from the matrix itself (empirical Bayes), the global minimum of the free energy keeps the
components with a singular value above `sqrt(M s x0)`,

    x0 = (1 + t0) (1 + a / t0),   a = L / M,   t0 the zero of  f(t) + f(t / a),   f(z) = log(z + 1) / z - 1/2,

and s minimizes the sum of psi(g / (M s)) over all squared singular values g, where

    psi(x) = x - log x + (x > x0) (log(t + 1) + a log(t / a + 1) - t),   t = (c + sqrt(c^2 - 4 a)) / 2,   c = x - 1 - a.

That function of s can have several minima. It is smooth except for kinks where a component crosses the threshold, and
changes little within a few percent of s. So it is evaluated on a grid with steps of 2 %, and refined around the best s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP = 0.02  # of the grid, in the logarithm of the noise variance
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
    # Each minimum keeps fewer than ceil(L / (1 + a)) components, which bounds the noise from below.
    kept = math.ceil(rows / (1 + ratio)) - 1
    low = math.log(max(float(descending[kept]) / threshold, float(descending[kept:].mean())))
    high = math.log(float(descending.mean()))

    def free_energy(noise: Tensor) -> Tensor:
        """The free energy for each logarithm of a noise variance, up to a constant."""
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
    """psi(x) + log x for each x; -log x is log s up to a constant."""
    centred = (ratios - 1 - ratio).clamp(min=2 * ratio**0.5)  # changes no x above the threshold
    t = (centred + (centred.square() - 4 * ratio).clamp(min=0).sqrt()) / 2
    return ratios + torch.where(ratios > threshold, (t + 1).log() + ratio * (t / ratio + 1).log() - t, 0.0)


def _threshold(ratio: float) -> float:
    """x0, with t0 found by bisection. t0 is about `2.513 sqrt(a)`, and lies between `2.513 a` and 2.513: f falls, and
    2.513 is its zero."""

    def slope(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 2.5 * ratio, 2.6
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if slope(middle) + slope(middle / ratio) > 0 else (low, middle)
    return (1 + high) * (1 + ratio / high)
