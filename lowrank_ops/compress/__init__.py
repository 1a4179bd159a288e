"""Whole models: their layers are replaced by factorized modules, or chains by single ops, with a report.

May import: runtime, text, ops, model, linalg, decompose, nn, calibrate, fold, train, deploy, budget.
"""
