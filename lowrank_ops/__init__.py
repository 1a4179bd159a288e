"""Factorized layers (Tucker-2, CP, SVD) as single fused ops for PyTorch."""

from lowrank_ops import reference
from lowrank_ops._ops import build_info
from lowrank_ops.functional import cp_conv2d, lowrank_linear, tucker_conv2d

__version__: str = build_info()["version"]

__all__ = ["build_info", "cp_conv2d", "lowrank_linear", "reference", "tucker_conv2d"]
