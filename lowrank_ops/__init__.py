"""Factorized layers (Tucker-2, CP, SVD) as single fused ops for PyTorch."""

from lowrank_ops import reference
from lowrank_ops._ops import build_info
from lowrank_ops.functional import cp_conv2d, lowrank_linear, tucker_conv2d
from lowrank_ops.planning import Explanation, explain, policy, set_policy

__version__: str = build_info()["version"]

__all__ = [
    "Explanation",
    "build_info",
    "cp_conv2d",
    "explain",
    "lowrank_linear",
    "policy",
    "reference",
    "set_policy",
    "tucker_conv2d",
]
