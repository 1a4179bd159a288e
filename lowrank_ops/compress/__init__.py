"""Whole models: their layers are replaced by factorized modules, or chains by single ops, with a report."""
