"""Benchmarks on a GPU: timing, results, every kernel by itself."""
