"""Whole networks against the engines: `python -m benchmarks.networks.run`."""
