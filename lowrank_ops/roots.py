"""Square roots of second moments, by which weights are whitened: triangular ones, far cheaper than symmetric ones.

Any L with `L L^T = C` gives the same metric, `tr(D C D^T) = |D L|^2`. The Cholesky factor takes `n^3 / 3` operations
where all eigenvectors, which the symmetric root needs, take some `9 n^3`, and is inverted by substitution. It has the
moment's dtype, fp32 for an fp32 model. `apply` and `undo` compute in fp64 with the same matrix, so they cancel; they
take it in blocks of columns, from the diagonal down, so that no fp64 copy of all of it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.autocast import no_autocast
from lowrank_ops.singular import computing_device

# What is added to a moment, as a share of its largest eigenvalue: dividing by directions that carry less would amplify
# noise, and data that calibration did not show may use them.
DAMPING = 1e-4
# Columns of the factor that are computed with at a time.
BLOCK = 1024
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
        matrix = matrix.to(computing_device(matrix)).double()
        if self.factor.dim() == 1:
            return self.factor.to(matrix)[:, None] * matrix
        result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for start, columns in self._blocks(matrix):
            torch.matmul(columns.T, matrix[start:], out=result[start : start + BLOCK])
        return result

    def undo(self, matrix: Tensor) -> Tensor:
        """The inverse of `apply`: `[n, m]`, fp64."""
        matrix = matrix.to(computing_device(matrix)).double()
        if self.factor.dim() == 1:
            return matrix / self.factor.to(matrix)[:, None]
        result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for start, columns in self._blocks(matrix, backwards=True):
            end = start + columns.shape[1]
            right = matrix[start:end] - columns[end - start :].T @ result[end:]
            result[start:end] = torch.linalg.solve_triangular(columns[: end - start].T, right, upper=True)
        return result

    def _blocks(self, matrix: Tensor, backwards: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The factor's columns beside the matrix, `BLOCK` at a time: where they start, and their rows from there on."""
        starts = range(0, len(self.factor), BLOCK)
        for start in reversed(starts) if backwards else starts:
            yield start, self.factor[start:, start : start + BLOCK].to(matrix)


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
