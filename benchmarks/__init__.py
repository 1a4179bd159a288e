"""Speed of the fused ops against every other way to run the same block: `python -m benchmarks.run`."""
