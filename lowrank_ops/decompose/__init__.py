"""Decompositions of a weight into factors (Tucker-2, CP, SVD), and the rules that choose ranks.

May import: runtime, text, ops, model, linalg.
"""

from lowrank_ops.decompose.svd import LinearFactors
from lowrank_ops.decompose.tucker import TuckerFactors

__all__ = ["LinearFactors", "TuckerFactors"]  # pickles of version 0.1.0 name these classes here
