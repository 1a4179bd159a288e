"""Whole matrices and the triangles that stand for them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_ops.calibrate.moments import Moments
from lowrank_ops.linalg.triangle import Triangle


def triangle_of(matrix: Tensor) -> Triangle:
    """The lower triangle of a symmetric matrix, copied."""
    found = Triangle(len(matrix), matrix.dtype)
    for start, end, panel in found.blocks():
        panel.copy_(matrix[start:, start:end])
    return found


def lower(found: Triangle | Tensor) -> Tensor:
    """The lower triangular matrix, `[n, n]`."""
    assert isinstance(found, Triangle)
    whole = torch.zeros(len(found), len(found), dtype=found.dtype)
    for start, end, panel in found.blocks():
        whole[start:, start:end] = panel
    return whole.tril()


def symmetric(found: Triangle | Tensor) -> Tensor:
    """The symmetric matrix, `[n, n]`."""
    half = lower(found)
    return half + half.tril(-1).T


def moments_of(input: Tensor, gradient: Tensor) -> Moments:
    """Moments of two symmetric matrices."""
    return Moments(triangle_of(input), triangle_of(gradient))
