"""A weight into factors: Tucker-2, CP and SVD, and the rules that choose ranks."""

from lowrank_ops.decompose.svd import LinearFactors
from lowrank_ops.decompose.tucker import TuckerFactors

__all__ = ["LinearFactors", "TuckerFactors"]  # named so by what version 0.1.0 has pickled
