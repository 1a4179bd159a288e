"""Weights in the metric of their layer's moments. A decomposition there keeps the layer's output, not the weight.

C is the moment of the input and G that of the output's gradient. A change D of the weight changes the model's output by
about `tr(G D C D^T)`, the squared Frobenius norm of `G^(1/2) D C^(1/2)` (the Kronecker-factored curvature of Martens &
Grosse, arXiv:1503.05671, section 3, with the output's own metric in place of the loss; all taps of a window share C).
So the weight is multiplied by both roots, decomposed by any method, and the outer factors are divided by the roots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ops.calibrate.moments import Moments
from lowrank_ops.linalg.roots import Root
from lowrank_ops.linalg.singular import computing_device
from lowrank_ops.runtime.autocast import no_autocast

COLUMNS = 512  # columns of a weight that are copied to fp64 at a time


@dataclass(frozen=True)
class Whitening:
    """Roots of a layer's moments, of `[S, S]` and `[T, T]`."""

    input: Root
    gradient: Root

    @classmethod
    def of_(cls, moments: Moments) -> Whitening:
        """The roots, in the memory of the moments."""
        return cls(Root.of_(moments.input), Root.of_(moments.gradient))

    @no_autocast()
    def apply(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """`G^(1/2) W C^(1/2)` of a weight W `[T, S, ...]`, in its shape and in `dtype`, computed in fp64."""
        columns = weight.detach().to(computing_device(weight), dtype, copy=True).flatten(1)
        _apply_(self.gradient, columns)
        rows = columns.unflatten(1, weight.shape[1:]).transpose(0, 1).flatten(1)  # [S, T ...]; no copy for a matrix
        _apply_(self.input, rows)
        return rows.unflatten(1, (weight.shape[0], *weight.shape[2:])).transpose(0, 1).contiguous()

    @no_autocast()
    def undo(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors of the weight, fp64, from those of the whitened weight."""
        result = {name: factor.detach().to(torch.float64, copy=True) for name, factor in factors.items()}
        result["in_factor"] = self.input.undo_(result["in_factor"].T).T
        result["out_factor"] = self.gradient.undo_(result["out_factor"])
        return result


def _apply_(root: Root, matrix: Tensor) -> None:
    """Applies a root to `[n, m]` in its memory, computed in fp64: a matrix of another dtype in parts of its columns."""
    for columns in (matrix,) if matrix.dtype == torch.float64 else matrix.split(COLUMNS, dim=1):
        columns.copy_(root.apply_(columns.double()))
