"""Symmetric and triangular matrices of which the lower triangle is kept: half the memory, and half the sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_ops.linalg.singular import energy

# Columns of a panel. Half a square of them is kept besides a triangle, and one panel in fp64 where it is computed with.
BLOCK = 256


class Triangle:
    """The lower triangle of a matrix `[n, n]`, on the CPU.

    Attributes:
        panels: `BLOCK` columns each, the last one fewer, from their square on the diagonal down: `[n - start, BLOCK]`.
            The squares are whole: of a triangular matrix there are zeros above the diagonal.
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
        """Where the columns of each panel start and end, and the panel."""
        start = 0
        for panel in self.panels:
            yield start, start + panel.shape[1], panel
            start += panel.shape[1]

    def copies(self, like: Tensor, backwards: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """`blocks` in the dtype and on the device of a matrix, one after the other in the same memory; those that are
        no copies are the panels themselves."""
        blocks, first = [*self.blocks()], self.panels[0]
        same = (first.dtype, first.device) == (like.dtype, like.device)
        memory = like.new_empty(0 if same else first.numel())
        for start, end, panel in reversed(blocks) if backwards else blocks:
            yield start, end, panel if same else memory[: panel.numel()].view(panel.shape).copy_(panel)

    def widen_(self, dtype: torch.dtype) -> None:
        """To a dtype of higher precision."""
        for index, panel in enumerate(self.panels):
            self.panels[index] = panel.to(dtype)

    def any(self) -> bool:
        """Whether some entry is not zero."""
        return any(bool(panel.any()) for panel in self.panels)

    def diagonal(self) -> Tensor:
        """A copy, `[n]`."""
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
        """The sum of all squares of the symmetric matrix."""
        return sum(panel_energy(panel) for panel in self.panels)

    def times(self, vector: Tensor) -> Tensor:
        """The symmetric matrix times `[n]`."""
        result = torch.zeros_like(vector)
        for start, end, panel in self.blocks():
            result[start:] += panel @ vector[start:end]
            result[start:end] += panel[end - start :].T @ vector[end:]
        return result


def panel_energy(panel: Tensor) -> float:
    """What a panel gives to the sum of squares of a symmetric matrix: what lies below the diagonal's square counts
    twice."""
    width = panel.shape[1]
    return energy(panel[:width]) + 2 * energy(panel[width:])
