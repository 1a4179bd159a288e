"""The factorized layers as nn.Modules, and the chains of plain layers that they are equal to.

May import: runtime, text, ops, model, linalg, decompose.
"""
