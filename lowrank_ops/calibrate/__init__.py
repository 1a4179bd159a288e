"""Factors fitted to a model's data: second moments, and the fit in the order of the calls."""
