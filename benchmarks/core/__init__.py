"""Shared by all benchmarks: the layers, the ways to run a block, timing, the machine's limits, results."""
