"""`Triangle`: symmetric and triangular matrices, stored as their lower triangle, which halves memory and additions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_ops.linalg.singular import energy

# Columns per panel. More columns cost memory: the upper half of each diagonal square, and panels copied to fp64.
BLOCK = 256


class Triangle:
    """The lower triangle of a matrix `[n, n]`, on the CPU.

    Attributes:
        panels: `BLOCK` columns each (the last one may have fewer), from the diagonal down: `[n - start, BLOCK]`. Each
            begins with a whole square on the diagonal; for a triangular matrix, its part above the diagonal is zero.
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        starts = range(0, width, BLOCK)
        self.panels = [torch.zeros(width - start, min(BLOCK, width - start), dtype=dtype) for start in starts]

    def __len__(self) -> int:
        return len(self.panels[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.panels[0].dtype

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, end, panel) of each panel: its columns are `start` to `end - 1` of the matrix."""
        start = 0
        for panel in self.panels:
            yield start, start + panel.shape[1], panel
            start += panel.shape[1]

    def copies(self, like: Tensor, backwards: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """`blocks` with panels in the dtype and on the device of `like`. All copies use the same memory, so each is
        valid until the next one; if nothing has to be copied, the panels themselves are given."""
        blocks, first = [*self.blocks()], self.panels[0]
        same = (first.dtype, first.device) == (like.dtype, like.device)
        memory = like.new_empty(0 if same else first.numel())
        for start, end, panel in reversed(blocks) if backwards else blocks:
            yield start, end, panel if same else memory[: panel.numel()].view(panel.shape).copy_(panel)

    def widen_(self, dtype: torch.dtype) -> None:
        """Converts the panels to a dtype of higher precision."""
        for index, panel in enumerate(self.panels):
            self.panels[index] = panel.to(dtype)

    def any(self) -> bool:
        """Whether any element is not zero."""
        return any(bool(panel.any()) for panel in self.panels)

    def diagonal(self) -> Tensor:
        """A copy of the diagonal, `[n]`."""
        return torch.cat([panel.diagonal() for panel in self.panels])

    def mul_(self, factor: float) -> Triangle:
        for panel in self.panels:
            panel.mul_(factor)
        return self

    def add_to_diagonal_(self, value: float) -> Triangle:
        for panel in self.panels:
            panel.diagonal().add_(value)
        return self

    def add_outer_(self, vector: Tensor, sign: int) -> Triangle:
        """Adds `sign vector vector^T`."""
        for start, end, panel in self.blocks():
            panel.addr_(vector[start:], vector[start:end], alpha=sign)
        return self

    def energy(self) -> float:
        """The sum of squares of all elements of the symmetric matrix."""
        return sum(panel_energy(panel) for panel in self.panels)

    def times(self, vector: Tensor) -> Tensor:
        """The symmetric matrix times a vector `[n]`."""
        result = torch.zeros_like(vector)
        for start, end, panel in self.blocks():
            result[start:] += panel @ vector[start:end]
            result[start:end] += panel[end - start :].T @ vector[end:]
        return result


def panel_energy(panel: Tensor) -> float:
    """The sum of squares that a panel contributes to a symmetric matrix: elements below the diagonal square count
    twice, once for their mirror images."""
    width = panel.shape[1]
    return energy(panel[:width]) + 2 * energy(panel[width:])
