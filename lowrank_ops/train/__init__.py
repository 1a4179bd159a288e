"""Training of a factorized model to give the outputs of its dense original.

May import: runtime, text, ops, model, linalg, decompose, nn.
"""
