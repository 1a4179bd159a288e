"""Factorized layers (Tucker-2, CP, SVD) as single fused ops for PyTorch."""

from lowrank_ops import reference
from lowrank_ops._ops import build_info
from lowrank_ops.chains import NotOneOp
from lowrank_ops.decompose import cp_decompose, svd_decompose, tucker_decompose
from lowrank_ops.factorize import factorize_, fuse_
from lowrank_ops.functional import cp_conv2d, lowrank_linear, tucker_conv2d
from lowrank_ops.measurements import load_measurements, save_measurements
from lowrank_ops.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.planning import Explanation, explain, policy, set_policy
from lowrank_ops.prepare import Preparation, PreparedLayer, prepare_for_inference_, unprepare_
from lowrank_ops.ranks import Energy
from lowrank_ops.report import LayerReport, Report

__version__: str = build_info()["version"]

__all__ = [
    "CPConv1d",
    "CPConv2d",
    "Energy",
    "Explanation",
    "LayerReport",
    "LowRankLinear",
    "NotOneOp",
    "Preparation",
    "PreparedLayer",
    "Report",
    "TuckerConv1d",
    "TuckerConv2d",
    "build_info",
    "cp_conv2d",
    "cp_decompose",
    "explain",
    "factorize_",
    "fuse_",
    "load_measurements",
    "lowrank_linear",
    "policy",
    "prepare_for_inference_",
    "reference",
    "save_measurements",
    "set_policy",
    "svd_decompose",
    "tucker_conv2d",
    "tucker_decompose",
    "unprepare_",
]
