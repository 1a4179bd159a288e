"""Factorized layers (Tucker-2, CP, SVD) as single fused ops for PyTorch."""

import lowrank_ops.ops.fakes
import lowrank_ops.ops.flops  # noqa: F401, gives FlopCounterMode its formulas
from lowrank_ops import former_names
from lowrank_ops.budget.knapsack import Budget
from lowrank_ops.compress.factorize import factorize_
from lowrank_ops.compress.fuse import fuse_
from lowrank_ops.compress.report import LayerReport, Report
from lowrank_ops.decompose.cp import cp_decompose
from lowrank_ops.decompose.ranks import VBMF, Energy
from lowrank_ops.decompose.svd import svd_decompose
from lowrank_ops.decompose.tucker import tucker_decompose
from lowrank_ops.deploy.export import export_onnx, to_chain
from lowrank_ops.deploy.prepare import Preparation, PreparedLayer, prepare_for_inference_, unprepare_
from lowrank_ops.deploy.saving import load, save
from lowrank_ops.fold.activations import fold_activations_
from lowrank_ops.fold.batchnorm import fold_batchnorm_, reestimate_batchnorm_
from lowrank_ops.fold.pairs import Fold, FoldReport
from lowrank_ops.nn.chains import NotOneOp
from lowrank_ops.nn.counts import count_layer_weights
from lowrank_ops.nn.decay import frobenius_decay, frobenius_norm_squared
from lowrank_ops.nn.init import Spectral
from lowrank_ops.nn.modules import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.ops import reference
from lowrank_ops.ops.explain import Explanation, explain
from lowrank_ops.ops.extension import build_info
from lowrank_ops.ops.functional import cp_conv2d, lowrank_linear, tucker_conv2d
from lowrank_ops.ops.measurements import forget_measurements, load_measurements, save_measurements
from lowrank_ops.ops.memory import kept_memory, release_memory
from lowrank_ops.ops.policy import policy, set_policy
from lowrank_ops.train.distill import DistillReport, distill_

former_names.keep()
__version__: str = build_info()["version"]

__all__ = [
    "VBMF",
    "Budget",
    "CPConv1d",
    "CPConv2d",
    "DistillReport",
    "Energy",
    "Explanation",
    "Fold",
    "FoldReport",
    "LayerReport",
    "LowRankLinear",
    "NotOneOp",
    "Preparation",
    "PreparedLayer",
    "Report",
    "Spectral",
    "TuckerConv1d",
    "TuckerConv2d",
    "build_info",
    "count_layer_weights",
    "cp_conv2d",
    "cp_decompose",
    "distill_",
    "explain",
    "export_onnx",
    "factorize_",
    "fold_activations_",
    "fold_batchnorm_",
    "forget_measurements",
    "frobenius_decay",
    "frobenius_norm_squared",
    "fuse_",
    "kept_memory",
    "load",
    "load_measurements",
    "lowrank_linear",
    "policy",
    "prepare_for_inference_",
    "reestimate_batchnorm_",
    "reference",
    "release_memory",
    "save",
    "save_measurements",
    "set_policy",
    "svd_decompose",
    "to_chain",
    "tucker_conv2d",
    "tucker_decompose",
    "unprepare_",
]
