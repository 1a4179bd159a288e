"""Ranks for all layers of a model under one limit of parameters, multiply-adds or time.

May import: runtime, text, ops, model, linalg, decompose, nn.
"""

from lowrank_ops.budget.knapsack import Budget

__all__ = ["Budget"]  # named so by what version 0.1.0 has pickled
