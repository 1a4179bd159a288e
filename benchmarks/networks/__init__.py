"""Whole networks, also in inference engines: `python -m benchmarks.networks.run`."""
