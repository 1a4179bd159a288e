"""Whole models: which layers are replaced by what, and the report about it."""
