"""Ranks for all layers of a model under one limit of parameters, multiply-adds or time."""
