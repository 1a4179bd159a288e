"""Square roots of second moments, by which weights are whitened: Cholesky factors, far cheaper than symmetric roots.

Any L with `L L^T = C` gives the same metric, `tr(D C D^T) = |D L|^2`. The Cholesky factor takes `n^3 / 3` operations
and is inverted by substitution; a symmetric root needs all eigenvectors, some `9 n^3` operations. The factor overwrites
the moment and has its dtype (fp32 for an fp32 model). Both are stored as lower triangles: an eighth of a gigabyte for
an [8192, 8192] moment. `apply` and `undo` compute with the same matrix, so they are inverse to each other. Work
proceeds in panels of columns, so that only one panel at a time is copied to fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.linalg.singular import computing_device, energy
from lowrank_ops.linalg.triangle import Triangle
from lowrank_ops.runtime.autocast import no_autocast

# Added to a moment's diagonal, as a fraction of its largest eigenvalue. Dividing by smaller eigenvalues would amplify
# noise in directions that data outside of the calibration set may use.
DAMPING = 1e-4
_POWERS = 30  # power iterations for the largest eigenvalue: the estimate is at worst a few percent too low


@dataclass(frozen=True)
class Root:
    """A root of a damped moment M, `[n, n]`, or of a diagonal one.

    Attributes:
        factor: lower triangular, `[n, n]`, with `factor factor^T = M`; or `[n]`, the roots of M's diagonal.
    """

    factor: Triangle | Tensor

    @classmethod
    @no_autocast()
    def of_(cls, moment: Triangle | Tensor) -> Root:
        """The root of a positive semidefinite matrix `[n, n]`, or of a diagonal `[n]`, which it overwrites. For a
        moment of zeros it is the identity."""
        if not bool(moment.any()):
            return cls(torch.ones(len(moment), dtype=moment.dtype))
        if isinstance(moment, Tensor):
            return cls(moment.add_(DAMPING * float(moment.max())).sqrt_())
        _damped_cholesky_(moment, DAMPING * _largest_eigenvalue(moment))
        return cls(moment)

    def apply(self, matrix: Tensor) -> Tensor:
        """`factor^T matrix`, `[n, m]`, in the matrix' dtype. Its sum of squares is `tr(matrix^T M matrix)`."""
        return self.apply_(_copy(matrix))

    def apply_(self, matrix: Tensor) -> Tensor:
        """`apply`, overwriting the matrix."""
        if isinstance(self.factor, Tensor):
            return matrix.mul_(self.factor.to(matrix)[:, None])
        for start, end, panel in self.factor.copies(matrix):
            matrix[start:end] = panel.T @ matrix[start:]
        return matrix

    def undo(self, matrix: Tensor) -> Tensor:
        """The inverse of `apply`: `[n, m]`, in the matrix' dtype."""
        return self.undo_(_copy(matrix))

    def undo_(self, matrix: Tensor) -> Tensor:
        """`undo`, overwriting the matrix."""
        if isinstance(self.factor, Tensor):
            return matrix.div_(self.factor.to(matrix)[:, None])
        for start, end, panel in self.factor.copies(matrix, backwards=True):
            right = matrix[start:end] - panel[end - start :].T @ matrix[end:]
            matrix[start:end] = torch.linalg.solve_triangular(panel[: end - start].T, right, upper=True)
        return matrix

    def times(self, matrix: Tensor) -> Tensor:
        """`factor matrix`: `[n, m]`, in the matrix' dtype."""
        return self.times_(_copy(matrix))

    def times_(self, matrix: Tensor) -> Tensor:
        """`times`, overwriting the matrix."""
        if isinstance(self.factor, Tensor):
            return matrix.mul_(self.factor.to(matrix)[:, None])
        for start, end, panel in self.factor.copies(matrix, backwards=True):
            rows = matrix[start:end].clone()
            matrix[start:end] = 0
            matrix[start:].addmm_(panel, rows)
        return matrix


def _copy(matrix: Tensor) -> Tensor:
    """A contiguous copy on `computing_device`."""
    return matrix.to(computing_device(matrix), copy=True, memory_format=torch.contiguous_format)


def _damped_cholesky_(moment: Triangle, damping: float) -> None:
    """Overwrites the moment with the lower Cholesky factor of `moment + damping I`, zeros above the diagonal.

    Blocks on the diagonal are factored in fp64. A block that is not positive definite (sums in low precision can have
    eigenvalues far below zero) gets more damping; the result is then the factor of the moment with that addition.
    """
    for index, panel in enumerate(moment.panels):
        width = panel.shape[1]
        factor = _damped_factor(panel[:width].double(), damping)
        panel[:width] = factor
        below = panel[width:]
        for rows in below.split(width):
            rows.copy_(torch.linalg.solve_triangular(factor.T, rows.double(), upper=True, left=False))
        for later in moment.panels[index + 1 :]:
            later.addmm_(below, below[: later.shape[1]].T, alpha=-1)
            below = below[later.shape[1] :]


def _damped_factor(block: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of a symmetric block plus `damping I`; where that fails, plus 10, 100, ... times as
    much."""
    while True:
        damped = block.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return factor
        damping *= 10


def cholesky_(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, which it overwrites; None if the matrix is not positive
    definite, and then its values are lost. (A copy of `[8192, 8192]` in fp64 would take half a gigabyte.)"""
    factor = matrix.mT  # stored column by column, as LAPACK expects
    _, failed = torch.linalg.cholesky_ex(factor, out=(factor, torch.empty((), dtype=torch.int32, device=matrix.device)))
    return None if bool(failed) else factor


def _largest_eigenvalue(moment: Triangle) -> float:
    """A lower estimate of the largest eigenvalue, by the power method from the column with the largest diagonal
    element."""
    vector = torch.zeros(len(moment), dtype=moment.dtype)
    vector[int(moment.diagonal().argmax())] = 1
    image = moment.times(vector)
    for _ in range(_POWERS):
        vector = image / image.abs().max()
        image = moment.times(vector)
    return (energy(image) / energy(vector)) ** 0.5
