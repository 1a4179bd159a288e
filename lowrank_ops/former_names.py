"""Modules by the names that they had in version 0.1.0, for what it has pickled. To be removed after version 0.2."""

from __future__ import annotations

import importlib
import sys

# Only modules with classes that a user's objects can hold; `lowrank_ops.budget` and `lowrank_ops.decompose` are
# folders now, which have those classes themselves.
_NOW = {
    "batches": "model.batches",
    "chains": "nn.chains",
    "conv_base": "nn.conv",
    "cp": "decompose.cp",
    "dense_weight": "nn.dense_weight",
    "distill": "train.distill",
    "initialization": "nn.init",
    "module_base": "nn.base",
    "modules": "nn.modules",
    "pairs": "fold.pairs",
    "planning": "ops.explain",
    "prepare": "deploy.prepare",
    "ranks": "decompose.ranks",
    "report": "compress.report",
}


def keep() -> None:
    """Makes `lowrank_ops.modules` and the others importable."""
    for former, now in _NOW.items():
        sys.modules[f"lowrank_ops.{former}"] = importlib.import_module(f"lowrank_ops.{now}")
