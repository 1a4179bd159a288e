"""Square roots of second moments, by which weights are whitened: triangular ones, far cheaper than symmetric ones.

Any L with `L L^T = C` gives the same metric, `tr(D C D^T) = |D L|^2`. The Cholesky factor takes `n^3 / 3` operations
where all eigenvectors, which the symmetric root needs, take some `9 n^3`, and is inverted by substitution. It has the
moment's dtype, fp32 for an fp32 model. `apply` and `undo` compute in fp64 with the same matrix, so they cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.autocast import no_autocast
from lowrank_ops.singular import computing_device

# What is added to a moment, as a share of its largest eigenvalue: dividing by directions that carry less would amplify
# noise, and data that calibration did not show may use them.
DAMPING = 1e-4
_POWERS = 30  # to estimate the largest eigenvalue, a few percent below it at worst


@dataclass(frozen=True)
class Root:
    """A root of a damped moment M, `[n, n]`, or of a diagonal one.

    Attributes:
        factor: lower triangular, `[n, n]`, with `factor factor^T = M`; or `[n]`, the roots of M's diagonal.
    """

    factor: Tensor

    @classmethod
    @no_autocast()
    def of(cls, moment: Tensor) -> Root:
        """Of a positive semidefinite matrix `[n, n]` or of a diagonal `[n]`, in its dtype, computed in fp64; all ones
        for one of zeros."""
        dtype = moment.dtype
        if not bool(moment.any()):
            return cls(torch.ones(len(moment), dtype=dtype))
        if moment.dim() == 1:
            moment = moment.double()
            return cls((moment + DAMPING * float(moment.max())).sqrt().to(dtype))
        damped = moment.to(torch.float64, copy=True)
        damping = share = DAMPING * _largest_eigenvalue(damped)
        while True:
            damped.diagonal().add_(damping)
            factor = cholesky_(damped)
            if factor is not None:
                return cls(factor.to(dtype))
            share *= 10  # sums of low precision, of which an eigenvalue is far below zero
            damping += share
            damped.copy_(moment)

    def apply(self, matrix: Tensor) -> Tensor:
        """`factor^T matrix`, whose plain squares are the moment's: `[n, m]`, fp64, where the matrix is."""
        factor, matrix = self._beside(matrix)
        return factor[:, None] * matrix if factor.dim() == 1 else factor.T @ matrix

    def undo(self, matrix: Tensor) -> Tensor:
        """The inverse of `apply`: `[n, m]`, fp64."""
        factor, matrix = self._beside(matrix)
        if factor.dim() == 1:
            return matrix / factor[:, None]
        return torch.linalg.solve_triangular(factor.T, matrix, upper=True)

    def _beside(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and matrix in fp64 on one device."""
        device = computing_device(matrix)
        return self.factor.to(device).double(), matrix.to(device).double()


def cholesky_(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, in its memory; None where it is not positive definite, and its
    values are lost. A copy of `[8192, 8192]` in fp64 would take half a gigabyte."""
    factor = matrix.mT  # columns lie together, as LAPACK has them
    _, failed = torch.linalg.cholesky_ex(factor, out=(factor, torch.empty((), dtype=torch.int32, device=matrix.device)))
    return None if bool(failed) else factor


def _largest_eigenvalue(moment: Tensor) -> float:
    """From below, by the power method from the column of the largest diagonal entry."""
    vector = moment[:, int(moment.diagonal().argmax())]
    for _ in range(_POWERS):
        vector = moment @ (vector / vector.norm())
    return float(vector.norm())
