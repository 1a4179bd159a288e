"""The same on a GPU: timing, results, every kernel by itself."""
