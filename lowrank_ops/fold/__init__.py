"""BatchNorms and activations are folded into the layer before them.

May import: runtime, text, ops, model, linalg, decompose, nn.
"""
