"""Factors fitted to a model's data: second moments of its layers, and fits in the order of their calls.

May import: runtime, text, ops, model, linalg, decompose, nn.
"""
