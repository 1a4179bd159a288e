"""What is left of trained networks after factorization, and how fast they then are: `python -m benchmarks.compression.run`."""
