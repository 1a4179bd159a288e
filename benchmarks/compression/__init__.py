"""Trained networks after factorization: what is left of them, how fast they are: `python -m benchmarks.compression.run`."""
