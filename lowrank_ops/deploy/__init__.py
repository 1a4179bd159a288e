"""A factorized model is prepared for inference, saved, loaded and exported.

May import: runtime, text, ops, model, linalg, decompose, nn.
"""
