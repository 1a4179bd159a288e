"""Square roots of second moments, by which weights are whitened: triangular ones, far cheaper than symmetric ones.

Any L with `L L^T = C` gives the same metric, `tr(D C D^T) = |D L|^2`. The Cholesky factor takes `n^3 / 3` operations
where all eigenvectors, which the symmetric root needs, take some `9 n^3`, and is inverted by substitution. It takes the
moment's place in memory and has its dtype, fp32 for an fp32 model, and of both only the lower triangle is kept: of an
[8192, 8192] moment an eighth of a gigabyte. `apply` and `undo` compute with the same matrix, so they cancel. All work
is done in panels of columns, so that only one has a copy in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.linalg.singular import computing_device, energy
from lowrank_ops.linalg.triangle import Triangle
from lowrank_ops.runtime.autocast import no_autocast

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

    factor: Triangle | Tensor

    @classmethod
    @no_autocast()
    def of_(cls, moment: Triangle | Tensor) -> Root:
        """Of a positive semidefinite matrix `[n, n]` or of a diagonal `[n]`, whose memory it takes; all ones for one of
        zeros."""
        if not bool(moment.any()):
            return cls(torch.ones(len(moment), dtype=moment.dtype))
        if isinstance(moment, Tensor):
            return cls(moment.add_(DAMPING * float(moment.max())).sqrt_())
        _damped_cholesky_(moment, DAMPING * _largest_eigenvalue(moment))
        return cls(moment)

    def apply(self, matrix: Tensor) -> Tensor:
        """`factor^T matrix`, whose plain squares are the moment's: `[n, m]`, in the matrix' dtype, where it is."""
        return self.apply_(_copy(matrix))

    def apply_(self, matrix: Tensor) -> Tensor:
        """`apply` in the matrix' memory."""
        if isinstance(self.factor, Tensor):
            return matrix.mul_(self.factor.to(matrix)[:, None])
        for start, end, panel in self.factor.copies(matrix):
            matrix[start:end] = panel.T @ matrix[start:]
        return matrix

    def undo(self, matrix: Tensor) -> Tensor:
        """The inverse of `apply`: `[n, m]`, in the matrix' dtype."""
        return self.undo_(_copy(matrix))

    def undo_(self, matrix: Tensor) -> Tensor:
        """`undo` in the matrix' memory."""
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
        """`times` in the matrix' memory."""
        if isinstance(self.factor, Tensor):
            return matrix.mul_(self.factor.to(matrix)[:, None])
        for start, end, panel in self.factor.copies(matrix, backwards=True):
            rows = matrix[start:end].clone()
            matrix[start:end] = 0
            matrix[start:].addmm_(panel, rows)
        return matrix


def _copy(matrix: Tensor) -> Tensor:
    """A copy to compute with, where the matrix is if that device has fp64."""
    return matrix.to(computing_device(matrix), copy=True, memory_format=torch.contiguous_format)


def _damped_cholesky_(moment: Triangle, damping: float) -> None:
    """The lower Cholesky factor of `moment + damping I` in its place, zeros above the diagonal.

    Blocks on the diagonal are factored in fp64. Where one is not positive definite all the same (sums of low precision
    may have eigenvalues far below zero), it gets more damping: the result is the factor of a moment with that addition.
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
    """The lower Cholesky factor of a symmetric block plus `damping I`, or ten, a hundred ... times as much."""
    while True:
        damped = block.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return factor
        damping *= 10


def cholesky_(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, in its memory; None where it is not positive definite, and its
    values are lost. A copy of `[8192, 8192]` in fp64 would take half a gigabyte."""
    factor = matrix.mT  # columns lie together, as LAPACK has them
    _, failed = torch.linalg.cholesky_ex(factor, out=(factor, torch.empty((), dtype=torch.int32, device=matrix.device)))
    return None if bool(failed) else factor


def _largest_eigenvalue(moment: Triangle) -> float:
    """From below, by the power method from the column of the largest diagonal entry."""
    vector = torch.zeros(len(moment), dtype=moment.dtype)
    vector[int(moment.diagonal().argmax())] = 1
    image = moment.times(vector)
    for _ in range(_POWERS):
        vector = image / image.abs().max()
        image = moment.times(vector)
    return (energy(image) / energy(vector)) ** 0.5
