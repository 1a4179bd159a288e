"""All factorized layers under one name: `from lowrank_ops.nn.modules import TuckerConv2d`.

Pickles of modules made before the layers had files of their own name this module.
"""

from lowrank_ops.nn.cp import CPConv1d, CPConv2d
from lowrank_ops.nn.linear import LowRankLinear
from lowrank_ops.nn.tucker import TuckerConv1d, TuckerConv2d

__all__ = ["CPConv1d", "CPConv2d", "LowRankLinear", "TuckerConv1d", "TuckerConv2d"]
