"""Trained networks after factorization: their accuracy and speed: `python -m benchmarks.compression.run`."""
